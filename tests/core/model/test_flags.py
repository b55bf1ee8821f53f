"""TransformerLens' own flags: what they split, repeat or add stays exact, or is refused by name."""

from __future__ import annotations

import models
import pytest
import torch
from cases import centred
from differences import largest_difference

import lens_lora as ll
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.bridge_points import BridgePoints
from lens_lora.core.model.hooks import attached

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
HT = "HookedTransformer"
BRIDGE = "TransformerBridge"
EXACT = [
    (HT, ("use_attn_result",)),
    (HT, ("use_split_qkv_input",)),
    (HT, ("use_hook_mlp_in",)),
    (HT, ("ungroup_grouped_query_attention",)),
    (HT, ("use_split_qkv_input", "ungroup_grouped_query_attention")),
    (HT, ("use_attn_in",)),
    (BRIDGE, ("use_attn_result",)),
    (BRIDGE, ("use_hook_mlp_in",)),
    (BRIDGE, ("use_split_qkv_input",)),
    (BRIDGE, ("use_attn_in",)),
    (BRIDGE, ("use_split_qkv_input", "use_attn_result", "use_hook_mlp_in")),
]
PROCESSINGS = ["raw", "no_processing", "processed"]
NORM_PER_HEAD = "_apply_ln1_per_head"
COPIED = ("use_split_qkv_input", "use_attn_in")


def named(value: str | tuple[str, ...]) -> str:
    """The same on every line, whatever classes it has."""
    return value if isinstance(value, str) else "+".join(value)


def with_flags(cls: str, family: str, flags: tuple[str, ...], processing: dict[str, bool]):
    base = models.hf_model(family)
    model = models.MAKERS[cls](base, **processing)
    for flag in flags:
        getattr(model, f"set_{flag}")(True)
    return base, model


@pytest.mark.sample(3)
@pytest.mark.parametrize("processing", [{}, models.PROCESSED], ids=["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("cls", "flags"), [c for c in EXACT if c[0] in models.MAKERS], ids=named)
def test_exact_under_flags(cls: str, flags: tuple[str, ...], family: str, processing: dict):
    """f(1) is PEFT's; forward equals reverse; parts sum to sites; components multiply."""
    if family == "gpt2" and "ungroup_grouped_query_attention" in flags:
        family = "mistral"  # multi-head attention has nothing to ungroup
    if cls == HT and family == "qwen2" and "use_attn_in" in flags:
        family = "neox"  # HookedTransformer has it for multi-head attention only
    base, model = with_flags(cls, family, flags, processing)
    peft = models.peft_model(family, base)
    tokens = models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft), hf_model=base)
    with torch.no_grad():
        expected = centred(peft(tokens).logits)
    assert largest_difference(centred(lens.logits(tokens)), expected) < 1e-9
    reverse = ll.first_order(lens, tokens, MARGIN, at=0.5)
    forward = ll.first_order(lens, tokens, MARGIN, at=0.5, mode="forward", progress=False)
    size = reverse.values.abs().max()
    assert largest_difference(forward.values, reverse.values) < 1e-10 * size
    few = tokens[:, :3]
    whole = ll.first_order(lens, few, MARGIN).values
    bound = 1e-10 * whole.abs().max()
    every = ("position", "head", "rank")
    for by in (("head",), every):  # flags change what a head reads
        split = ll.first_order(lens, few, MARGIN, by=by)
        assert largest_difference(split.per_site, whole) < bound
        parts = ll.first_order(lens, few, MARGIN, by=by, mode="forward", progress=False)
        assert largest_difference(split.values, parts.values) < bound
    product = ll.components(lens, tokens, MARGIN, progress=False).first_order
    at_base = ll.first_order(lens, tokens, MARGIN).values
    assert largest_difference(product, at_base) < 1e-10 * at_base.abs().max()


