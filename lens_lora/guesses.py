"""Answer first guesses: names and keywords that users try before reading, and what they meant.

A researcher comes from TransformerLens, PEFT, Captum or pandas, and types the name that a thing has
there. If a natural guess can mean only one thing, it works. For the rest, the tables below hold
what to call instead, and the error says so:

    AttributeError: Attribution has no attribute 'heatmap': result.plot() draws it.

1. `missing_attribute` raises the error for a name that an object lacks. `__getattr__` calls it.
   Python also calls `__getattr__` if a property exists and raised an AttributeError inside; that
   error is then raised again unchanged.
2. A former name works for one release: `present_name` warns, and names the new one.
3. `fitting` decorates a function, and `fitting_class` a class, so that the error about an argument
   that it does not take names the argument that was meant.
4. A name that is in no table is read word by word: for a name made of words such as merge, export
   or chat, the error says how that is done here (`lens_lora.vocabulary`).
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from lens_lora.errors import CallError, warn
from lens_lora.vocabulary import meaning, words_in

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Result = TypeVar("_Result")

# --- What is meant by a name, for each kind of object that was asked for it


def _alike(*entries: tuple[str, str]) -> dict[str, str]:
    """Make a table in which several names, separated by spaces, share one remedy."""
    remedies: dict[str, str] = {}
    for names, remedy in entries:
        for name in names.split():
            remedies[name] = remedy
    return remedies


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
    (
        "to_tokens tokenize prompt_tokens input_ids token_ids get_tokens",
        "lens.prompts(prompts).tokens are the ids that an analysis reads",
    ),
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
        "adapters adapter_name active_adapter active_adapters",
        "lens.adapter is the adapter, and lens.adapter.name its name",
    ),
    (
        "config",
        "lens.cfg is the model's, with its sizes; lens.adapter is the adapter, and lens.adapter"
        "[path] has the rank and the scale of a module",
    ),
    (
        "peft_config lora_config",
        "lens.adapter is the adapter, whose modules[path] have rank and scale; `lens-lora inspect "
        "ADAPTER` prints them",
    ),
    (
        "at at_scale with_scale scaled half_strength interpolate",
        "the strength is an argument of each call, as in lens.logits(prompts, scale=0.5), and "
        "lens.with_adapter(lens.adapter.scaled(0.5)) is a lens of half the adapter",
    ),
    (
        "rank ranks r lora_alpha scaling",
        "lens.adapter[path] has the rank and the scale of a module, and lens.sites[name].rank the "
        "rank of a site",
    ),
    (
        "compare diff difference",
        "every result has base, adapted and shift; ll.token_shifts(lens, prompts, response) "
        "compares both models token by token, and ll.compare_adapters(lens, other) two adapters",
    ),
    ("model_name name name_or_path", "lens.cfg.model_name is the base model's name"),
    ("eval train", "a lens runs its model as the model is; lens.model.eval() is the model's own"),
    ("layers modules named_modules", "lens.sites are the adapted modules, with .layer"),
    (
        "n_layers n_heads d_model d_vocab num_layers num_heads num_hidden_layers hidden_size "
        "vocab_size d_mlp d_head n_ctx",
        "lens.cfg has the model's sizes, such as lens.cfg.n_layers",
    ),
    ("save_pretrained save_adapter save", "lens.adapter.save(folder) writes PEFT's files"),
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
    (
        "readout metric measure value values margin logit_diff",
        "g = lens.function(prompts, readout), then g(0.0) is its value in the base model and "
        "g(1.0) in the adapted one",
    ),
    (
        "state_dict named_parameters",
        "lens.model.state_dict() has the base model's weights, and lens.adapter.modules[path] has "
        "A, B and scale of the adapter",
    ),
)

# Attributes of a lens that cannot be set, and what to call instead.
FIXED_IN_LENS: Mapping[str, str] = _alike(
    ("adapter", "lens.with_adapter(adapter) is a lens of another adapter over the same model"),
    ("model", "ll.LoraLens(model, lens.adapter) is a lens of another model"),
    (
        "scale strength epsilon gate gates alpha weight multiplier",
        "the strength is an argument of each call, as in lens.logits(prompts, scale=0.5), and "
        "lens.with_adapter(lens.adapter.scaled(0.5)) is a lens of half the adapter",
    ),
)

OF_ADAPTER: Mapping[str, str] = _alike(
    (
        "target_modules layers keys values items get named_modules paths",
        "adapter.modules has the update of each adapted module, by its path, and adapter[path] is "
        "one of them",
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
    ("names", "adapter.name is its name, and adapter.modules has its modules by path"),
    ("merge merge_and_unload", "merge with PEFT, and check the result with `lens-lora verify`"),
    ("save_pretrained", "adapter.save(folder) writes PEFT's files"),
    ("scale", "adapter.scaled(factor) is the adapter times a number"),
    (
        "delta_w delta dW materialise materialize",
        "adapter[path].materialise() is ΔW [out, in] of a module, and lens.delta_w(site) the same "
        "in the model's own basis",
    ),
    (
        "print describe summary info",
        "print(adapter) says what it is; `lens-lora inspect ADAPTER` prints its ranks and sizes",
    ),
    (
        "to cuda cpu half float double bfloat16",
        "device and dtype are those of the model that a lens lays it over: ll.load(base, adapter, "
        'device="cuda", dtype="bfloat16")',
    ),
)

OF_RESULT: Mapping[str, str] = _alike(
    (
        "top_k topk largest head most_important important best strongest",
        "result.top(k) has the largest entries, if the result has any",
    ),
    (
        "heatmap show bar draw figure",
        "result.plot() draws it; an explanation has result.figures() and result.save_report(path)",
    ),
    (
        "convergence_delta delta",
        "result.completeness_error is what a path integral misses of the shift, and "
        "result.remainder what first order misses",
    ),
    (
        "nlargest nsmallest sort_values argsort sort sorted rank ranked",
        "result.top(k) has the largest entries, sorted",
    ),
    (
        "groupby by_layer per_layer layers mean_by_layer by_module by_kind",
        'result.sum("layer") sums an attribution by layer; result.to_frame().groupby("layer") '
        "does so for any table with layers",
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
    (
        "filter query loc where select layer at_layer",
        'result.to_frame() is a pandas table: result.to_frame().query("layer == 3")',
    ),
    ("summary describe", "print(result) sums it up"),
    (
        "crossing crossover flip flip_point flip_at threshold",
        "result.flip_scale of ll.fact_margin is the strength at which the answer changes",
    ),
    (
        "prompts tokens",
        "result.str_tokens has each prompt's tokens, if the result is about prompts",
    ),
    (
        "total",
        "result.shift is the whole shift; effects of single modules do not sum to it, and "
        "result.values.sum() is their sum",
    ),
    (
        "remainder residual",
        "ll.remainder(lens, prompts, readout) says what first order misses of the shift",
    ),
    ("to_list tolist", "list(result) are its rows, and result.values.tolist() its numbers"),
    (
        "plot figures",
        "an explanation has result.figures(), and result.save_report(path) writes its page; others "
        "have result.plot()",
    ),
    (
        "top",
        "the parts of an explanation have it, as in result.first_order.top(k); "
        "result.to_frame().nlargest(5, column) are the largest rows of any table",
    ),
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

OF_PROMPTS: Mapping[str, str] = _alike(
    ("shape size ids input_ids token_ids", "prompts.tokens are the ids, [batch, pos]"),
    (
        "to_str_tokens str_tokens decode",
        "lens.tokenizer.convert_ids_to_tokens(prompts.tokens[0]) are a prompt's tokens as strings, "
        "and results have them as result.str_tokens",
    ),
    ("text texts strings prompts", "prompts.sources says from which text each prompt was made"),
)

OF_GENERATED: Mapping[str, str] = _alike(
    ("tokens input_ids token_ids sequences", "said.ids has the tokens of each response"),
    (
        "logprobs log_probs probs probabilities scores logits",
        "ll.token_shifts(lens, prompts, said) has the probability of each token in both models",
    ),
    ("response responses answer answers output outputs completion", "said.text is the response"),
)

# What to call instead of an index or an operator.
INDEX_OF_PROMPTS = (
    "prompts.chosen([0]) are the prompts of these indices, prompts.tokens[0] the ids of one, and "
    "prompts.texts[0] its text, if it was given as text"
)
INDEX_OF_GENERATED = "said.texts[0] is the first response as text, and said.ids[0] its tokens"
TIMES_OF_LENS = (
    "lens.with_adapter(lens.adapter.scaled(0.5)) is a lens of half the adapter, and "
    "lens.logits(prompts, scale=0.5) are the logits at half its strength"
)

OF_READOUT: Mapping[str, str] = _alike(
    (
        "value values compute evaluate forward measure score",
        "a readout is asked about by an analysis, such as ll.first_order(lens, prompts, readout); "
        "g = lens.function(prompts, readout) has its values, g(0.0) in the base model",
    ),
    ("name", "it is readout.label"),
)

OF_FIGURE: Mapping[str, str] = _alike(
    (
        "savefig save save_fig to_png export to_svg to_pdf saveas",
        'figure.write_image("figure.svg") writes a picture, with `pip install "kaleido>=1"`, and '
        'figure.write_html("figure.html") a page',
    ),
    ("axes gca ax get_axes", "it is a figure of Plotly: figure.update_xaxes(…), update_yaxes(…)"),
    (
        "set_size_inches figsize set_figwidth set_figheight",
        "it is figure.update_layout(width=800, height=500)",
    ),
    (
        "suptitle set_title title legend set_xlabel set_ylabel xlabel ylabel",
        'it is a figure of Plotly: figure.update_layout(title="…", xaxis_title="…")',
    ),
    ("tight_layout", "a Plotly figure needs no tight_layout"),
)

OF_FACTORS: Mapping[str, str] = _alike(
    ("lora_A lora_a down", "it is update.A, [rank, in]"),
    ("lora_B lora_b up", "it is update.B, [out, rank]"),
    ("scaling alpha lora_alpha s", "update.scale is α/r, or α/√r of rsLoRA"),
    ("r", "it is update.rank"),
    (
        "delta_w delta weight dW",
        "update.materialise() is ΔW [out, in], and lens.delta_w(site) the same in the model's own "
        "basis",
    ),
)

# Guesses that can mean only one method, and work like it.
SPELLINGS: Mapping[str, str] = {
    "to_dataframe": "to_frame",
    "to_pandas": "to_frame",
    "to_df": "to_frame",
    "as_frame": "to_frame",
}

# Former names with the new ones. The former ones work for one release, with a warning.
FORMER_OF_PACKAGE: Mapping[str, str] = {
    "activations": "lora_activations",
    "alignment": "weight_alignment",
}
FORMER_OF_LENS: Mapping[str, str] = {"without": "ablate_directions"}
FORMER_OF_ADAPTER: Mapping[str, str] = {"without": "without_modules"}


def present_name(owner: str, former: str, names: Mapping[str, str]) -> str:
    """Return the present name of something that was renamed, and warn of the former name.

    Args:
        owner: the owner of the name, as users write it, such as 'll' or 'lens'.
        former: the former name.
        names: the new name for each former one.
    """
    present = names[former]
    warn(
        f"{owner}.{former} is called {owner}.{present} now, and the old name will go",
        remedy=f"write {owner}.{present}.",
    )
    return present


_ANSWER = (
    'the readout names the answer: ll.LogProb(" Lyon"), or ll.Margin(" Lyon", " Paris") of two'
)

_TWO_ANSWERS = (
    'a margin is between two answers, as in ll.Margin(" Lyon", " Paris"); ll.LogProb(" Lyon") is '
    "of one"
)

_GROUP = (
    'group says what is summed, as in result.sum("layer"); result.total is the sum of all values '
    "of a prompt"
)

_HEADER = "what every result has comes from **g.header(), the last argument"
# What stands above a function, for decorators that need arguments.
_DECORATORS = {
    "readout": (
        'above a function of the logits stands @ll.readout(units="nats", label="H(next token)")'
    ),
    "adapter_format": (
        'above a function of a folder stands @ll.adapter_format(files=("pairs.safetensors",))'
    ),
}
_LOADING = (
    "the base model comes first, as in ll.load(base, adapter); ll.load(adapter) alone takes the "
    "base that the adapter names"
)

# What is meant by a keyword, if the function has none of the parameters that `_SAME` has for it.
_KEYWORDS: Mapping[str, str] = _alike(
    ("target answer answers token label doc pre correct wrong metric", _ANSWER),
    (
        "layers layer modules sites targets",
        "all sites are computed together: choose among the rows of result.to_frame(), or sum them "
        'with group="layer" where it is taken',
    ),
    ("device dtype", "device and dtype are chosen where the model is loaded: ll.load(…)"),
    ("batch_size", "lens.within(max_memory=…) bounds how much is run at a time"),
    (
        "baseline baselines reference",
        "the baseline is the base model: first order at=0.0 is taken there, and every result has "
        "result.base",
    ),
    ("verbose", "progress=False hides the bar"),
    ("progress quiet", "it shows no bar, so there is none to silence"),
    (
        "adapter use_adapter with_adapter adapted adapters adapter_name",
        "a lens has one adapter, and lens.with_adapter(adapter) is a lens of another; where a call "
        "takes scale=, 0.0 is the base model and 1.0 the adapted one",
    ),
    (
        "names_filter stop_at_layer fwd_hooks",
        "`with lens.applied() as model:` opens the adapted model, whose run_with_cache takes it",
    ),
    (
        "return_type loss_per_token labels",
        "lens.logits(prompts) are always logits; ll.AnswerLogProb(text) is the log-probability of "
        "an answer, which is minus its loss",
    ),
    (
        "num_workers n_jobs parallel",
        "ll.sweep takes many prompts, and `lens-lora sweep --shard` splits them over machines",
    ),
    (
        "n_steps steps nodes",
        "ll.path_attribution(lens, prompts, readout) integrates over steps; this takes none",
    ),
    (
        "kind ax figsize fig show cmap colormap colorscale color colors palette title width height "
        "vmin vmax zmin zmax",
        "a figure is Plotly's: figure = result.plot(), then figure.update_layout(width=…, title=…)",
    ),
    (
        "seed random_state n_samples num_samples samples",
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
    (
        "head heads",
        'll.first_order(lens, prompts, readout, by="head") divides its estimate among the heads',
    ),
    (
        "exclude excluding skip ignore leave_out without",
        "lens.with_adapter(lens.adapter.without_modules(globs)) is the lens of the adapter without "
        "these modules; where sites= is taken, it names those that are asked about",
    ),
    (
        "normalize normalise relative",
        "the table of a result has the column share, each value as a part of the whole shift",
    ),
)
# What is meant by a keyword of a call that returns the k largest entries.
_KEYWORDS_OF_TOP: Mapping[str, str] = _alike(
    (
        "by key sort_by ascending descending largest abs order",
        "the entries of largest magnitude come first: result.to_frame().sort_values(…) sorts them "
        'otherwise, and result.sum("layer") adds them up by layer',
    ),
)
# Parameters that a guessed keyword may mean, the likeliest first.
_SAME: Mapping[str, Sequence[str]] = {
    "prompt": ("prompts",),
    "text": ("prompt", "prompts", "texts"),
    "question": ("prompt", "prompts"),
    "texts": ("prompts",),
    "input": ("prompts", "prompt"),
    "inputs": ("prompts",),
    "tokens": ("prompts",),
    "model": ("lens", "model"),
    "metric": ("readout",),
    "target": ("readout", "doc"),
    "by": ("group", "of", "by"),
    "groupby": ("group", "by"),
    "layers": ("sites", "names"),
    "layer": ("sites", "names"),
    "modules": ("sites",),
    "names": ("sites",),
    "method": ("how", "mode"),
    "mode": ("how",),
    "ablation": ("replace",),
    "ablate": ("replace", "how"),
    "baseline": ("replace",),
    "n": ("k",),
    "top_k": ("k",),
    "output": ("out", "report", "save"),
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
    "answer": ("doc", "response"),
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
    "foil": ("pre",),
    "false": ("pre",),
    "gpu": ("device",),
    "cuda": ("device",),
    "cpu": ("device",),
    "fp16": ("dtype",),
    "bf16": ("dtype",),
    "half": ("dtype",),
    "precision": ("dtype",),
    "quantize": ("load_in_4bit",),
    "quantise": ("load_in_4bit",),
    "4bit": ("load_in_4bit",),
    "8bit": ("load_in_8bit",),
    "html": ("report",),
    "save": ("out", "report", "path"),
    "limit": ("max_new_tokens", "k"),
    "questions": ("prompts", "texts"),
    "num_questions": ("prompts",),
    "num_prompts": ("prompts",),
    "n_prompts": ("prompts",),
    "messages": ("chat", "prompts"),
    "system_prompt": ("system",),
    "checkpoint": ("adapter",),
    "against": ("merged", "other"),
    "adapter_path": ("adapter",),
    "model_name": ("model",),
    "model_path": ("model",),
    "base_path": ("model",),
    "silent": ("quiet", "progress"),
    "memory": ("max_memory",),
    "format": ("json",),
    "random": ("nulls", "draws"),
    "num_draws": ("draws",),
    "random_seed": ("seed",),
}


# --- Attributes

# The most names of an object that are listed when nothing is known about a name.
_LISTED = 15


def missing_attribute(
    owner: Any,
    name: str,
    remedies: Mapping[str, str],
    parts: Mapping[str, type] | None = None,
) -> Any:
    """Raise an AttributeError for a name that an object lacks, which says what was meant.

    Args:
        owner: the object.
        name: the name that was asked for.
        remedies: what to call instead of each name.
        parts: the classes of the object's parts that may have the name, under what a user writes
            for each part: {'lens.model': HookedTransformer}.

    Raises:
        AttributeError: always; for a property that exists, the error that it raised inside.
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


