"""Norms whose γ and β were trained: sites of their own, seen by all that reads them."""

from __future__ import annotations

import copy

import cases
import models
import pytest
import torch
from differences import largest_difference
from targets import NORMS
from trained import logits, trained

import lens_lora as ll
from lens_lora.core.model.basis import NormMap

pytestmark = pytest.mark.usefixtures("float64")
EXACT = 1e-11
ROUND_OFF = 1e-10
MARGIN = ll.Margin(5, 9)
# A LayerNorm with β, an RMS norm, a norm that attention and MLP share, norms of q and k and after
# attention and MLP, a norm after the embedding.
FAMILIES = ["gpt2", "llama", "gptj", "gemma3", "bloom"]
HOST_ERROR = {("gptj", "HookedTransformer"): 1e-7, ("bloom", "HookedTransformer"): 1e-8}


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


def built(family: str, cls: str, **config):
    """(base, PEFT model, lens) of an adapter on linear modules and norms."""
    base = models.hf_model(family)
    config = {"modules_to_save": NORMS.get(family, ["norm"]), **config}
    model = trained(family, base, **config)
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(model))
    return base, model, lens


@pytest.mark.sample(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_norm_alone_equals_peft(family: str, cls: str):
    """At a gate that is neither 0 nor 1, beside every LoRA: no cross term can hide in a sum."""
    base, model, lens = built(family, cls)
    norms = [
        site for site in lens.sites if isinstance(lens.maps[lens.site_index(site.name)], NormMap)
    ]
    assert {site.kind for site in norms} >= {"ln1", "ln_final"}
    for site in norms:
        gates = {s.name: 1.0 for s in lens.sites if s not in norms} | {site.name: 0.7}
        oracle = copy.deepcopy(model)
        for other in norms:
            wrapper = oracle.base_model.model.get_submodule(other.module)
            own = wrapper.modules_to_save["default"]
            kept = wrapper.original_module
            share = 0.7 if other is site else 0.0
            with torch.no_grad():
                for name, p in own.named_parameters():
                    p.copy_(kept.get_parameter(name) + share * (p - kept.get_parameter(name)))
        found = cases.centred(lens.logits(models.tokens(), gates))
        limit = HOST_ERROR.get((family, cls), EXACT)
        assert largest_difference(found, logits(oracle)) < limit, site.name


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_every_activation_is_that_of_the_merged_model(family: str, cls: str):
    """Names that show the same thing whatever was merged; users' hooks see and edit the same."""
    base, model, lens = built(family, cls)
    merged = models.MAKERS[cls](copy.deepcopy(model).merge_and_unload())
    names = [name for name in lens.model.hook_dict if name.endswith(_SHOWN[cls])]
    assert any("ln1" in name for name in names)
    assert any("attn.hook_q" in name for name in names)
    with torch.no_grad():
        _, expected = merged.run_with_cache(models.tokens(), names_filter=names)
        with lens.applied():
            _, found = lens.model.run_with_cache(models.tokens(), names_filter=names)
    assert set(found) == set(expected)
    for name in names:
        assert largest_difference(found[name], expected[name]) < 1e-10, name

    def edit(tensor, hook):
        return tensor * 1.2 + 0.1

    for name in _EDITED[cls]:
        with torch.no_grad():
            with lens.applied():
                ours = lens.model.run_with_hooks(models.tokens(), fwd_hooks=[(name, edit)])
            theirs = merged.run_with_hooks(models.tokens(), fwd_hooks=[(name, edit)])
        assert largest_difference(cases.centred(ours), cases.centred(theirs)) < 1e-10, name


_SHOWN = {
    "HookedTransformer": (
        "hook_normalized",
        "hook_scale",
        "hook_q",
        "hook_v",
        "hook_pattern",
        "hook_resid_post",
        "hook_mlp_out",
    ),
    "TransformerBridge": (
        "ln1.hook_out",
        "ln2.hook_normalized",
        "ln2.hook_out",
        "attn.hook_q",
        "hook_pattern",
        "hook_resid_post",
        "ln_final.hook_out",
    ),
}
_EDITED = {
    "HookedTransformer": [
        "blocks.0.ln1.hook_normalized",
        "blocks.1.ln2.hook_scale",
        "blocks.0.ln2.hook_normalized",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_q",
    ],
    "TransformerBridge": [
        "blocks.0.ln1.hook_normalized",
        "blocks.0.ln1.hook_out",
        "blocks.1.ln2.hook_scale",
        "ln_final.hook_normalized",
        "blocks.1.attn.hook_q",
    ],
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_and_their_parts(family: str, cls: str):
    """Both modes, and by position, head and rank; norms of q and k belong to heads."""
    _, _, lens = built(family, cls)
    texts = ["w5 w7 w8", "w9 w10 w11 w12"]
    by = ("position", "head", "rank")
    reverse = ll.first_order(lens, texts, MARGIN, at=0.6, by=by)
    forward = ll.first_order(lens, texts, MARGIN, at=0.6, mode="forward", progress=False)
    size = reverse.values.abs().max()
    assert largest_difference(reverse.per_site, forward.values) < ROUND_OFF * size
    few = ("position", "head")
    split = ll.first_order(lens, texts, MARGIN, at=0.6, by=few, mode="forward", progress=False)
    assert largest_difference(split.values, reverse.values.sum(-1)) < ROUND_OFF * size
    of_heads = reverse.values.sum((2, 4))
    for index, site in enumerate(lens.sites):
        if site.kind in ("q_norm", "k_norm"):
            heads = 4 if site.kind == "q_norm" else 2
            assert of_heads[:, index, :heads].abs().min() > 0
            assert not of_heads[:, index, heads:].any()
        if site.kind in ("ln1", "ln2", "ln_final", "embed_ln"):
            assert not of_heads[:, index, :-1].any()
    step = 1e-5
    name = lens.sites[0].name
    ends = [ll.first_order(lens, texts, MARGIN, at=0.6 + e).values for e in (step, -step)]
    curved = ll.coupling(lens, texts, MARGIN, at=0.6, progress=False).matrix.sum(-1)
    slopes = (ends[0] - ends[1]) / (2 * step)
    assert largest_difference(curved, slopes) < 1e-6 * slopes.abs().max(), name


@models.NEEDS_HOOKED_TRANSFORMER
@models.NEEDS_BRIDGE
def test_norms_of_heads_are_split_alike_by_both_classes():
    """By position and head; the two have their axes in other orders."""
    both = []
    for cls in models.MAKERS:
        _, _, lens = built("qwen3", cls, modules_to_save=["q_norm", "k_norm"])
        by = ("position", "head")
        both.append(ll.first_order(lens, models.tokens(), MARGIN, at=1.0, by=by).values)
    assert largest_difference(*both) < 1e-9 * both[0].abs().max()


@models.NEEDS_HOOKED_TRANSFORMER
@models.NEEDS_BRIDGE
def test_components_do_not_depend_on_how_often_a_norm_runs():
    """HookedTransformer runs ln1 three times a block, and a shared norm once more."""
    for family in ("llama", "gptj"):
        both = []
        for cls in models.MAKERS:
            _, _, lens = built(family, cls)
            found = ll.components(lens, models.tokens(), MARGIN, progress=False)
            first = ll.first_order(lens, models.tokens(), MARGIN).values
            assert largest_difference(found.first_order, first) < ROUND_OFF * first.abs().max()
            both.append((lens.sites, found))
        (sites, one), (_, other) = both
        norms = [i for i, site in enumerate(sites) if site.kind in ("ln1", "ln2", "ln_final")]
        for field in ("z_norm", "delta_norm", "sensitivity", "cosine", "gain"):
            a, b = (getattr(c, field)[:, norms] for c in (one, other))
            assert largest_difference(a, b) < 1e-6 * b.abs().max(), field


def test_the_other_analyses(cls: str):
    """They complete: path sums to the shift, interventions are runs, norms have a size."""
    _, model, lens = built("llama", cls)
    texts = ["w5 w7 w8", "w9 w10 w11 w12"]
    path = ll.path_attribution(lens, texts, MARGIN, tol=1e-6, progress=False)
    assert largest_difference(path.values.sum(1), path.shift) < 1e-5
    effects = ll.patch_sites(lens, texts, MARGIN, how="leave_one_out", progress=False)
    index = lens.site_index("blocks.0.ln1")
    without = {s.name: float(i != index) for i, s in enumerate(lens.sites)}
    read = MARGIN.of_logits(lens.model, 2)
    ends = [read(lens.prompts(texts).at_read(lens.logits(texts, g))) for g in (1.0, without)]
    assert largest_difference(effects.values[:, index], ends[0] - ends[1]) < ROUND_OFF
    held = ll.faithfulness(lens, texts, MARGIN, path, progress=False)
    assert bool(torch.isfinite(held.keep).all())
    module = model.base_model.model.model.layers[0].input_layernorm
    change = module.modules_to_save["default"].weight - module.original_module.weight
    assert largest_difference(lens.delta_w("blocks.0.ln1").AB, torch.diag(change)) < 1e-15
    assert lens.maps[index].norm() == pytest.approx(float(change.norm()), rel=1e-12)
    assert lens.sites[index].rank == 16


# --- refusals


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("has_base", [True, False])
def test_folded_norms(family: str, has_base: bool, cls: str):
    """Readers' A' would depend on γ's gate: refused, with the base and without it."""
    base = models.hf_model(family)
    model = trained(family, base, modules_to_save=NORMS.get(family, ["norm"]))
    hooked = models.MAKERS[cls](base, **models.PROCESSED)
    with pytest.raises(
        ll.errors.ModelStateError, match="ln1.*γ or β.*folded.*unprocessed"
    ) as caught:
        ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base if has_base else None)
    assert "without" not in str(caught.value)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_norms_that_are_not_folded_are_exact_on_a_processed_model(cls: str):
    """Norms of q and k, and after attention and MLP, stay in the model."""
    base = models.hf_model("gemma3")
    names = ["q_norm", "k_norm", "post_attention_layernorm", "post_feedforward_layernorm"]
    model = trained("gemma3", base, modules_to_save=names)
    hooked = models.MAKERS[cls](base, **models.PROCESSED)
    lens = ll.LoraLens(hooked, ll.Adapter.from_peft(model), hf_model=base)
    assert {s.kind for s in lens.sites} >= {"q_norm", "k_norm", "ln1_post", "ln2_post"}
    assert largest_difference(logits(lens), logits(model)) < 1e-10


def test_stored_norms_of_the_base_are_no_update(cls: str):
    """Also on a folded model, with its base."""
    base = models.hf_model("gpt2")
    model = models.peft_model("gpt2", base, modules_to_save=["ln_1"])
    adapter = ll.Adapter.from_peft(model)
    for flags in ({}, models.PROCESSED):
        lens = ll.LoraLens(models.MAKERS[cls](base, **flags), adapter, hf_model=base)
        assert not any("ln" in site.name for site in lens.sites)
        assert largest_difference(logits(lens), logits(model)) < EXACT


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_copies_of_the_residual(flag: str, cls: str):
    """Exact where each copy passes the norm's hook points; refused where it does not."""
    base, model, _ = built("gpt2", cls)
    hooked = models.MAKERS[cls](base)
    getattr(hooked, f"set_{flag}")(True)
    adapter = ll.Adapter.from_peft(model)
    if cls == "TransformerBridge":
        with pytest.raises(
            ll.errors.ModelStateError, match="past its hook points.*Turn the flags off"
        ):
            ll.LoraLens(hooked, adapter)
        lens = ll.LoraLens(hooked, adapter.without_modules("*ln_1"))
        for layer in model.base_model.model.transformer.h:
            layer.ln_1.enable_adapters(False)
        assert largest_difference(logits(lens), logits(model)) < EXACT
    else:
        lens = ll.LoraLens(hooked, adapter)
        assert largest_difference(logits(lens), logits(model)) < EXACT
        reverse = ll.first_order(lens, models.tokens(), MARGIN, at=1.0)
        forward = ll.first_order(
            lens, models.tokens(), MARGIN, at=1.0, mode="forward", progress=False
        )
        size = reverse.values.abs().max()
        assert largest_difference(reverse.values, forward.values) < ROUND_OFF * size


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_list_of_hooks_cannot_hold_a_norm():
    """But for LayerNorm of transformer-lens 2, whose hook point shows the norm's output."""
    _, model, lens = built("llama", "HookedTransformer")
    with pytest.raises(ll.errors.ModelStateError, match="blocks.0.ln1: no hook point.*applied"):
        lens.fwd_hooks()


@models.NEEDS_BRIDGE
def test_a_list_of_hooks_holds_a_bridge_s_norms():
    _, model, lens = built("llama", "TransformerBridge")
    with torch.no_grad():
        found = lens.model.run_with_hooks(models.tokens(), fwd_hooks=lens.fwd_hooks())
    assert largest_difference(cases.centred(found), logits(model)) < EXACT


def test_norms_that_the_model_lacks(cls: str):
    """Qwen3's names on a Llama, and a bias of an RMS norm: another base."""
    vector = torch.ones(16, dtype=torch.float64)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", models.hf_model("llama")))
    hooked = models.MAKERS[cls](models.hf_model("llama"))
    for path, update, error in (
        ("model.layers.0.self_attn.q_norm", ll.results.TrainedModule(vector), ll.errors.SiteError),
        ("model.norm", ll.results.TrainedModule(vector, bias=vector), ll.errors.AdapterError),
        ("model.norm", ll.results.TrainedModule(vector[:15]), ll.errors.AdapterError),
    ):
        odd = ll.Adapter.from_factors({**adapter.modules, path: update})
        with pytest.raises(error, match="no such linear module, embedding or norm|another base"):
            ll.LoraLens(hooked, odd)
