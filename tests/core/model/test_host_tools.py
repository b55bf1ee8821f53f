"""TransformerLens's own tools within `lens.applied()`, beside the same tool on merged weights.

Each tool is a row of the table in `docs/host_tools.md`: equal to 1e-6, or refused. One that reads
weights is refused where the adapter changes them, and equal without.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from reference import peft_readout
from torch import Tensor
from transformer_lens import patching

import lens_lora as ll
from lens_lora.errors import ModelStateError

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-6
SEEN = 1e-3
BASE_S = "model's weights and biases are still the base's"
CLEAN = models.tokens(batch=1, pos=5)
CORRUPTED = models.tokens(batch=1, pos=5, seed=8)
BASES = models.tokens(batch=2, pos=5)
SOURCES = models.tokens(batch=2, pos=5, seed=8)
LAST = torch.tensor([4, 4])
PROCESSED = ("gpt2", "processed")
LLAMA = ("llama", "raw")
GEMMA = ("gemma2", "raw")
EVERY = (PROCESSED, LLAMA, GEMMA)
WITH_GATED = (*EVERY, ("llama", "processed"))  # whose MLP's own passes read its weights
EDGE_FLAGS = ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in")
UTILITIES = f"transformer_lens.{'utilities' if models.is_newest() else 'utils'}"
PAGE = Path(__file__).parents[3] / "docs" / "host_tools.md"
ANALYSIS: Any = None
with contextlib.suppress(ImportError):  # from transformer-lens 3 on
    ANALYSIS = importlib.import_module("transformer_lens.tools.analysis")
FLAG = r"cfg\.use_\w+ was False .* set it so before you make the lens"


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 9]).mean()


# --- the tools


@dataclasses.dataclass(frozen=True)
class Tool:
    """How a tool is run, and what is said of it.

    reads: kinds whose base weight it takes for the adapted one, or for which it is refused.
    refused: what our error says.
    of: a name in TransformerLens's `tools.analysis`, if only some lines of it have the tool.
    bridge_alone: whether it takes, or we can refuse it, on a TransformerBridge alone.
    """

    run: Callable[[Any], Tensor]
    reads: tuple[str, ...] = ()
    refused: str = ""
    on: tuple[tuple[str, str], ...] = EVERY
    weights_alone: bool = False  # no activation is in it
    of: str = ""
    bridge_alone: bool = False

    def is_there(self, cls: str) -> bool:
        """Whether this transformer-lens has the tool for models of this class."""
        if self.refused == FLAG and not models.is_newest():  # before, a tool that sets no flags
            return False
        has_tool = not self.of or hasattr(ANALYSIS, self.of)
        return has_tool and (cls == "TransformerBridge" or not self.bridge_alone)


OUT = ("o",)
DOWN = ("down", "fc_out")
HEAD = ("unembed",)


def analysis(name: str) -> Any:
    return getattr(ANALYSIS, name)


def cached(model: Any, tokens: Tensor = CLEAN, **options: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1]


def of_cache(method: str, *args: Any, **options: Any) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        cache = cached(model)
        if not hasattr(cache, method):
            pytest.skip(f"this ActivationCache has no {method}")
        return getattr(cache, method)(*args, **options)

    return run


def numbers(values: Iterable[Any]) -> Tensor:
    return torch.cat([torch.as_tensor(v, dtype=torch.float64).flatten() for v in values])


def every_activation(model: Any) -> Tensor:
    cache = cached(model)
    # Scores of later positions are −∞ in both models, and −∞ minus −∞ is no number.
    finite = [cache[name].masked_fill(cache[name].isneginf(), 0.0) for name in sorted(cache.keys())]
    return numbers(finite)


def head_results(model: Any) -> Tensor:
    cache = cached(model)
    cache.compute_head_results()
    return cache["blocks.0.attn.hook_result"]


def logit_attrs(model: Any) -> Tensor:
    cache = cached(model)
    return cache.logit_attrs(cache.decompose_resid(), tokens=5, incorrect_tokens=9)


def direct(unit: str) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        return analysis("direct_logit_attribution")(model, CLEAN, 5, 9, unit=unit).attribution

    return run


def logit_lens(model: Any) -> Tensor:
    return analysis("logit_lens")(model, CLEAN).values


def logit_readout(model: Any) -> Tensor:
    stream = cached(model)["blocks.1.hook_resid_post"]
    return analysis("logit_readout")(model, stream).values


def patched(name: str) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        with torch.no_grad():
            clean = cached(model, CLEAN[:, :3])
            return getattr(patching, name)(model, CORRUPTED[:, :3], clean, metric)

    return run


def direct_paths(name: str, *args: Any) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        tool = analysis(name)
        caches = [
            cached(model, tokens, names_filter=lambda name: name.endswith("hook_z"))
            for tokens in (CLEAN, CORRUPTED)
        ]
        with torch.no_grad():
            return tool(model, CORRUPTED, *caches, metric, *args, verbose=False)

    return run


def attribution_patch(granularity: str) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        config = analysis("EdgeAttributionConfig")(granularity=granularity)
        result = analysis("attribution_patch")(model, CLEAN, CORRUPTED, metric, config)
        return numbers([*result.node_scores.values(), *result.edge_scores.values()])

    return run


def faithfulness(mode: str) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        node = analysis("Node")
        circuit = [(node("embed", at), node("mlp_in", at, 0)) for at in range(5)]
        circuit += [(node("attn_head_out", 4, 0, h), node("logits", 4, 1)) for h in range(4)]
        means = {"mean_tokens": models.tokens(3, 5, seed=31)} if mode == "mean" else {}
        options = (circuit, analysis("FaithfulnessConfig")(mode))
        result = analysis("faithfulness")(model, CLEAN, CORRUPTED, metric, *options, **means)
        ends = (result.recovered, result.full_metric, result.corrupt_metric)
        return numbers([*ends, *result.edge_class_recovered.values()])

    return run


def task(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(tokens)[:, -1, [5, 9, 11]]


def collected(model: Any) -> Tensor:
    tool = analysis("collect_activations")
    return tool(model, "blocks.0.hook_out", BASES, task(model), positions=LAST)


def interchanged(name: str) -> Callable[[Any], Tensor]:
    """At what a site reads, down's input."""
    point = "blocks.1.mlp.hook_post"
    run_tool = name

    def run(model: Any) -> Tensor:
        collect = analysis("collect_activations")
        tool = analysis(run_tool)
        sources = collect(model, point, SOURCES, task(model), positions=LAST)
        swap = analysis("SubspaceInterchange")(analysis("random_basis")(sources.shape[1], 3, 0))
        options = (point, swap, BASES, sources, task(model))
        return tool(model, *options, positions=LAST).detach()

    return run


