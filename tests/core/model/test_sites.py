"""Sites: the adapter's modules by the model's own names, or a refusal that says what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools

import models
import pytest
import torch
from differences import largest_difference
from torch import nn

import lens_lora as ll
from lens_lora.errors import AdapterError, ModelStateError, SiteError
from lens_lora.families import find_family

CLASSES = list(models.MAKERS)


@functools.cache
def base(family: str):
    return models.hf_model(family)


@functools.cache
def adapter(family: str) -> ll.Adapter:
    return ll.Adapter.from_peft(models.peft_model(family, base(family)))


@functools.cache
def shared(cls: str, family: str = "llama"):
    """A hooked model that no test changes."""
    return models.MAKERS[cls](base(family))


def fresh(cls: str, family: str = "llama", **flags):
    return models.MAKERS[cls](base(family), **flags)


def factors(into: int, out: int, rank: int = 2) -> ll.LoRAFactors:
    generator = models.seeded(into + out)
    A = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    return ll.LoRAFactors(A, torch.randn(out, rank, generator=generator, dtype=torch.float64))


def hooks_of(model) -> int:
    return sum(len(p._forward_hooks) + len(p.fwd_hooks) for p in model.hook_dict.values())


def refusal(model, adapted: ll.Adapter, kind: type[ll.errors.LensLoraError], hf_model=None) -> str:
    """The message of the refusal, before any hook was put on the model."""
    with pytest.raises(kind) as caught:
        ll.LoraLens(model, adapted, hf_model=hf_model)
    assert type(caught.value) is kind
    if hasattr(model, "hook_dict"):
        assert hooks_of(model) == 0
    return str(caught.value)


# --- names and order

QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
GATED = [*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
FUSED = ["query_key_value"] * 3 + ["dense"]
DENSE = ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
SITES = {
    "gpt2": ("transformer.h.{}.", ["attn.c_attn"] * 3 + ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "gpt_neo": (
        "transformer.h.{}.",
        [f"attn.attention.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.c_fc", "mlp.c_proj"],
    ),
    "gptj": (
        "transformer.h.{}.",
        [f"attn.{n}_proj" for n in ("q", "k", "v", "out")] + ["mlp.fc_in", "mlp.fc_out"],
    ),
    "neox": ("gpt_neox.layers.{}.", [f"attention.{n}" for n in FUSED] + DENSE),
    "bloom": ("transformer.h.{}.", [f"self_attention.{n}" for n in FUSED] + DENSE),
    "opt": ("model.decoder.layers.{}.", [*QKV, "self_attn.out_proj", "fc1", "fc2"]),
    "phi": ("model.layers.{}.", [*QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "phi3": (
        "model.layers.{}.",
        ["self_attn.qkv_proj"] * 3
        + ["self_attn.o_proj", "mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    ),
    "mixtral": ("model.layers.{}.", [*QKV, "self_attn.o_proj"]),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
        ("model.layers.{}.", GATED),
    ),
}
ATTENTION = ["attn.q", "attn.k", "attn.v", "attn.o"]
NAMES = {  # by the number of sites in a layer
    4: ATTENTION,
    6: [*ATTENTION, "mlp.fc_in", "mlp.fc_out"],
    7: [*ATTENTION, "mlp.gate", "mlp.up", "mlp.down"],
}


def test_every_family_is_listed():
    assert set(SITES) == set(models.FAMILIES)


# HookedTransformer reads a field of Phi's config that transformers 5 moved.
NOT_BUILT: set[tuple[str, str]] = set()
if models.major_version("transformers") >= 5:
    NOT_BUILT.add(("phi", "HookedTransformer"))
BUILT = [(f, c) for f in SITES for c in CLASSES if (f, c) not in NOT_BUILT]


@pytest.mark.sample(8)
@pytest.mark.parametrize("family, cls", BUILT)
def test_names_and_order(family, cls):
    """One site for each linear map, those of a fused one apart, in the forward pass's order."""
    prefix, modules = SITES[family]
    names = NAMES[len(modules)]
    lens = ll.LoraLens(shared(cls, family), adapter(family))
    assert [s.name for s in lens.sites] == [f"blocks.{i}.{n}" for i in (0, 1) for n in names]
    assert [s.module for s in lens.sites] == [prefix.format(i) + m for i in (0, 1) for m in modules]
    for site in lens.sites:
        assert site.name.startswith(f"blocks.{site.layer}.")
        assert site.name.endswith(site.kind)
        assert site.rank == 3
    assert len({s.write for s in lens.sites}) == len(lens.sites)
    assert lens.class_name == cls


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_order_is_that_of_the_forward_pass(family, cls):
    """Where blocks are sequential, write points fire in the order of the sites.

    q, k, v among themselves and gate, up among themselves are side by side.
    """
    lens = ll.LoraLens(shared(cls, family), adapter(family))
    fired: list[str] = []
    hooks = [(s.write, lambda x, hook, name=s.name: fired.append(name)) for s in lens.sites]
    lens.model.run_with_hooks(models.tokens(1, 3), fwd_hooks=hooks)
    stage = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "fc_in": 2}
    order = [(int(n.split(".")[1]), stage.get(n.rpartition(".")[2], 3)) for n in fired]
    assert sorted(fired) == sorted(s.name for s in lens.sites)
    assert order == sorted(order)
    assert order == [(s.layer, stage.get(s.kind, 3)) for s in lens.sites]