@pytest.mark.sample(2)
@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flag", COPIED)
@pytest.mark.parametrize("processing", [{}, models.RAW, models.PROCESSED], ids=PROCESSINGS)
@pytest.mark.parametrize("family", ["neox", "bloom", "phi3", "qwen3", "gemma3"])
def test_copied_inputs_on_a_bridge(family: str, processing: dict, flag: str):
    """A bridge normalises each head's copy behind its last hook point: z is made as it makes it.

    The first order through the norms of the copies is forward mode's, and a centred difference's.
    """
    base, model = with_flags(BRIDGE, family, (flag,), processing)
    peft = models.peft_model(family, base)
    tokens = models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft), hf_model=base)
    with torch.no_grad():
        expected = centred(peft(tokens).logits)
    assert largest_difference(centred(lens.logits(tokens)), expected) < 1e-9
    reverse = ll.first_order(lens, tokens, MARGIN, at=0.5).values
    forward = ll.first_order(lens, tokens, MARGIN, at=0.5, mode="forward", progress=False).values
    assert largest_difference(forward, reverse) < 1e-10 * reverse.abs().max()
    ahead, behind = (lens.logits(tokens, 0.5 + h)[:, -1] for h in (1e-5, -1e-5))
    slope = ((ahead - behind)[:, 5] - (ahead - behind)[:, 9]) / 2e-5
    assert largest_difference(slope, reverse.sum(1)) < 1e-5 * reverse.abs().max()


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flag", COPIED)
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_control_copies_before_their_norm(family: str, flag: str, monkeypatch: pytest.MonkeyPatch):
    """Left out, the norm of the copies makes another model."""
    monkeypatch.setattr(BridgePoints, "_norm_per_head", lambda *_: lambda z: z)
    base, model = with_flags(BRIDGE, family, (flag,), {})
    peft = models.peft_model(family, base)
    tokens = models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with torch.no_grad():
        error = lens.logits(tokens) - peft(tokens).logits
    assert error.abs().max() > 0.1


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flag", COPIED)
@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "opt"])
def test_families_that_the_bridge_gives_no_copies(family: str, flag: str):
    """transformer-lens itself refuses the flag where Hugging Face's own attention runs."""
    with pytest.raises(NotImplementedError, match=flag):
        with_flags(BRIDGE, family, (flag,), {})


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flag", COPIED)
def test_a_bridge_of_unknown_copies_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch):
    """A transformer-lens without this per-head norm: refused by name, never a guess."""
    base, model = with_flags(BRIDGE, "gpt2", (flag,), {})
    adapter = ll.Adapter.from_peft(models.peft_model("gpt2", base))
    (owner,) = [c for c in type(model.blocks[0].attn).__mro__ if NORM_PER_HEAD in vars(c)]
    monkeypatch.delattr(owner, NORM_PER_HEAD)
    with pytest.raises(ll.errors.ModelStateError, match=rf"cfg.{flag} is on.*set_{flag}\(False\)"):
        ll.LoraLens(model, adapter)


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("flag", COPIED)
def test_a_flag_set_after_the_lens(flag: str):
    base, model = with_flags(BRIDGE, "gpt2", (), {})
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(ll.errors.ModelStateError, match=f"cfg.{flag} was False"):
        lens.logits(models.tokens())


HEAD_INPUTS = ("hook_q_input", "hook_k_input", "hook_v_input")


@pytest.mark.parametrize(
    ("cls", "family", "flag", "points"),
    [
        case
        for case in (
            (HT, "qwen2", "use_split_qkv_input", HEAD_INPUTS),
            (BRIDGE, "qwen2", "use_split_qkv_input", HEAD_INPUTS),
            (BRIDGE, "gpt2", "use_split_qkv_input", HEAD_INPUTS),
            (BRIDGE, "qwen2", "use_attn_in", ("hook_attn_in",)),
            (BRIDGE, "gpt2", "use_attn_in", ("hook_attn_in",)),
        )
        if case[0] in models.MAKERS
    ],
    ids=named,
)
def test_heads_with_inputs_of_their_own(cls: str, family: str, flag: str, points: tuple[str, ...]):
    """A user's hook may change one head's input: δ follows, head by head.

    The oracle is a model of the same class from the merged weights, with the same flag and hook.
    """
    base, model = with_flags(cls, family, (flag,), {})
    peft = models.peft_model(family, base)
    tokens = models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    merged_hf = peft.merge_and_unload()
    merged_hf.config.architectures = base.config.architectures
    merged = models.MAKERS[cls](merged_hf)
    getattr(merged, f"set_{flag}")(True)

    def one_head(tensor, hook):
        tensor = tensor.clone()
        tensor[:, :, 1] = tensor[:, :, 1].flip(-1)
        return tensor

    for name in (f"blocks.1.{point}" for point in points):
        with torch.no_grad():
            expected = merged.run_with_hooks(tokens, fwd_hooks=[(name, one_head)])
            with lens.applied():
                found = model.run_with_hooks(tokens, fwd_hooks=[(name, one_head)])
            plain = merged(tokens)
        assert largest_difference(found, expected) < 1e-9
        assert largest_difference(plain, expected) > 1e-3
        refused = pytest.raises(ll.errors.ModelStateError, match="each head has an input of its")
        with attached(model, [(name, one_head)]), refused:
            ll.lora_activations(lens, tokens)


@pytest.mark.parametrize(
    ("cls", "flag"),
    [(cls, flag) for cls in models.MAKERS for flag in COPIED],
)
def test_heads_that_read_the_same_have_one_activation(cls: str, flag: str, monkeypatch):
    """Whatever the last bits of their products: u is what it is without copies."""
    # A HookedTransformer has no `hook_attn_in` for fewer keys than queries.
    family = "gpt2" if flag == "use_attn_in" else "qwen2"
    base, model = with_flags(cls, family, (), {})
    adapter = ll.Adapter.from_peft(models.peft_model(family, base))
    expected = ll.lora_activations(ll.LoraLens(model, adapter), models.tokens()).values
    _, model = with_flags(cls, family, (flag,), {})
    lens = ll.LoraLens(model, adapter)
    exact = SiteMap.coordinates

    def rounded(self, z: torch.Tensor) -> torch.Tensor:
        u = exact(self, z)
        return u if u.ndim < 4 else u + 1e-14 * torch.arange(u.shape[2])[:, None]

    monkeypatch.setattr(SiteMap, "coordinates", rounded)
    found = ll.lora_activations(lens, models.tokens()).values
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