def das(model: Any) -> Tensor:
    point = "blocks.1.mlp.hook_post"
    labels = torch.tensor([0, 1])
    where = {"base_positions": LAST, "source_positions": LAST}
    fit = analysis("fit_das")
    result = fit(model, point, BASES, SOURCES, labels, task(model), rank=2, epochs=3, **where)
    return numbers([result.basis, result.losses])


def jacobian(read: Callable[[Any, Any], Any]) -> Tool:
    def run(model: Any) -> Tensor:
        prompts = ["w10 w11 w12 w13 w14 w15", "w20 w21 w42 w23 w24"]
        options = {"corpus": "two", "skip_first_positions": 1, "show_progress": False}
        return numbers([read(analysis("JacobianLens").fit(model, prompts, **options), model)])

    on = (("gpt2", "raw"), LLAMA, GEMMA)
    return Tool(run, reads=HEAD, on=on, of="JacobianLens", bridge_alone=True)


def coordinate_patch(lens: Any, model: Any) -> Tensor:
    source = int(lens.decompose(model, CLEAN, 0, position=3, k=3).support[0])
    target = 5 if source != 5 else 9
    return lens.coordinate_patch(model, CLEAN, 0, source, target, position=3, k=3).patched


def occupancy(lens: Any, model: Any) -> Tensor:
    options = {"max_atoms": 3, "num_control_dictionaries": 2}
    found = vars(lens.occupancy(model, CLEAN, 0, position=3, **options)).values()
    return numbers(v for v in found if isinstance(v, (Tensor, int, float)))


def steered(name: str, *tokens: Any) -> Callable[[Any, Any], Tensor]:
    def read(lens: Any, model: Any) -> Tensor:
        with torch.no_grad():
            return model.run_with_hooks(CLEAN, fwd_hooks=getattr(lens, name)(model, *tokens, [0]))

    return read


def affinity(model: Any) -> Tensor:
    tool = analysis("attention_head_subspace_affinity")
    return numbers(tool(model, target_role=role, layer_order="all").scores for role in "QKV")


def kernel(model: Any) -> Tensor:
    subspace = analysis("orthonormal_subspace")
    cache = cached(model)
    ends = [subspace(cache[f"blocks.{i}.hook_resid_post"][0].T, rank=2) for i in (0, 1)]
    return numbers([analysis("projection_kernel")(*ends).score])


