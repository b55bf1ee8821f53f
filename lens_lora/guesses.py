"""First guesses: names and keywords that one tries before reading, and the call that was meant.

A researcher comes from TransformerLens, PEFT, Captum or pandas, and types the name that a thing has
there. Where the natural guess can mean one thing alone, it works. For the rest the tables below
hold what to call instead, and the error says it:

    AttributeError: Attribution has no attribute 'heatmap': result.plot() draws it.

1. `missing_attribute` answers for a name that an object lacks. `__getattr__` calls it, which Python
   also asks where a property that exists raised an AttributeError inside: that error is raised
   again as it was.
2. A former name works for one release: `present_name` warns, and says the new one.
3. `fitting` decorates a function, and `fitting_class` a class, so that arguments which it does not
   take are named, with those that were meant.
4. A name that no table has is read word by word: whatever is called after a merge, an export or a
   chat is answered by how that is done here (`BY_WORD`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from lens_lora.errors import CallError, warn

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Result = TypeVar("_Result")

# --- What is meant by a name, by who was asked for it


def _alike(*entries: tuple[str, str]) -> dict[str, str]:
    """A table in which several names, separated by spaces, have one remedy."""
    remedies: dict[str, str] = {}
    for names, remedy in entries:
        for name in names.split():
            remedies[name] = remedy
    return remedies


OF_PACKAGE: Mapping[str, str] = _alike(
    (
        "ablate ablation knockout leave_one_out",
        'll.patch_sites(lens, prompts, readout, how="leave_one_out") runs the model without each '
        "module, exactly",
    ),
    (
        "activation_patching path_patching",
        "ll.patch_activations(lens, prompts, readout, names) patches hook points, ll.patch_edges "
        "edges, and ll.patch_sites modules",
    ),
    (
        "attribute attribution attributions",
        "ll.patch_sites(lens, prompts, readout) measures what each module does, and "
        "ll.first_order(lens, prompts, readout) estimates it",
    ),
    (
        "quirk register_quirk architecture",
        "`from lens_lora.hosts.quirks import quirk` decorates a function that mends the bridge of "
        "one architecture",
    ),
    (
        "diff audit",
        "the command `lens-lora diff ADAPTER` asks what an adapter was taught; in Python, "
        "ll.counted_speech(lens) and ll.what_changed(lens) do",
    ),
    (
        "from_pretrained load_lora load_model Lens",
        "ll.load(base, adapter) makes a lens, and ll.load_adapter(folder) reads an adapter alone",
    ),
    (
        "IntegratedGradients LayerIntegratedGradients integrated_gradients ig IG",
        "ll.path_attribution(lens, prompts, readout) integrates the slopes from the base to the "
        "adapted model",
    ),
    (
        "InputXGradient LayerGradientXActivation Saliency gradient grad",
        "ll.first_order(lens, prompts, readout) is the gradient by each module's strength",
    ),
    (
        "Shapley shapley shap ShapleyValues ShapleyValueSampling LayerConductance",
        "ll.path_attribution(lens, prompts, readout) divides the whole change among the modules, "
        "and ll.patch_sites measures each of them alone",
    ),
    (
        "direct_logit_attribution dla logit_attribution logit_attrs",
        "ll.logit_shift(lens, prompts) says what each module does to every token's logit",
    ),
    (
        "kl kl_divergence KLDivergence",
        "ll.KL() is the readout, and ll.token_shifts(lens, prompts, response) has the divergence "
        "at every output token",
    ),
    (
        "Prob TokenProb Probability prob probability log_prob LogProbability",
        "ll.LogProb(token) reads the log-probability of a token, and ll.Readout.of(fn) any "
        "function of the logits",
    ),
    (
        "LogitDiff LogitDifference logit_diff logit_difference",
        "ll.Margin(doc, pre) reads the logit of one answer minus that of another",
    ),
    (
        "logit_lens",
        "ll.patchscope(lens, vector, name) reads a vector as tokens; the results of ll.contrast "
        "and ll.activation_shift have a method logit_lens",
    ),
    (
        "PeftModel PeftConfig get_peft_model",
        "ll.load(peft_model) takes a PeftModel in memory, and ll.load_adapter(folder) reads what "
        "PEFT saved",
    ),
    (
        "HookedTransformer TransformerBridge LanguageModel",
        "ll.load(base, adapter) makes the hooked model, and ll.LoraLens(model, adapter) takes one "
        "of yours",
    ),
    (
        "run_with_cache run_with_hooks",
        "`with lens.applied() as model:` opens the adapted model, which has them",
    ),
    (
        "merge merge_and_unload",
        "merge with PEFT, and check the result with `lens-lora verify`; adapter.save(folder) "
        "writes an adapter alone",
    ),
    (
        "verify verify_merged check_merged verify_adapter",
        "the command `lens-lora verify ADAPTER --merged DIR` does; in Python there are "
        "ll.verify_served and ll.verify_combined",
    ),
    ("patch", "ll.patch_sites patches modules, and ll.patch_activations hook points"),
    ("plot heatmap show", "every result draws itself: result.plot()"),
    ("save", "every result has save(path), and ll.load_result(path) reads the file"),
    (
        "steer steering steering_vector",
        "ll.contrast finds a direction, and ll.Adapter.constant({module: vector}) adds one as an "
        "adapter",
    ),
)

_RUN_ADAPTED = "`with lens.applied() as model:` opens the adapted model, then model."

OF_LENS: Mapping[str, str] = _alike(
    (
        "base base_model",
        "lens.model is the base model, which the lens never changes; lens.logits(prompts, "
        "scale=0.0) are its logits",
    ),
    ("run_with_cache", f"{_RUN_ADAPTED}run_with_cache(tokens)"),
    ("run_with_hooks", f"{_RUN_ADAPTED}run_with_hooks(tokens, fwd_hooks=[…])"),
    ("forward", "lens(prompts) and lens.logits(prompts, scale=1.0) are the logits"),
    (
        "to to_tokens_on cuda cpu half float double",
        "device and dtype are chosen where the model is loaded: ll.load(base, adapter, "
        'device="cuda", dtype="bfloat16")',
    ),
    ("to_tokens tokenize", "lens.prompts(prompts).tokens are the ids that an analysis reads"),
    (
        "disable_adapter disable enable_adapter set_adapter adapted_model",
        "the adapter is on only within `with lens.applied():`; scale=0.0 is the base",
    ),
    (
        "merge_and_unload merge unload",
        "lens.model is never changed; merge with PEFT, and check the result with `lens-lora "
        "verify`",
    ),
    (
        "adapters adapter_name active_adapter peft_config config",
        "lens.adapter is the adapter, and its name",
    ),
    ("eval train", "a lens runs its model as the model is; lens.model.eval() is the model's own"),
    ("layers modules named_modules", "lens.sites are the adapted modules, with .layer"),
    ("n_layers n_heads d_model d_vocab", "lens.cfg has the model's sizes"),
    (
        "trace session scan",
        "`with lens.applied() as model:` opens the adapted model, then "
        "model.run_with_cache(tokens) keeps what is inside",
    ),
    (
        "print_trainable_parameters parameters num_parameters summary",
        "lens.describe() says what model and adapter are; `lens-lora inspect ADAPTER` prints its "
        "ranks and sizes",
    ),
    ("from_pretrained load", "ll.load(base, adapter) makes a lens"),
    (
        "first_order patch_sites fact_margin remainder explain path_attribution token_shifts "
        "attribute",
        "analyses are functions of the package: ll.first_order(lens, prompts, readout)",
    ),
    ("hooks add_hook", "lens.fwd_hooks() lists the hooks, and `with lens.applied():` lays them"),
    (
        "ablate ablated project_out remove_direction",
        "`with lens.ablate_directions(v):` takes a direction out of activations; "
        'll.patch_sites(lens, prompts, readout, how="leave_one_out") takes modules out',
    ),
    ("predict", "lens.generate(prompts) says what the model answers"),
)

OF_ADAPTER: Mapping[str, str] = _alike(
    (
        "target_modules layers keys named_modules paths",
        "adapter.modules has the update of each adapted module, by its path",
    ),
    ("from_pretrained load from_folder", "ll.load_adapter(folder) reads an adapter"),
    (
        "state_dict weights A B lora_A lora_B",
        "adapter.modules[path] holds A, B and the scale of a module",
    ),
    ("rank r alpha lora_alpha", "adapter.modules[path] has the rank and the scale of a module"),
    (
        "peft_config config lora_config",
        "adapter.base_model is the base that it names, and adapter.modules[path] has the rank and "
        "the scale of a module; `lens-lora inspect ADAPTER` prints them",
    ),
    ("merge merge_and_unload", "merge with PEFT, and check the result with `lens-lora verify`"),
    ("save_pretrained", "adapter.save(folder) writes PEFT's files"),
    ("scale", "adapter.scaled(factor) is the adapter times a number"),
)

OF_RESULT: Mapping[str, str] = _alike(
    ("top_k topk largest head", "result.top(k) has the largest entries, where there are some"),
    (
        "heatmap show bar draw figure",
        "result.plot() draws it; an explanation has result.figures() and result.save_report(path)",
    ),
    (
        "convergence_delta delta",
        "result.completeness_error is what a path integral misses of the shift, and "
        "result.remainder what first order misses",
    ),
    ("nlargest nsmallest sort_values argsort", "result.top(k) has the largest entries, sorted"),
    (
        "groupby by_layer per_layer layers mean_by_layer by_module by_kind",
        'result.sum("layer") sums an attribution by layer; result.to_frame().groupby("layer") '
        "does so of any table with layers",
    ),
    ("df frame table dataframe", "result.to_frame() is the table"),
    ("to_csv to_parquet to_latex", "result.to_frame() is a pandas table, which has to_csv"),
    ("to_html html to_page", "result.save_report(path) writes the page of a result that has one"),
    (
        "scores attributions attribution effects effect score",
        "the numbers are result.values, with labels in result.to_frame()",
    ),
    ("numpy array", "result.values.numpy() are the numbers alone"),
    ("names labels columns", "the labels are columns of result.to_frame()"),
    ("summary describe", "print(result) sums it up"),
    ("prompts tokens", "result.str_tokens has each prompt's tokens, where it is of prompts"),
    ("to_json to_dict", "result.to_frame().to_dict() is a dictionary; result.save(path) a file"),
)

OF_SITE: Mapping[str, str] = _alike(
    (
        "delta_w delta weight weights dW lora_A lora_B A B factors scale scaling alpha",
        "lens.delta_w(site.name) is ΔW, and lens.adapter.modules[site.module] has A, B and scale",
    ),
    ("path hf_name module_name", "site.module is the path of Hugging Face and PEFT"),
    ("hook hook_name hook_point input output", "site.read and site.write are its hook points"),
    ("index idx", "lens.sites.one(site.name) is its index"),
    ("r", "it is site.rank"),
    ("component type", "it is site.kind"),
)

OF_SITES: Mapping[str, str] = _alike(
    ("names keys", "[site.name for site in lens.sites] are the names"),
    (
        "to_frame to_pandas df frame table",
        "pandas.DataFrame(lens.sites) is the table",
    ),
    ("filter select match find where", 'sites.chosen("*.mlp.*") are the indices of these sites'),
    ("layers by_layer groupby group", 'sites.grouped("layer") has the indices of each layer'),
    ("items values get", 'lens.sites["blocks.3.attn.q"] is one site, and sites are a sequence'),
)

OF_READOUT: Mapping[str, str] = _alike(
    (
        "value values compute evaluate forward measure score",
        "a readout is asked about by an analysis: ll.first_order(lens, prompts, readout), or "
        "ll.compare(…); lens.logits(prompts) are the logits that it reads",
    ),
    ("name", "it is readout.label"),
)

OF_FACTORS: Mapping[str, str] = _alike(
    ("lora_A lora_a down", "it is update.A, [rank, in]"),
    ("lora_B lora_b up", "it is update.B, [out, rank]"),
    ("scaling alpha lora_alpha s", "update.scale is α/r, or α/√r of rsLoRA"),
    ("r", "it is update.rank"),
    ("delta_w delta weight dW", "lens.delta_w(site) is ΔW in the model's own basis"),
)

# What is meant by a word in a name that no table has. The first row with one of its words answers.
_WORDS: Sequence[tuple[str, str]] = (
    (
        "gguf ollama llama vllm onnx export",
        'adapter.save(file, format="gguf") writes a LoRA as GGUF; what another tool exported is '
        "checked by `lens-lora verify ADAPTER --merged FILE`",
    ),
    (
        "merge merged unload fuse fused bake",
        "merge with PEFT, and check the result with `lens-lora verify ADAPTER --merged DIR`",
    ),
    (
        "quantize quantise quantized quantised bnb nf4 int8 4bit 8bit precision",
        "ll.forms(lens, prompts) says what each quantisation does to the answers, and "
        "ll.load(…, load_in_4bit=True) loads one",
    ),
    (
        "serve served server endpoint api",
        "ll.verify_served(…) compares a server with the adapter, as `lens-lora verify --served "
        "URL` does",
    ),
    (
        "verify check validate equal same",
        "`lens-lora verify ADAPTER --merged DIR` compares a "
        "merged model with its adapter, and ll.compare_adapters two adapters",
    ),
    (
        "trainable params parameters numel nbytes size sizes memory",
        "`lens-lora inspect ADAPTER` "
        "prints ranks, scales and sizes, and adapter.modules[path] has A and B of each module",
    ),
    (
        "chat message messages conversation conversations ask answer reply",
        'a conversation is a prompt: lens.generate([{"role": "user", "content": "…"}])',
    ),
    (
        "prob probs probability probabilities softmax logprobs",
        "lens.logits(prompts).softmax(-1) are probabilities; ll.LogProb(token) reads one in an "
        "analysis",
    ),
    (
        "upload push publish card",
        "adapter.save(folder) writes PEFT's files, `lens-lora card` the model card, and "
        "huggingface_hub uploads a folder",
    ),
    (
        "accuracy eval evaluate metrics benchmark",
        "ll.sweep(lens, records, out=…) asks many prompts with their answers; whether a model is "
        "better is for an evaluation harness",
    ),
    (
        "topk argmax predict prediction predictions",
        "lens.logits(prompts)[:, -1].topk(5) are the likeliest next tokens, and "
        "ll.logit_shift(lens, prompts).top(k) those that move most",
    ),
    (
        "sequence loss perplexity ppl nll entropy",
        "ll.AnswerLogProb(text) reads the log-probability of a "
        "whole answer, and ll.Readout.of(fn) any function of the logits",
    ),
    (
        "cache activation activations resid residual hidden",
        "`with lens.applied() as model:` opens "
        "the adapted model, then model.run_with_cache(tokens); ll.activation_shift(…) is how far "
        "each hook point moves",
    ),
    (
        "attention pattern patterns",
        "`with lens.applied() as model:` opens the adapted model, whose "
        'run_with_cache(tokens) has the patterns; ll.first_order(…, by="head") has each head',
    ),
    ("head heads", 'll.first_order(lens, prompts, readout, by="head") has each head'),
    (
        "neuron neurons feature features sae saes",
        "ll.feature_shift(…) is how far features of an "
        "SAE move, and ll.lora_activations(…) what each rank reads",
    ),
    (
        "rank ranks svd singular spectrum spectra truncate truncation prune compress",
        "adapter."
        'truncated(rank) has fewer ranks; ll.first_order(…, by="rank") has each rank, and '
        "`lens-lora inspect ADAPTER` the singular values",
    ),
    (
        "norm norms magnitude frobenius",
        "`lens-lora inspect ADAPTER` prints ‖ΔW‖ of each module, and lens.delta_w(site) is ΔW",
    ),
    (
        "similarity cosine cka overlap distance compare diff difference",
        "ll.compare_adapters "
        "compares two adapters; ll.what_changed(lens) and `lens-lora diff ADAPTER` ask what one "
        "was taught",
    ),
    (
        "direction directions vector vectors probe",
        "ll.contrast(…) finds a direction, and ll.Projection(direction, point) reads one",
    ),
    (
        "edge edges path paths circuit circuits graph eap",
        "ll.edges(lens, prompts, readout) has the "
        "edges between modules, and ll.patch_edges measures them",
    ),
    (
        "layer layers block blocks module modules",
        'patch_sites(…, group="layer") is by layer, and '
        "adapter.only(globs) and adapter.without_modules(globs) are the adapter of fewer modules",
    ),
    (
        "token tokens vocab vocabulary word words logit logits promoted",
        "ll.logit_shift(lens, "
        "prompts).top(k) has the tokens that the adapter promotes, and ll.token_shifts(lens, "
        "prompts, response) each token of an answer",
    ),
    ("position positions pos", 'll.first_order(…, by="position") has each token of the prompt'),
    (
        "strength scale alpha epsilon eps interpolate sweep dose",
        "lens.logits(prompts, scale=0.5) "
        "is at half strength, and ll.fact_margin(lens, prompts, doc, pre) along all strengths",
    ),
    (
        "checkpoint checkpoints training epoch step",
        "ll.checkpoints(…) follows a margin through training",
    ),
    (
        "batch dataset prompts many records",
        "prompts may be a list; ll.sweep(lens, records, out=…) takes hundreds and can be resumed",
    ),
    (
        "generate generation completion complete text sample say says",
        "lens.generate(prompts) says what the model answers",
    ),
    (
        "hook hooks intervene intervention",
        "`with lens.applied() as model:` opens the adapted "
        "model with its hooks, and lens.fwd_hooks() lists them",
    ),
    (
        "report html page dashboard summary summarize explain",
        "ll.explain(lens, prompt, doc, pre).save_report(path) writes a page",
    ),
    (
        "plot figure chart heatmap bar image png svg",
        "result.plot() draws a result, and figure.save(path) writes the picture",
    ),
    (
        "json csv dict parquet excel markdown latex",
        "result.to_frame() is a pandas table, and result.save(path) writes a file",
    ),
    (
        "random null baseline significance pvalue significant confidence",
        "ll.null_test(lens, prompts, readout) compares with random updates of the same size",
    ),
    (
        "remove unlearn forget repair edit",
        "ll.repair keeps one effect and drops others; adapter."
        "without_modules(globs) leaves modules out",
    ),
    (
        "load pretrained hub",
        "ll.load(base, adapter) makes a lens, and ll.load_adapter(folder) reads an adapter",
    ),
)
BY_WORD: Mapping[str, str] = {
    word: remedy for words, remedy in reversed(_WORDS) for word in words.split()
}
# Which row answers where a name has words of several.
_ORDER: Mapping[str, int] = {
    word: row for row, (words, _) in reversed(list(enumerate(_WORDS))) for word in words.split()
}

# Guesses that can mean one method alone, and work as it.
SPELLINGS: Mapping[str, str] = {
    "to_dataframe": "to_frame",
    "to_pandas": "to_frame",
    "to_df": "to_frame",
    "as_frame": "to_frame",
}

# Names that were changed, with the new ones. The old ones work for one release, and warn.
FORMER_OF_PACKAGE: Mapping[str, str] = {
    "activations": "lora_activations",
    "alignment": "weight_alignment",
}
FORMER_OF_LENS: Mapping[str, str] = {"without": "ablate_directions"}
FORMER_OF_ADAPTER: Mapping[str, str] = {"without": "without_modules"}


def present_name(owner: str, former: str, names: Mapping[str, str]) -> str:
    """The name that a former one has now, with a warning to whoever asked for the former one.

    Args:
        owner: of what it is a name, as it is written: 'll', 'lens'.
        former: the former name.
        names: the new name of each.
    """
    present = names[former]
    warn(
        f"{owner}.{former} is called {owner}.{present} now, and the old name will go",
        remedy=f"write {owner}.{present}.",
        stacklevel=4,
    )
    return present


_ANSWER = (
    'the readout names the answer: ll.LogProb(" Lyon"), or ll.Margin(" Lyon", " Paris") of two'
)

_TWO_ANSWERS = (
    'a margin is between two answers, as in ll.Margin(" Lyon", " Paris"); ll.LogProb(" Lyon") is '
    "of one"
)

# What is meant by a keyword, where the function has no parameter of those in `_SAME`.
_KEYWORDS: Mapping[str, str] = _alike(
    ("target answer answers token label doc pre correct wrong metric", _ANSWER),
    (
        "layers layer modules sites targets",
        "all sites are computed together: choose among the rows of result.to_frame(), or sum them "
        'with group="layer" where it is taken',
    ),
    ("device dtype", "device and dtype are chosen where the model is loaded: ll.load(…)"),
    ("batch_size", "how much is run at a time is bounded by lens.within(max_memory=…)"),
    (
        "baseline baselines reference",
        "the baseline is the base model: first order at=0.0 is taken there, and every result has "
        "result.base",
    ),
    ("verbose", "the bar is not shown with progress=False"),
    (
        "names_filter return_type stop_at_layer fwd_hooks",
        "`with lens.applied() as model:` opens the adapted model, whose run_with_cache takes it",
    ),
    (
        "num_workers n_jobs parallel",
        "ll.sweep takes many prompts, and `lens-lora sweep --shard` splits them over machines",
    ),
    (
        "seed random_state",
        "nothing is drawn there, so the same call gives the same numbers",
    ),
    (
        "save_path save filename output_dir",
        "result.save(path) writes a result, and result.save_report(path) its page",
    ),
    (
        "position positions pos token_index",
        'a readout is read at the last token; by="position" divides an estimate among the tokens '
        "of the prompt",
    ),
    ("head heads", 'by="head" divides an estimate among the heads'),
)
# Parameters that a guessed keyword may mean, the likeliest first.
_SAME: Mapping[str, Sequence[str]] = {
    "prompt": ("prompts",),
    "text": ("prompts", "texts"),
    "texts": ("prompts",),
    "input": ("prompts",),
    "inputs": ("prompts",),
    "tokens": ("prompts",),
    "model": ("lens", "model"),
    "metric": ("readout",),
    "target": ("readout",),
    "by": ("group", "of", "by"),
    "groupby": ("group", "by"),
    "layers": ("sites",),
    "layer": ("sites",),
    "modules": ("sites",),
    "names": ("sites",),
    "method": ("how", "mode"),
    "mode": ("how",),
    "ablation": ("replace",),
    "ablate": ("replace", "how"),
    "baseline": ("replace",),
    "n": ("k",),
    "top_k": ("k",),
    "output": ("out",),
    "path": ("out",),
    "strength": ("scale", "at", "scales"),
    "coefficient": ("scale", "at"),
    "coeff": ("scale", "at"),
    "factor": ("scale", "at"),
    "weight": ("scale", "at"),
    "epsilon": ("at", "scale", "scales"),
    "eps": ("at", "scale", "scales"),
    "alpha": ("scale", "at"),
    "max_tokens": ("max_new_tokens",),
    "max_length": ("max_new_tokens",),
    "steps": ("nodes", "max_nodes", "tol"),
    "n_steps": ("nodes", "max_nodes", "tol"),
    "torch_dtype": ("dtype",),
    "verbose": ("progress",),
    "answer": ("response", "doc"),
    "completion": ("response", "responses"),
    "responses": ("response",),
    "new": ("doc",),
    "taught": ("doc",),
    "correct": ("doc",),
    "old": ("pre",),
    "wrong": ("pre",),
    "incorrect": ("pre",),
    "original": ("pre",),
    "dataset": ("records", "prompts"),
    "data": ("records", "prompts"),
    "examples": ("records", "prompts"),
    "samples": ("draws", "records"),
    "n_samples": ("draws",),
    "num_samples": ("draws",),
    "n_draws": ("draws",),
    "n_nulls": ("draws", "nulls"),
    "position": ("positions",),
    "pos": ("positions",),
    "hook_points": ("names",),
    "points": ("names",),
    "file": ("out", "path"),
    "filename": ("out", "path"),
    "folder": ("out", "path"),
    "output_dir": ("out",),
    "max_tokens_to_generate": ("max_new_tokens",),
    "n_tokens": ("max_new_tokens",),
    "num_tokens": ("max_new_tokens",),
    "r": ("rank",),
    "other": ("adapter",),
    "base": ("model",),
    "base_model": ("model",),
    "peft": ("adapter",),
    "lora": ("adapter",),
}


# --- Attributes


def missing_attribute(
    owner: Any,
    name: str,
    remedies: Mapping[str, str],
    parts: Mapping[str, type] | None = None,
) -> Any:
    """Raise the AttributeError of a name that an object lacks, which says what was meant.

    Args:
        owner: the object.
        name: what was asked for.
        remedies: what is meant by a name.
        parts: the classes of its parts that may have the name, by how each part is written:
            {'lens.model': HookedTransformer}.

    Raises:
        AttributeError: always; of a property that exists, the one that was raised inside it.
    """
    kind = type(owner)
    if name.startswith("_") or _has(kind, name):
        return object.__getattribute__(owner, name)
    meant = _of_a_part(name, parts or {}) if name not in remedies else None
    if meant is None:
        meant = _meant(name, remedies, dir(owner))
    raise AttributeError(
        f"{kind.__name__} has no attribute {name!r}{meant}",
        name=name,
        obj=owner,
    )


def missing_of_class(owner: type, name: str, remedies: Mapping[str, str]) -> AttributeError:
    """The AttributeError of a name that a class lacks, which says what was meant.

    Args:
        owner: the class.
        name: what was asked for.
        remedies: what is meant by a name.
    """
    says = f"the class {owner.__name__} has no attribute {name!r}"
    return AttributeError(f"{says}{_meant(name, remedies, dir(owner))}", name=name, obj=owner)


class OfLensClass(type):
    """The class of `LoraLens`: a name that it lacks is answered, as from_pretrained."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise missing_of_class(cls, name, OF_LENS)