def not_set(owner: object, name: str, remedies: Mapping[str, str]) -> AttributeError:
    """Make the AttributeError for an attribute that cannot be set, with what to call instead.

    Args:
        owner: the object.
        name: the attribute.
        remedies: what to call instead of setting each attribute.
    """
    meant = f": {remedies[name]}." if name in remedies else "; nothing would read it."
    kind = type(owner).__name__
    return AttributeError(f"{kind}.{name} cannot be set{meant}", name=name, obj=owner)


def missing_of_class(owner: type, name: str, remedies: Mapping[str, str]) -> AttributeError:
    """Make the AttributeError for a name that a class lacks, which says what was meant.

    Args:
        owner: the class.
        name: the name that was asked for.
        remedies: what to call instead of each name.
    """
    says = f"the class {owner.__name__} has no attribute {name!r}"
    return AttributeError(f"{says}{_meant(name, remedies, dir(owner))}", name=name, obj=owner)


class OfLensClass(type):
    """The metaclass of `LoraLens`, which answers names that the class lacks: from_pretrained."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise missing_of_class(cls, name, OF_LENS)


class OfAdapterClass(type):
    """The metaclass of `Adapter`, which answers names that the class lacks: from_pretrained."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise missing_of_class(cls, name, OF_ADAPTER)