def probe(model: Any) -> Tensor:
    tokens = models.tokens(12, 5, seed=77)
    labels = torch.tensor([0, 1] * 6)
    features = cached(model, tokens)["blocks.1.hook_resid_post"][:, -1]
    result = analysis("fit_sparse_probe")(features, labels, k=3, seed=0)
    return numbers([v for v in vars(result).values() if isinstance(v, Tensor)])


def detected(model: Any) -> Tensor:
    from transformer_lens.head_detector import detect_head

    return detect_head(model, "w5 w6 w5 w6 w7", "previous_token_head")


def next_tokens(name: str, **cache: Any) -> Callable[[Any], Tensor]:
    def run(model: Any) -> Tensor:
        if not hasattr(model, name):
            pytest.skip(f"this host has no {name}")
        tokens = models.tokens(batch=3, pos=4, seed=21)
        return getattr(model, name)(tokens, max_new_tokens=6, do_sample=False, **cache)

    return run


def loss(model: Any) -> Tensor:
    return model(CLEAN, return_type="loss").reshape(1)


def answer(model: Any) -> Tensor:
    test_prompt = importlib.import_module(UTILITIES).test_prompt
    with contextlib.redirect_stdout(io.StringIO()) as said:
        test_prompt("w5 w6 w7", "w9", model, prepend_space_to_answer=False)
    return torch.tensor([float(number) for number in re.findall(r"\d+\.\d+", said.getvalue())])


def singular(model: Any) -> Tensor:
    from transformer_lens.SVDInterpreter import SVDInterpreter

    vectors = SVDInterpreter(model).get_singular_vectors
    return numbers([vectors("OV", 0, 2, head_index=0), vectors("w_out", 0, 2)])


def gradients(model: Any) -> Tensor:
    cache = model.run_with_cache(CLEAN, incl_bwd=True, return_type="loss")[1]
    return numbers(cache[name] for name in sorted(cache.keys()) if name.endswith("_grad"))