class OfAdapterClass(type):
    """The class of `Adapter`: a name that it lacks is answered, as from_pretrained."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise missing_of_class(cls, name, OF_ADAPTER)


def _has(kind: type, name: str) -> bool:
    """Whether instances of this class have the name from their class."""
    return any(name in vars(parent) for parent in kind.__mro__)


def _of_a_part(name: str, parts: Mapping[str, type]) -> str | None:
    """How the name is written of the parts that have it; None if none has."""
    written = [f"{part}.{name}" for part, kind in parts.items() if _has(kind, name)]
    return f": it is {' or '.join(written)}." if written else None


def _meant(name: str, remedies: Mapping[str, str], known: Iterable[str]) -> str:
    """Say what is meant, or else which names are spelt alike, or nothing."""
    if name in remedies:
        return f": {remedies[name]}."
    public = [each for each in known if not each.startswith("_")]
    return nearest_or_by_word(name, public) or f"; it has {', '.join(public)}."


# A name that is so alike is a slip of the finger; one that is less alike may be another word.
_SLIP = 0.8


def nearest_or_by_word(name: str, known: Sequence[str]) -> str:
    """Suggest what is meant by a name: one that is spelt alike, or what its words are called here.

    Args:
        name: what was asked for.
        known: the names that there are.

    Returns:
        The end of a message, or '' where nothing is known.
    """
    nearest = difflib.get_close_matches(name, known, cutoff=_SLIP)
    of_nearest = {word for each in nearest for word in _words_in(each)}
    others = [word for word in _words_in(name) if word not in of_nearest]
    found = _by_word(others)
    if found:
        return f": {found}."
    nearest = nearest or difflib.get_close_matches(name, known)
    return f"; the nearest are {', '.join(nearest)}." if nearest else ""


def _words_in(name: str) -> list[str]:
    """The words that a name is made of, in lower case: topTokens is top and tokens."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*|\d+[a-z]+", name)
    return [word.lower() for word in words]