def _has(kind: type, name: str) -> bool:
    """Whether this class, or one of its bases, defines the name."""
    return any(name in vars(parent) for parent in kind.__mro__)


def _of_a_part(name: str, parts: Mapping[str, type]) -> str | None:
    """Say how to write the name on the parts that have it; None if no part has it."""
    written = [f"{part}.{name}" for part, kind in parts.items() if _has(kind, name)]
    return f": it is {' or '.join(written)}." if written else None


def _meant(name: str, remedies: Mapping[str, str], known: Iterable[str]) -> str:
    """Say what is meant, or else which names are spelt alike, or else which names there are."""
    if name in remedies:
        return f": {remedies[name]}."
    public = [each for each in known if not each.startswith("_")]
    listed = f"; it has {', '.join(public)}." if len(public) <= _LISTED else ""
    return nearest_or_meant(name, public) or listed or "; dir(…) lists its names."


# A name that is at least this similar is a typing error; a less similar one may be another word.
_SLIP = 0.8
_ALIKE = 0.7


def nearest_or_meant(name: str, known: Sequence[str]) -> str:
    """Say what may be meant by a name: one that is spelt alike, or the call for its words.

    Args:
        name: the name that was asked for.
        known: the names that exist.

    Returns:
        The end of a message, or '' if nothing is known.
    """
    slips = difflib.get_close_matches(name, known, cutoff=_SLIP)
    if slips and not _says_more(name, slips):
        return f"; the nearest are {', '.join(slips)}."
    meant = meaning(name)
    if meant is not None:
        opening = ": " if meant.is_sure else "; perhaps this is meant: "
        return f"{opening}{meant.in_python}."
    nearest = slips or difflib.get_close_matches(name, known, cutoff=_ALIKE)
    return f"; the nearest are {', '.join(nearest)}." if nearest else ""