ATTENTION = ("q", "k", "v", "o")
AT_INPUT = "a backward hook is on the point at which"
TOOLS = {
    "run_with_cache": Tool(every_activation),
    "accumulated_resid": Tool(of_cache("accumulated_resid", apply_ln=True)),
    "decompose_resid": Tool(of_cache("decompose_resid")),
    "stack_activation": Tool(of_cache("stack_activation", "z")),
    "apply_ln_to_stack": Tool(lambda m: cached(m).apply_ln_to_stack(cached(m).decompose_resid())),
    **{
        f"get_act_patch_{name}": Tool(patched(f"get_act_patch_{name}"))
        for name in (
            *("resid_pre", "resid_mid", "attn_out", "mlp_out", "block_every"),
            "attn_head_all_pos_every",
        )
    },
    **{
        f"get_act_patch_{name}": Tool(patched(f"get_act_patch_{name}"), on=(LLAMA,))
        for name in ("attn_head_by_pos_every", "attn_head_pattern_dest_src_pos")
    },
    "detect_head": Tool(detected),
    "generate": Tool(next_tokens("generate", use_past_kv_cache=False, verbose=False)),
    "hf_generate": Tool(next_tokens("hf_generate", use_cache=False)),
    "test_prompt": Tool(answer),
    'model(…, return_type="loss")': Tool(loss),
    "collect_activations": Tool(collected, of="collect_activations"),
    "run_with_intervention": Tool(
        interchanged("run_with_intervention"), of="run_with_intervention"
    ),
    "intervened_logits": Tool(interchanged("intervened_logits"), of="intervened_logits"),
    "fit_das": Tool(das, of="fit_das"),
    "projection_kernel": Tool(kernel, of="projection_kernel"),
    "fit_sparse_probe": Tool(probe, of="fit_sparse_probe"),
    "JacobianLens.fit": dataclasses.replace(jacobian(lambda j, m: j.jacobians[0]), reads=()),
    # of W_U
    'direct_logit_attribution(unit="component")': Tool(
        direct("component"), on=(PROCESSED,), of="direct_logit_attribution"
    ),
    'direct_logit_attribution(unit="layer")': Tool(
        direct("layer"), on=(PROCESSED,), of="direct_logit_attribution"
    ),
    "logit_lens": Tool(logit_lens, of="logit_lens"),
    "logit_readout": Tool(logit_readout, reads=HEAD, of="logit_readout"),
    "logit_attrs": Tool(logit_attrs, reads=HEAD),
    "tokens_to_residual_directions": Tool(
        lambda m: m.tokens_to_residual_directions(torch.tensor([5, 9])),
        HEAD,
        weights_alone=True,
    ),
    "JacobianLens.readout": jacobian(
        lambda j, m: j.readout(m, CLEAN, return_full_logits=True).lens_logits[0]
    ),
    "JacobianLens.lens_vectors": jacobian(lambda j, m: j.lens_vectors(m, [5, 9], 0)),
    "JacobianLens.lens_vector_dictionary": jacobian(lambda j, m: j.lens_vector_dictionary(m, 0)),
    "JacobianLens.decompose": jacobian(
        lambda j, m: j.decompose(m, CLEAN, 0, position=3, k=3).reconstruction
    ),
    "JacobianLens.coordinate_patch": jacobian(coordinate_patch),
    "JacobianLens.occupancy": jacobian(occupancy),
    "JacobianLens.fraction_of_variance": jacobian(
        lambda j, m: j.fraction_of_variance(m, [CLEAN], k=3, skip_first=1).per_position[0]
    ),
    "JacobianLens.steering_hooks": jacobian(steered("steering_hooks", 5)),
    "JacobianLens.ablation_hooks": jacobian(steered("ablation_hooks", [5])),
    "JacobianLens.swap_hooks": jacobian(steered("swap_hooks", 5, 9)),
    # of W_O, W_out and biases
    'direct_logit_attribution(unit="head")': Tool(
        direct("head"), reads=OUT, on=(PROCESSED,), of="direct_logit_attribution"
    ),
    "stack_head_results": Tool(of_cache("stack_head_results"), reads=OUT),
    "compute_head_results": Tool(head_results, reads=OUT),
    "get_neuron_results": Tool(of_cache("get_neuron_results", 0), reads=DOWN, on=WITH_GATED),
    "stack_neuron_results": Tool(of_cache("stack_neuron_results", 1), reads=DOWN, on=WITH_GATED),
    "get_full_resid_decomposition": Tool(
        of_cache("get_full_resid_decomposition"), reads=(*OUT, *DOWN), on=(LLAMA, GEMMA)
    ),
    "W_O": Tool(lambda m: m.W_O, OUT, weights_alone=True),
    "OV": Tool(lambda m: m.OV.AB, ("v", "o"), weights_alone=True),
    "QK": Tool(lambda m: m.QK.AB, ("q", "k"), weights_alone=True),
    "all_composition_scores": Tool(
        lambda m: m.all_composition_scores("V").scores, ATTENTION, weights_alone=True
    ),
    "accumulated_bias": Tool(
        lambda m: m.accumulated_bias(2), ATTENTION, on=(PROCESSED,), weights_alone=True
    ),
    # On a HookedTransformer it walks named_parameters(), where nothing can be refused.
    "SVDInterpreter": Tool(singular, ("v", *OUT, *DOWN), weights_alone=True, bridge_alone=True),
    "attention_head_subspace_affinity": Tool(
        affinity,
        ATTENTION,
        weights_alone=True,
        of="attention_head_subspace_affinity",
        bridge_alone=True,
    ),
    # refused, unless the adapter leaves out what is named
    'attribution_patch(granularity="node")': Tool(
        attribution_patch("node"), OUT, AT_INPUT, of="attribution_patch"
    ),
    'attribution_patch(granularity="edge")': Tool(
        attribution_patch("edge"), ATTENTION, FLAG, on=(PROCESSED,)
    ),
    'faithfulness(ablation="corrupt")': Tool(faithfulness("corrupt"), OUT, FLAG, on=(PROCESSED,)),
    'faithfulness(ablation="mean")': Tool(faithfulness("mean"), OUT, FLAG, on=(PROCESSED,)),
    "get_act_patch_direct_path": Tool(
        direct_paths("get_act_patch_direct_path", 0, 1), OUT, FLAG, on=(PROCESSED, LLAMA)
    ),
    "get_act_patch_direct_path_all_sources": Tool(
        direct_paths("get_act_patch_direct_path_all_sources"), OUT, FLAG, on=(PROCESSED, LLAMA)
    ),
    "run_with_cache(incl_bwd=True)": Tool(gradients, refused=AT_INPUT),
}


# --- the adapted model beside the merged one