@pytest.mark.parametrize("cls", CLASSES)
def test_only_what_the_adapter_adapts(cls):
    lens = ll.LoraLens(shared(cls), adapter("llama").only("*.1.*v_proj", "*.0.mlp.down_proj"))
    assert [s.name for s in lens.sites] == ["blocks.0.mlp.down", "blocks.1.attn.v"]


# --- gates by name


@pytest.fixture(params=CLASSES)
def lens(request) -> ll.LoraLens:
    """Sites q, v, gate of two layers."""
    chosen = adapter("llama").only("*.q_proj", "*.v_proj", "*.gate_proj")
    return ll.LoraLens(shared(request.param), chosen)


GATES = {
    "number": (0.5, [0.5] * 6),
    "whole number": (2, [2] * 6),
    "scalar tensor": (torch.tensor(0.25), [0.25] * 6),
    "tensor": (torch.arange(6), [0, 1, 2, 3, 4, 5]),
    "name": ({"blocks.1.attn.q": 2.0}, [0, 0, 0, 2, 0, 0]),
    "glob": ({"*.attn.v": -1}, [0, -1, 0, 0, -1, 0]),
    "layer": ({"blocks.0.*": 1, "blocks.1.mlp.gate": 3}, [1, 1, 1, 0, 0, 3]),
    "later wins": ({"*": 1, "*.q": 0, "blocks.1.attn.q": 0.5}, [0, 1, 1, 0.5, 1, 1]),
    "earlier loses": ({"blocks.0.attn.q": 5, "*": 1}, [1] * 6),
    "class of characters": ({"blocks.[0]*.[qv]": 1}, [1, 1, 0, 0, 0, 0]),
    "no name": ({}, [0] * 6),
}


@pytest.mark.parametrize("scale, expected", GATES.values(), ids=GATES)
def test_gates(lens, scale, expected):
    """A number for all sites; a tensor as it is; names and globs: later keys win, others 0."""
    gates = lens.gates(scale)
    assert gates.dtype == lens.gate_dtype
    assert gates.tolist() == expected


def test_gates_per_prompt(lens):
    gates = torch.arange(12.0).view(2, 6)
    assert torch.equal(lens.gates(gates), gates.to(lens.gate_dtype))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "scale, message",
    [
        ({"blocks.0.attn.k": 1}, r"'blocks.0.attn.k' matches no site.*'blocks.0.attn.[qv]'"),
        ({"*": 1, "blocks.7.*": 0}, r"'blocks.7.\*' matches no site; the nearest are \['blocks"),
        (
            {"model.layers.7.self_attn.q_proj": 1},
            r"matches no site.*'model.layers.1.self_attn.q_proj'",
        ),
        ({"": 1}, r"'' matches no site; the nearest are \['blocks.0.attn.q'"),
        (torch.ones(5), "5 gates for 6 sites"),
        (torch.ones(6, 2), "2 gates for 6 sites"),
    ],
)
def test_gates_that_fit_no_site(lens, scale, message):
    with pytest.raises(SiteError, match=message):
        lens.gates(scale)
    with pytest.raises(SiteError, match=message):
        lens.logits(models.tokens(), scale)