def _says_more(name: str, slips: Sequence[str]) -> bool:
    """Whether a name means something other than the names that are spelt alike.

    It does if it has a word of the field that they lack, such as `ablate_sites` compared with
    `patch_sites`. It also does if it is a term of the field, and one of them is that term with a
    further word: `attribution` is not a misspelt `path_attribution`.
    """
    words_of_slips = [set(words_in(slip)) for slip in slips]
    words = words_in(name)
    every_word_of_slips = set[str]().union(*words_of_slips)
    others = [word for word in words if word not in every_word_of_slips]
    if others:
        return meaning("_".join(others)) is not None or _is_a_term(name)
    is_a_part_of_one = any(set(words) < words_of_slip for words_of_slip in words_of_slips)
    return is_a_part_of_one and _is_a_term(name)


def _is_a_term(name: str) -> bool:
    """Whether one term of the field accounts for all words of a name."""
    meant = meaning(name)
    return meant is not None and meant.is_sure


class Answering:
    """A base class of objects whose error for a missing name says what was meant.

    Attributes:
        remedies: what to call instead of each name.
    """

    remedies: ClassVar[Mapping[str, str]] = {}

    if not TYPE_CHECKING:  # A type checker would believe that the object has every name.

        def __getattr__(self, name: str) -> Any:
            """Raise an error that says what may be meant."""
            return missing_attribute(self, name, self.remedies)