@functools.cache
def pair(
    cls: str,
    family: str,
    flags: str,
    left_out: tuple[str, ...] = (),
    head: bool = False,
    set_before: tuple[str, ...] = (),
) -> tuple[ll.LoraLens, Any]:
    """A lens of an adapter on attention and MLP, less some kinds, and the merged model."""

    def made(hf_model: Any) -> Any:
        model = models.MAKERS[cls](hf_model.requires_grad_(True), **cases.FLAGS[flags])
        for flag in set_before:
            getattr(model, f"set_{flag}")(True)
        return model

    base = models.hf_model(family)
    targets = [*models.LINEARS[family], "lm_head"] if head else None
    peft = models.peft_model(family, base, targets=targets)
    lens = ll.LoraLens(made(base), ll.Adapter.from_peft(peft), hf_model=base)
    modules = {site.module for site in lens.sites if site.kind in left_out}
    if modules:
        lens = lens.with_adapter(lens.adapter.without_modules(*modules))
    for module in modules:
        cases.set_peft_scale(peft, module, 0.0)
    merged = copy.deepcopy(peft).merge_and_unload()
    merged.config.architectures = base.config.architectures
    return lens, made(merged)


def errors(run: Callable[[Any], Tensor], lens: ll.LoraLens, merged: Any) -> tuple[float, float]:
    """How far a tool is from what it says of the merged model: within the block, on the base."""
    expected = on_merged(run, merged)
    with lens.applied() as model:
        adapted = run(model)
    base = run(lens.model)
    return (
        largest_difference(adapted, expected),
        largest_difference(base, expected),
    )


def on_merged(run: Callable[[Any], Tensor], merged: Any) -> Tensor:
    """Skipped where an older host has the tool for other models only."""
    try:
        return run(merged)
    except (ValueError, NotImplementedError, TypeError, AttributeError, KeyError) as error:
        if models.is_newest():
            raise
        pytest.skip(f"this host has no such tool for this model: {error}")


def chosen(condition: Callable[[Tool], bool]) -> list[tuple[str, str]]:
    """(class, tool) of each tool that this transformer-lens has for the class."""
    return [
        (cls, name)
        for cls in models.MAKERS
        for name, tool in TOOLS.items()
        if condition(tool) and tool.is_there(cls)
    ]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("cls", "name"), chosen(lambda t: not t.refused and t.reads in ((), HEAD)))
def test_a_tool_of_activations_is_that_of_the_merged_model(name: str, cls: str):
    """With LoRA on every linear module of attention and MLP."""
    tool = TOOLS[name]
    for family, flags in tool.on:
        adapted, base = errors(tool.run, *pair(cls, family, flags))
        assert adapted < EXACT, (family, flags)
        assert base > SEEN or tool.weights_alone, (family, flags)


@pytest.mark.sample(2)
@pytest.mark.parametrize(("cls", "name"), chosen(lambda t: not t.refused and bool(t.reads)))
def test_a_tool_of_weights_is_refused(name: str, cls: str):
    """Where the adapter changes what it reads; equal where it does not."""
    tool = TOOLS[name]
    for family, flags in tool.on:
        if tool.reads == HEAD and family != "llama":
            continue
        lens, merged = pair(cls, family, flags, head=tool.reads == HEAD)
        on_merged(tool.run, merged)
        with (
            pytest.raises((ModelStateError, ValueError), match=BASE_S),  # or it words ours
            lens.applied() as model,
        ):
            tool.run(model)
        if not tool.weights_alone:
            adapted, base = errors(tool.run, *pair(cls, family, flags, left_out=tool.reads))
            assert adapted < EXACT, (family, flags)
            assert base > SEEN, (family, flags)


@pytest.mark.sample(1)
@pytest.mark.parametrize(("cls", "name"), chosen(lambda t: bool(t.refused)))
def test_a_tool_that_cannot_be_right_is_refused(name: str, cls: str):
    """By name, with a remedy; without the kinds that it reads it is right."""
    tool = TOOLS[name]
    before = EDGE_FLAGS if tool.refused == FLAG else ()
    for family, flags in tool.on:
        lens, merged = pair(cls, family, flags)
        on_merged(tool.run, merged)
        with (
            pytest.raises(ModelStateError, match=f"{tool.refused}|{BASE_S}"),
            lens.applied() as model,
        ):
            tool.run(model)
        if tool.reads:
            left = pair(cls, family, flags, left_out=tool.reads, set_before=before)
            adapted, base = errors(tool.run, *left)
            assert adapted < EXACT and base > SEEN, (family, flags)


# --- what is refused, and why


@models.NEEDS_NEWEST
@pytest.mark.parametrize(
    "name", ['faithfulness(ablation="corrupt")', 'attribution_patch(granularity="edge")']
)
def test_results_by_head_are_refused_where_o_is_adapted(name: str):
    """hook_result holds z W_O; the flags are set before, so that this is the reason."""
    lens, merged = pair("TransformerBridge", *PROCESSED, set_before=EDGE_FLAGS)
    TOOLS[name].run(merged)
    with (
        pytest.raises(
            ModelStateError, match="hook_result: lies between .* 'default' .*merge_and_un"
        ),
        lens.applied() as model,
    ):
        TOOLS[name].run(model)