@pytest.mark.parametrize("scale", [{"*.attn.*": 0.7}, {"blocks.1.mlp.gate": -2.0}])
def test_a_mapping_is_the_tensor_it_stands_for(lens, scale):
    """Gates by name and by tensor give the same logits, other than the base model's."""
    tokens = models.tokens()
    by_name = lens.logits(tokens, scale)
    assert torch.equal(by_name, lens.logits(tokens, lens.gates(scale)))
    assert largest_difference(by_name, lens.logits(tokens, 0)) > 1e-3


def test_site_index(lens):
    assert [lens.site_index(s.name) for s in lens.sites] == list(range(6))
    with pytest.raises(SiteError, match="'blocks.9.attn.q' matches no site"):
        lens.site_index("blocks.9.attn.q")
    with pytest.raises(SiteError, match=r"'blocks.0.\*' matches .* sites; name one"):
        lens.site_index("blocks.0.*")


# --- modules that the model lacks

UNKNOWN = {
    "misspelt": ("model.layers.0.self_attn.q_prj", "model.layers.0.self_attn.q_proj"),
    "layer": ("model.layers.7.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    "other family": ("transformer.h.0.mlp.c_proj", "model.layers.0."),
    "other head": ("score", "model."),
    "norm": ("model.layers.0.input_layernorm", "model.layers.0."),
    "rotary": ("model.rotary_emb", "model."),
    "prefix": ("base.model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    "suffix": ("model.layers.0.self_attn.q_proj.base_layer", "model.layers.0.self_attn.q_proj"),
    "no name": ("", "model.layers.0."),
    "regex": (r"model.layers.\d.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("module, near", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_module(module, near, cls):
    """Names the module, the nearest that the model has, the base, and what to do; is a LookupError.

    A module that fits beside it changes nothing: no module is dropped silently.
    """
    good = adapter("llama").modules["model.layers.0.self_attn.k_proj"]
    named = ll.Adapter({module: good, "model.layers.0.self_attn.k_proj": good}, base_model="lab/b")
    message = refusal(shared(cls), named, SiteError)
    assert message.startswith(f"{module}: ")
    assert "2 layers" in message
    assert near in message.partition("the nearest are")[2]
    assert "'lab/b'" in message
    assert "without" in message
    assert issubclass(SiteError, LookupError)


# --- another base model

Q, K, UP = (f"model.layers.1.{n}" for n in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
WRONG_SHAPES = {
    "input": ("llama", Q, (20, 16), "blocks.1.attn.q", "20→16", "16→16"),
    "output": ("llama", Q, (16, 24), "blocks.1.attn.q", "16→24", "16→16"),
    "key heads": ("llama", K, (16, 16), "blocks.1.attn.k", "16→16", "16→8"),
    "both": ("llama", UP, (24, 16), "blocks.1.mlp.up", "24→16", "16→24"),
    "Conv1D": (
        "gpt2",
        "transformer.h.0.mlp.c_fc",
        (64, 16),
        "blocks.0.mlp.fc_in",
        "64→16",
        "16→64",
    ),
    "fused input": ("neox", "gpt_neox.layers.0.attention.query_key_value", (12, 48))
    + ("blocks.0.attn.q", "12→16", "16→16"),
    "fused output": ("gpt2", "transformer.h.0.attn.c_attn", (16, 36))
    + ("transformer.h.0.attn.c_attn", "writes 36", "has 48"),
    "fused, of grouped heads": ("neox", "gpt_neox.layers.0.attention.query_key_value", (16, 32))
    + ("gpt_neox.layers.0.attention.query_key_value", "writes 32", "has 48"),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "family, module, shape, name, ours, theirs", WRONG_SHAPES.values(), ids=WRONG_SHAPES
)
def test_adapter_of_another_base(family, module, shape, name, ours, theirs, cls):
    """Names the site or module, both shapes, and the base that the adapter names."""
    named = ll.Adapter({module: factors(*shape)}, base_model="lab/other-base")
    message = refusal(shared(cls, family), named, AdapterError)
    assert all(needle in message for needle in (name, module, ours, theirs)), message
    assert "another base model" in message
    assert "'lab/other-base'" in message


@pytest.mark.parametrize("cls", CLASSES)
def test_one_module_of_another_shape_among_good_ones(cls):
    good = adapter("llama")
    mixed = dataclasses.replace(good, modules={**good.modules, UP: factors(16, 25)})
    assert "blocks.1.mlp.up" in refusal(shared(cls), mixed, AdapterError)


# --- models in a state in which nothing would be exact


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: base("llama"), "LlamaForCausalLM"),
        (lambda: models.peft_model("llama", base("llama")), "PeftModel"),
        (lambda: nn.Linear(2, 2), "Linear"),
    ],
)
def test_model_without_hooks(make, name):
    message = refusal(make(), adapter("llama"), ModelStateError)
    assert name in message
    assert "no hook points" in message
    assert "TransformerBridge" in message


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bridge_of_an_injected_model(family):
    """A bridge around a PEFT-injected model carries the adapter once already, or drops it."""
    injected = models.peft_model(family, base(family)).get_base_model()
    model = models.bridge(injected)
    message = refusal(model, adapter(family), ModelStateError)
    assert "already carries a PEFT adapter" in message
    assert "ll.load(peft_model)" in message
    assert "blocks.0." in message


@models.NEEDS_BRIDGE
def test_active_dropout():
    """In train mode with dropout no two runs agree; where every p is 0 train mode is harmless."""
    model = fresh("TransformerBridge", "gpt2")
    assert model.original_model.config.resid_pdrop > 0
    model.train()
    message = refusal(model, adapter("gpt2"), ModelStateError)
    assert "dropout 0.1 is active" in message
    assert "model.eval()" in message
    model.eval()
    lens = ll.LoraLens(model, adapter("gpt2"))
    assert len(lens.sites) == 12
    expected = lens.logits(models.tokens())
    for part in (model.original_model, model.original_model.transformer.drop, model.blocks[1]):
        part.train()  # the bridge itself stays in evaluation mode
        with pytest.raises(ModelStateError, match=r"dropout 0\.1 is active.*model\.eval"):
            lens.logits(models.tokens())
        model.eval()
        assert torch.equal(lens.logits(models.tokens()), expected)
    assert len(ll.LoraLens(fresh("TransformerBridge").train(), adapter("llama")).sites) == 14


@pytest.mark.parametrize("cls", CLASSES)
def test_quantised_weights(cls):
    model = fresh(cls)
    weight = next(model.parameters())
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    message = refusal(model, adapter("llama"), ModelStateError)
    assert "weight is torch.int8" in message or "W_E is torch.int8" in message
    assert "floating-point" in message


@pytest.mark.parametrize("cls", CLASSES)
def test_harmless_flags(cls):
    """hook_mlp_in, and on a HookedTransformer attn_result, leave f(1) as it was."""
    model = fresh(cls, "gpt2")
    lens = ll.LoraLens(model, adapter("gpt2"))
    tokens = models.tokens()
    expected = lens.logits(tokens)
    model.set_use_hook_mlp_in(True)
    if cls == "HookedTransformer":
        model.set_use_attn_result(True)
    flagged = ll.LoraLens(model, adapter("gpt2")).logits(tokens)
    torch.testing.assert_close(flagged, expected, rtol=0, atol=1e-9)


def test_unknown_architecture():
    with pytest.raises(ModelStateError, match=r"'XyzForCausalLM'.*GPT2LMHeadModel.*Llama"):
        find_family("XyzForCausalLM")


# --- processed models and the base they came from


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_folded_model_needs_its_base(family, cls):
    """The message names the norm that is needed and the argument to pass; with it all is well."""
    model = fresh(cls, family, **models.PROCESSED)
    norm = {"gpt2": "transformer.h.0.ln_1", "llama": "model.layers.0.input_layernorm"}[family]
    message = refusal(model, adapter(family), ModelStateError)
    assert "blocks.0.attn.q" in message
    assert norm in message
    assert "hf_model=" in message
    assert "unprocessed" in message
    lens = ll.LoraLens(model, adapter(family), hf_model=base(family))
    assert len(lens.sites) == len(SITES[family][1]) * 2


def merged(family: str) -> nn.Module:
    peft = models.peft_model(family, base(family))
    peft.merge_adapter()
    return peft.get_base_model()


def nudged(family: str) -> nn.Module:
    """The base with one weight of one site changed by a hundredth."""
    model = copy.deepcopy(base(family))
    name = {"gpt2": "transformer.h.1.mlp.c_proj", "llama": "model.layers.1.mlp.down_proj"}[family]
    with torch.no_grad():
        model.get_submodule(name).weight[3, 2] += 0.01
    return model


def other_family(family: str) -> nn.Module:
    return base("neox")


WRONG_BASES = {
    "seed": (
        lambda f: models.hf_model(f, seed=1),
        ["blocks.0.", "no known processing", "differ by"],
    ),
    "nudged": (nudged, ["blocks.1.mlp.", "no known processing", "differ by 0.0"]),
    "merged": (merged, ["merged PEFT adapter", "unmerge_adapter()"]),
    "other family": (other_family, ["hf_model (GPTNeoXForCausalLM) has no module", "base model"]),
    "headless": (lambda f: base(f).base_model, ["has no module", "language-model head"]),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("make, needles", WRONG_BASES.values(), ids=WRONG_BASES)
def test_hf_model_that_is_not_the_base(make, needles, family, flags, cls):
    """Weights are compared, on raw models too, so no other model passes for the base."""
    message = refusal(
        fresh(cls, family, **flags), adapter(family), ModelStateError, hf_model=make(family)
    )
    assert all(needle in message for needle in needles), message


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
def test_hf_model_that_the_bridge_wraps(flags):
    """Its weights were rewritten in place, so it tells nothing of the base."""
    model = fresh("TransformerBridge", "gpt2", **flags)
    message = refusal(model, adapter("gpt2"), ModelStateError, hf_model=model.original_model)
    assert "wrapped by a TransformerBridge" in message
    assert "freshly loaded" in message


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
def test_hf_model_with_an_unmerged_adapter_is_the_base(flags, cls):
    """PEFT keeps the base weights beside the factors, so an injected model serves."""
    peft = models.peft_model("gpt2", base("gpt2"))
    model = fresh(cls, "gpt2", **flags)
    tokens = models.tokens()
    expected = ll.LoraLens(model, adapter("gpt2"), hf_model=base("gpt2")).logits(tokens)
    for hf_model in (peft, peft.get_base_model()):
        logits = ll.LoraLens(model, adapter("gpt2"), hf_model=hf_model).logits(tokens)
        assert torch.equal(logits, expected)


@models.NEEDS_HOOKED_TRANSFORMER
@pytest.mark.parametrize("flags", [{}, models.PROCESSED], ids=["raw", "processed"])
def test_refactored_attention(flags):
    """Rotated heads have no ΔW of theirs."""
    model = fresh("HookedTransformer", "gpt2", **flags, refactor_factored_attn_matrices=True)
    message = refusal(model, adapter("gpt2"), ModelStateError, hf_model=base("gpt2"))
    assert "refactor_factored_attn_matrices" in message


CHANGES = {
    "flag": (lambda m: m.set_use_attn_result(True), "cfg.use_attn_result was False"),
    "train": (lambda m: m.train(), r"dropout 0.1 is active.*model.eval\(\)"),
    "processing": (
        lambda m: m.enable_compatibility_mode(disable_warnings=True),
        "processed weights was False when the lens was made and is True",
    ),
}


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changed_after_the_lens_was_made(change, message):
    """The lens' δ holds for the model as it was: any run after such a change is refused."""
    model = fresh("TransformerBridge", "gpt2")
    lens = ll.LoraLens(model, adapter("gpt2"))
    change(model)
    for run in (
        lambda: lens.logits(models.tokens()),
        lambda: lens.fwd_hooks(),
        lambda: ll.first_order(lens, models.tokens(), ll.Margin(5, 9)),
    ):
        with pytest.raises(ModelStateError, match=message):
            run()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_hooked_model_that_computes_something_else(cls):
    """Given hf_model, a hooked model whose logits are not its base's is refused with its remedy."""
    model = fresh(cls, "llama")
    hf = models.hf_model("llama")
    hf.model.norm.weight.data.mul_(1.5)
    message = refusal(model, adapter("llama"), ModelStateError, hf_model=hf)
    assert "computes other logits than hf_model" in message
    assert "TransformerBridge" in message