def refused_index(owner: object, key: object, remedy: str) -> CallError:
    """Make the error for an object that is not indexed, with what to call instead.

    Args:
        owner: the object.
        key: the index that was asked for.
        remedy: what to call instead.
    """
    kind = type(owner).__name__
    return CallError(f"{kind} is not indexed, by {key!r} or otherwise", remedy=f"{remedy}.")


# --- Arguments of a call


def fitting(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that an error about an argument names the one that was meant."""
    signature = inspect.signature(call)
    # A lens is the only object with a decorated `__call__`.
    name = "lens" if call.__name__ == "__call__" else call.__name__

    @functools.wraps(call)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        require_fitting(name, signature, args, kwargs)
        return call(*args, **kwargs)

    return run


def fitting_class(kind: type[_Result]) -> type[_Result]:
    """Decorate a class as `fitting` does a function, for the arguments of its constructor."""
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
        name: the name of the function.
        signature: the signature of the function.
        args: the arguments by position.
        kwargs: the arguments by keyword.

    Raises:
        CallError: the function does not take a keyword, and the message names the one that was
            meant; an argument is missing, and the message has an example; or there are too many.
    """
    try:
        signature.bind(*args, **kwargs)
    except TypeError as cause:
        parameters = list(signature.parameters)
        unknown = [key for key in kwargs if key not in parameters]
        if unknown:
            fact = f"{name} takes no {unknown[0]}="
            not_given = [key for key in parameters if key not in kwargs]
            remedy = _meant_keyword(unknown[0], not_given)
        else:
            fact = f"{name}: {cause}"
            remedy = _example_of_missing(name, str(cause))
        takes = f"The call is {name}{_shown(signature)}."
        raise CallError(f"{fact}.", remedy=f"{remedy}{takes}") from None


def _example_of_missing(name: str, cause: str) -> str:
    """Write a sentence with an example of a missing argument; '' if none is known.

    Args:
        name: the name of the function.
        cause: Python's own words, which have the names of missing arguments in quotes.
    """
    if "'readout'" in cause:
        return _as_sentence(_ANSWER)
    if "'pre'" in cause:
        return _as_sentence(_TWO_ANSWERS)
    if "'group'" in cause:
        return _as_sentence(_GROUP)
    if "'meta'" in cause:
        return _as_sentence(_HEADER)
    if name == "load" and "'model'" in cause:
        return _as_sentence(_LOADING)
    if name in _DECORATORS:
        return _as_sentence(_DECORATORS[name])
    return ""


def meant_parameters(keyword: str) -> Sequence[str]:
    """Return the parameters that a guessed keyword may mean, the likeliest first.

    Args:
        keyword: the keyword that was given.
    """
    return _SAME.get(keyword, ())


def _meant_keyword(keyword: str, parameters: Sequence[str]) -> str:
    """Write a sentence with the parameter or call that a keyword means; '' if none is known."""
    for meant in meant_parameters(keyword):
        if meant == "readout" and meant in parameters:
            return f"It is {meant}=: {_ANSWER}. "
        if meant == "sites" and meant in parameters:
            return 'It is sites=: names or globs, such as "blocks.20.*". '
        if meant in parameters:
            return f"It is {meant}=. "
    if keyword in _KEYWORDS_OF_TOP and "k" in parameters:
        return _as_sentence(_KEYWORDS_OF_TOP[keyword])
    if keyword in _KEYWORDS:
        return _as_sentence(_KEYWORDS[keyword])
    slip = difflib.get_close_matches(keyword, parameters, n=1, cutoff=_SLIP)
    meant = meaning(keyword)
    if meant is not None and not slip:
        return _as_sentence(meant.in_python)
    nearest = difflib.get_close_matches(keyword, parameters, n=1)
    return f"The nearest is {nearest[0]}=. " if nearest else ""


# Words that users say for a choice of an argument, with the choice that they mean.
_CHOICES: Mapping[str, str] = _alike(
    (
        "zero ablate ablation ablated remove removed removing knockout knock_out drop without loo "
        "lesion leave_out delete off disable minus loss_recovered noising",
        "leave_one_out",
    ),
    ("add added adding insert only alone keep on enable plus denoising one single", "add_one"),
    ("backward backwards vjp grad gradient backprop reverse_mode", "reverse"),
    ("jvp tangent dual forward_mode", "forward"),
    ("pos positions token tokens by_position", "position"),
    ("heads attention_head by_head", "head"),
    ("ranks component components singular by_rank", "rank"),
    ("layers block blocks by_layer", "layer"),
    ("kinds type types module_type projection", "kind"),
    ("sites module modules matrix", "site"),
    ("average avg mean_ablation", "mean"),
    ("random shuffle swap resampling resample_ablation permute corrupt noise", "resample"),
    ("zeros base none null nothing zero_ablation", "zero"),
)
# Words that are not a choice of this argument, and what does that instead.
_CHOSEN_ELSEWHERE: Mapping[tuple[str, str], str] = {
    ("how", "mean"): 'replace="mean" puts the mean over texts in the place of what a module writes',
    ("how", "resample"): 'replace="resample" puts what a module writes on other texts in its place',
    ("how", "noise"): 'replace="resample" puts what a module writes on other texts in its place',
    ("how", "zero"): 'replace="zero" is the default',
    ("at", "base"): "at=0.0 is the base model",
    ("at", "adapted"): "at=1.0 is the adapted model",
    ("at", "adapter"): "at=1.0 is the adapted model",
    ("scale", "base"): "scale=0.0 is the base model",
    ("scale", "adapted"): "scale=1.0 is the adapted model",
    ("group", "head"): 'by="head" of ll.first_order divides each number among heads',
    ("group", "heads"): 'by="head" of ll.first_order divides each number among heads',
    ("group", "position"): 'by="position" of ll.first_order divides each number among tokens',
    ("group", "token"): 'by="position" of ll.first_order divides each number among tokens',
    ("group", "rank"): 'by="rank" of ll.first_order divides each number among ranks',
}


def meant_choice(name: str, value: object, known: Iterable[str]) -> str:
    """Say which choice of an argument is meant by a word that is none of its choices.

    Args:
        name: the name of the argument.
        value: the value that was given.
        known: the choices.

    Returns:
        Whole sentences for the end of a message, each after a space; '' if nothing is known.
    """
    if not isinstance(value, str):
        return ""
    choices = list(known)
    written = value.strip().lower().replace("-", "_").replace(" ", "_")
    said = written if written in choices else _CHOICES.get(written)
    meant = f" {said!r} is meant." if said in choices else ""
    elsewhere = _CHOSEN_ELSEWHERE.get((name, written))
    return f"{meant} {elsewhere}." if elsewhere else meant


# The kinds of figure that pandas has, as in df.plot.bar().
_KINDS_OF_FIGURE = ("area", "bar", "barh", "box", "heatmap", "hist", "line", "pie", "scatter")


def refuse_kinds_of_figure(plot: Callable[..., Any]) -> None:
    """Make `result.plot.bar()` say that each result has its own figure.

    A method has the attributes of its function, so a call for each kind is set on the function.

    Args:
        plot: the function of the method.
    """

    def refused(*_: object, **__: object) -> Any:
        raise CallError(
            "each result has the figure that fits it, and takes no kind",
            remedy="call result.plot(); result.to_frame() is a pandas table, whose plot has kinds.",
        )

    for kind in _KINDS_OF_FIGURE:
        setattr(plot, kind, refused)


def _as_sentence(remedy: str) -> str:
    """End the remedy with a full stop and a space, and capitalise it unless it begins with code."""
    first_word, *_ = remedy.split()
    is_code = not first_word.rstrip(",:").isalpha()
    return f"{remedy}. " if is_code else f"{remedy[0].upper()}{remedy[1:]}. "


def _shown(signature: inspect.Signature) -> str:
    """Write the parameters as in a call; those with a default are written as 'name=…'."""
    shown: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in ("self", "cls"):
            continue
        if parameter.default is parameter.empty:
            shown.append(parameter.name)
        else:
            shown.append(f"{parameter.name}=…")
    return f"({', '.join(shown)})"