@models.NEEDS_NEWEST
def test_direct_paths_of_an_adapted_o_are_refused():
    """With the flag set before the lens, too; outside of a block the base's W_O is there."""
    lens, _ = pair("TransformerBridge", *PROCESSED, set_before=("use_split_qkv_input",))
    tool = TOOLS["get_act_patch_direct_path"].run
    with pytest.raises(ModelStateError, match=BASE_S), lens.applied() as model:
        tool(model)
    tool(lens.model)
    with pytest.raises(ZeroDivisionError), lens.applied(), lens.applied(0.5):
        raise ZeroDivisionError
    assert lens.model.blocks[0].attn.o.weight is not None


@models.NEEDS_NEWEST
def test_a_bias_that_an_update_of_v_would_be_folded_into_is_refused():
    """Of o, which has no update itself."""
    base = models.hf_model("gpt2")
    peft = models.peft_model("gpt2", base, targets=["c_attn"])
    model = models.bridge(base, **cases.FLAGS["processed"])
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft), hf_model=base)
    with lens.applied():
        assert model.blocks[0].attn.o.weight is not None
        with pytest.raises(ModelStateError, match=rf"blocks\.0\.attn\.v: .*{BASE_S}"):
            model.accumulated_bias(1)
    model.accumulated_bias(1)


@models.NEEDS_NEWEST
@pytest.mark.parametrize("name", ["logit_lens", 'direct_logit_attribution(unit="component")'])
def test_readouts_of_an_adapted_head_are_refused(name: str):
    """They read W_U."""
    family, flags = ("gemma", "processed") if "direct" in name else LLAMA
    lens, merged = pair("TransformerBridge", family, flags, head=True)
    TOOLS[name].run(merged)
    with lens.applied() as model, pytest.raises(ModelStateError, match=BASE_S):
        TOOLS[name].run(model)


@models.NEEDS_BRIDGE
def test_the_model_s_own_readout_has_an_adapted_head():
    """What the page names in place of tools that read W_U."""
    lens, merged = pair("TransformerBridge", *LLAMA, head=True)

    def read(model: Any) -> Tensor:
        return model.unembed(model.ln_final(cached(model)["blocks.0.hook_resid_post"]))

    adapted, base = errors(read, lens, merged)
    assert adapted < EXACT
    assert base > SEEN


def only(cls: str, *kinds: str, family: str = "gpt2") -> tuple[ll.LoraLens, Any]:
    every = (*ATTENTION, "fc_in", "fc_out", "gate", "up", "down")
    return pair(cls, family, "raw", left_out=tuple(k for k in every if k not in kinds))


@models.NEEDS_BRIDGE
def test_a_flag_set_within_the_block_is_refused():
    """Under use_attn_result a bridge never fires o's own output hook: its update would be lost."""
    lens, _ = only("TransformerBridge", "o")
    model = lens.model
    tokens = models.tokens()
    with lens.applied(), torch.no_grad():
        model(tokens)
        model.set_use_attn_result(True)
        try:
            with pytest.raises(ModelStateError, match="cfg.use_attn_result was False"):
                model(tokens)
        finally:
            model.set_use_attn_result(False)
        model(tokens)


def test_points_without_the_update_are_refused_in_a_block(cls: str):
    """Whoever hooks them: a cache, a hook of the caller's, a backward hook; and left out, not."""
    base = models.hf_model("gpt2")
    model = models.MAKERS[cls](base)
    model.set_use_attn_result(True)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    tokens = models.tokens()
    name = "blocks.1.attn.hook_result"
    point = model.hook_dict[name]
    refused = pytest.raises(ModelStateError, match="hook_result: lies between.*names_filter")
    mine = [(name, lambda tensor, hook: None)]
    with refused, lens.applied():
        model.run_with_cache(tokens)
    with refused, lens.applied():
        model.run_with_hooks(tokens, fwd_hooks=mine)
    with refused:
        model.run_with_hooks(tokens, fwd_hooks=[*lens.fwd_hooks(), *mine])
    with refused, lens.applied(), lens.applied(), model.hooks(bwd_hooks=mine):
        model(tokens)
    assert not point._forward_hooks
    assert not point._backward_hooks
    with refused:
        ll.tangents(lens, tokens, name)
    assert not [n for n in ll.tangents(lens, tokens) if n.endswith("hook_result")]
    with lens.applied(), lens.applied():
        cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_attn_out"))[1]
    assert len(cache) == 2