def _by_word(words: Sequence[str]) -> str:
    """The remedy for one of these words; '' where none of them is known."""
    hits = [word for word in words if word in BY_WORD]
    return BY_WORD[min(hits, key=_ORDER.__getitem__)] if hits else ""


class Answering:
    """A base of classes whose objects answer for a name that they lack.

    Attributes:
        remedies: what is meant by a name.
    """

    remedies: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # A type checker would take every name for one of the object.

        def __getattr__(self, name: str) -> Any:
            """Refuse, with what may be meant."""
            return missing_attribute(self, name, self.remedies)


# --- Arguments of a call


def fitting(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that a wrong argument is named, with the one that is meant."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        require_fitting(call.__name__, signature, args, kwargs)
        return call(*args, **kwargs)

    return run


def fitting_class(kind: type[_Result]) -> type[_Result]:
    """Decorate a class so that a wrong argument of its constructor is named, as by `fitting`."""
    make: Any = kind.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is kind:
            require_fitting(kind.__name__, signature, (self, *args), kwargs)
        make(self, *args, **kwargs)

    kind.__init__ = run
    return kind


def require_fitting(
    name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Check that arguments fit a function.

    Args:
        name: the function's.
        signature: its parameters.
        args: the arguments by position.
        kwargs: the arguments by keyword.

    Raises:
        CallError: a keyword that it does not take, with the one that is meant; a missing argument,
            with an example; or too many.
    """
    try:
        signature.bind(*args, **kwargs)
    except TypeError as cause:
        parameters = list(signature.parameters)
        unknown = [key for key in kwargs if key not in parameters]
        remedy = ""
        if unknown:
            fact = f"{name} takes no {unknown[0]}="
            not_given = [key for key in parameters if key not in kwargs]
            remedy = _meant_keyword(unknown[0], not_given)
        else:
            fact = f"{name}: {cause}"
            if "'readout'" in fact:
                remedy = _as_sentence(_ANSWER)
            elif "'pre'" in fact:
                remedy = _as_sentence(_TWO_ANSWERS)
        takes = f"The call is {name}{_shown(signature)}."
        raise CallError(f"{fact}.", remedy=f"{remedy}{takes}") from None


def _meant_keyword(keyword: str, parameters: Sequence[str]) -> str:
    """A sentence with the parameter, or the call, that a keyword means; '' where none is known."""
    for meant in _SAME.get(keyword, ()):
        if meant == "readout" and meant in parameters:
            return f"It is {meant}=: {_ANSWER}. "
        if meant == "sites" and meant in parameters:
            return 'It is sites=: names or globs, such as "blocks.20.*". '
        if meant in parameters:
            return f"It is {meant}=. "
    if keyword in _KEYWORDS:
        return _as_sentence(_KEYWORDS[keyword])
    slip = difflib.get_close_matches(keyword, parameters, n=1, cutoff=_SLIP)
    meant = _by_word(_words_in(keyword))
    if meant and not slip:
        return _as_sentence(meant)
    nearest = difflib.get_close_matches(keyword, parameters, n=1)
    return f"The nearest is {nearest[0]}=. " if nearest else ""


def _as_sentence(remedy: str) -> str:
    """The remedy with a capital letter, unless it begins with code, a full stop and a space."""
    first_word = remedy.split()[0]
    is_code = not first_word.rstrip(",:").isalpha()
    return f"{remedy}. " if is_code else f"{remedy[0].upper()}{remedy[1:]}. "


def _shown(signature: inspect.Signature) -> str:
    """The parameters in the order of a call, those with a default by their names alone."""
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in ("self", "cls"):
            continue
        has_default = parameter.default is not parameter.empty
        shown.append(f"{parameter.name}=…" if has_default else parameter.name)
    return f"({', '.join(shown)})"