@models.NEEDS_NEWEST
@pytest.mark.parametrize("left_out", [(), OUT], ids=["with o", "v's constant alone"])
def test_the_sum_of_the_heads_before_the_update(left_out: tuple[str, ...]):
    """hook_hidden_states under use_attn_result, where δ of o, or v's constant, is added later."""
    lens, _ = pair("TransformerBridge", *PROCESSED, left_out, set_before=("use_attn_result",))
    for name in ("blocks.0.attn.hook_hidden_states", "*.hook_hidden_states"):
        with pytest.raises(ModelStateError, match="hidden_states: lies between"):
            ll.patch_activations(lens, CLEAN, ll.Margin(5, 9), name, progress=False)


def test_a_gradient_at_a_site_s_input(cls: str):
    """A backward hook would lack δ's part. A hook that keeps and returns the tensor does not."""
    lens, merged = pair(cls, *LLAMA)
    name = "blocks.1.attn.hook_z"
    hooked: list[Tensor] = []
    with merged.hooks(bwd_hooks=[(name, lambda grad, hook: hooked.append(grad.clone()) or None)]):
        metric(merged(CLEAN)).backward()
    kept: list[Tensor] = []

    def keep(tensor: Tensor, hook: Any) -> Tensor:
        kept.append(tensor)
        return tensor

    with lens.applied() as model, model.hooks(fwd_hooks=[(name, keep)]):
        (found,) = torch.autograd.grad(metric(model(CLEAN)), kept)
    assert largest_difference(found, hooked[0]) < EXACT
    with lens.applied() as model, model.hooks(bwd_hooks=[(name, lambda grad, hook: None)]):
        with pytest.raises(ModelStateError, match=AT_INPUT + r" blocks.1.attn.o reads"):
            model(CLEAN)
        with torch.no_grad():
            model(CLEAN)


# --- PatchingResult


def by_row(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


@models.NEEDS_NEWEST
@pytest.mark.parametrize("direction", ["adapted_to_base", "base_to_adapted"])
def test_patched_activations_as_transformer_lens_has_them(direction: str):
    """Its own patching of one model with the cache of the other gives the same result."""
    lens, merged = pair("TransformerBridge", *LLAMA)
    tokens = models.tokens(batch=3, pos=4)
    donor, recipient = (merged, lens.model)[:: 1 if direction == "adapted_to_base" else -1]
    with torch.no_grad():
        expected = patching.get_act_patch_resid_pre(
            recipient, tokens, cached(donor, tokens), by_row, reduce="none", baseline=True
        )
        other_end = by_row(donor(tokens))
    names = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    options = {"progress": False}
    effects = ll.patch_activations(
        lens, tokens, ll.Margin(5, 9), names, direction=direction, positions="each", **options
    )
    found = effects.to_patching_result()
    assert type(found) is type(expected)
    assert found.axis_names == ["name", "pos"]
    assert list(found.index_df["layer"]) == list(expected.index_df["layer"])
    assert list(found.index_df["pos"]) == list(expected.index_df["pos"])
    for read in ("mean", "stderr", "effect", "permutation_pvalue"):
        ours = getattr(found, read)()
        theirs = getattr(expected, read)()
        assert largest_difference(ours, theirs) < EXACT, read
    assert largest_difference(found.values, expected.values) < EXACT
    assert largest_difference(found.baseline, expected.baseline) < EXACT
    assert largest_difference(found.normalized(other_end), effects.share.movedim(0, -1)) < EXACT
    assert found.effect().abs().max() > SEEN
    columns = ["metric", "name", "layer", "hook", "pos", "example", "value"]
    assert list(found.to_dataframe()) == columns
    assert len(found.to_dataframe()) == 2 * 4 * 3
    whole = ll.patch_activations(
        lens, tokens, ll.Margin(5, 9), names, direction=direction, **options
    ).to_patching_result()
    assert whole.axis_names == []
    assert whole.values.shape == (2, 3)
    assert whole.metric_names == [effects.readout] == whole.to_dataframe()["metric"].unique()


@models.NEEDS_NEWEST
@pytest.mark.parametrize("how", ["add_one", "leave_one_out"])
def test_switched_sites_as_transformer_lens_has_them(how: str):
    """Patched readout, baseline and other end are those of PEFT with one module on, or off."""
    case = cases.case("llama", "TransformerBridge", "raw")
    tokens = models.tokens(batch=3, pos=4)
    effects = ll.patch_sites(case.lens, tokens, ll.Margin(5, 9), how, progress=False)
    found = effects.to_patching_result()
    assert list(found.index_df.columns) == ["group", "layer", "kind"]
    modules = [site.module for site in case.lens.sites]
    before, after = (0.0, 1.0) if how == "add_one" else (1.0, 0.0)

    def run(factors: dict[str, float]) -> Tensor:
        factors = dict.fromkeys(modules, before) | factors
        return peft_readout(case.peft, tokens, lambda logits: by_row(logits[:, None]), factors)

    expected = torch.stack([run({module: after}) for module in modules])
    assert largest_difference(found.values, expected) < EXACT
    assert largest_difference(found.baseline, run({})) < EXACT
    share = found.normalized(run(dict.fromkeys(modules, after)))
    assert largest_difference(share, effects.share.T) < EXACT
    assert found.effect().abs().max() > SEEN
    low, high = found.bootstrap_ci(of_effect=True)
    assert bool((low <= high).all())
    assert found.stderr().shape == (len(modules),)
    assert list(found.to_dataframe()["group"].unique()) == list(effects.groups)


@models.NEEDS_NEWEST
def test_patching_results_of_groups_and_short_prompts():
    """Groups have no layer of their own, a position that a prompt lacks is NaN."""
    lens = cases.case("llama", "TransformerBridge", "raw").lens
    margin = ll.Margin(5, 9)
    by_kind = ll.patch_sites(lens, BASES, margin, group="kind", progress=False)
    assert list(by_kind.to_patching_result().index_df) == ["group"]
    prompts = ll.results.Prompts(BASES, torch.tensor([5, 3]))
    each = ll.patch_activations(
        lens, prompts, margin, "blocks.1.hook_resid_pre", positions="each", progress=False
    ).to_patching_result()
    assert each.values[0, 3:, 1].isnan().all()
    assert not each.values[0, :, 0].isnan().any()
    ranks = ll.patch_sites(lens, BASES, margin, of="rank", sites="*.q", progress=False)
    assert ranks.to_patching_result().values.shape == (len(ranks.groups), 2)


def test_what_is_no_patching_result(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    margin = ll.Margin(5, 9)
    replaced = ll.patch_sites(
        lens, BASES, margin, replace="mean", texts=SOURCES, group="kind", progress=False
    )
    with pytest.raises(ll.errors.ArgumentError, match="add_one with replace='mean'.*baseline"):
        replaced.to_patching_result()
    if not models.is_newest():
        effects = ll.patch_sites(lens, BASES, margin, group="kind", progress=False)
        with pytest.raises(ll.errors.LensLoraError, match=r"before 4\.3 has no PatchingResult"):
            effects.to_patching_result()


# --- the page


WITHOUT_MODEL = {
    *("EdgeAttributionConfig", "FaithfulnessConfig", "Node"),
    *("LearnedSubspace", "NormMatchedPlacebo", "SubspaceInterchange", "arbitrary_targets"),
    *("mean_difference_basis", "neuron_basis", "probe_basis", "random_basis"),
    *("random_neuron_basis", "SubspaceBasis", "orthonormal_subspace"),
    *("random_projection_kernel_moments", "SparseProbeConvergenceError", "sweep_sparse_probe"),
    *("JSpaceDecomposition", "get_sparse_decomposition", "solve_coordinate_patch"),
    *("random_init_bridge", "reinitialized"),  # they make models of their own, without training
}


@models.NEEDS_NEWEST
def test_no_tool_is_forgotten():
    from transformer_lens.tools import analysis

    tested = {re.split(r"[(.]", name)[0] for name in TOOLS}
    assert set(analysis.__all__) <= tested | WITHOUT_MODEL
    every = {"attn_head_all_pos_every", "attn_head_by_pos_every", "block_every"}
    covered = tested | {f"get_act_patch_{name}" for name in every}
    sweeps = {name for name in dir(patching) if name.startswith("get_act_patch_")}
    single = {name for name in sweeps if re.search(r"_(out|q|k|v|pattern)_(by|all)_pos$", name)}
    assert sweeps - single <= covered  # the `*_every` run those


def test_the_page_says_what_was_tested():
    """Every tool here is in the table, and nothing else is; with what is said of it."""
    said = dict[str, str]()
    table = PAGE.read_text().split("| tool | within `lens.applied()` |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        names, verdict = row.split("|")[1:3]
        said |= dict.fromkeys(re.findall("`([^`]+)`", names), verdict)
    assert set(said) == set(TOOLS)
    for name, tool in TOOLS.items():
        assert ("refused" in said[name]) == bool(tool.refused or tool.reads), name
