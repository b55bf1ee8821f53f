"""TransformerLens' own flags: what they split, repeat or add stays exact, or is refused by name."""

from __future__ import annotations

import models
import pytest
import torch
from cases import centred

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
HT, BRIDGE = "HookedTransformer", "TransformerBridge"
EXACT = [
    (HT, ("use_attn_result",)),
    (HT, ("use_split_qkv_input",)),
    (HT, ("use_hook_mlp_in",)),
    (HT, ("ungroup_grouped_query_attention",)),
    (HT, ("use_split_qkv_input", "ungroup_grouped_query_attention")),
    (HT, ("use_attn_in",)),
    (BRIDGE, ("use_attn_result",)),
    (BRIDGE, ("use_hook_mlp_in",)),
]
REFUSED = [(BRIDGE, "use_split_qkv_input"), (BRIDGE, "use_attn_in")]


def with_flags(cls: str, family: str, flags: tuple[str, ...], processed: bool):
    base = models.hf_model(family)
    model = models.MAKERS[cls](base, **(models.PROCESSED if processed else {}))
    for flag in flags:
        getattr(model, f"set_{flag}")(True)
    return base, model


@pytest.mark.parametrize("processed", [False, True], ids=["raw", "processed"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
@pytest.mark.parametrize(("cls", "flags"), [c for c in EXACT if c[0] in models.MAKERS])
def test_exact_under_flags(cls: str, flags: tuple[str, ...], family: str, processed: bool):
    """f(1) is PEFT's; forward equals reverse; parts sum to sites; components multiply."""
    if family == "gpt2" and "ungroup_grouped_query_attention" in flags:
        family = "mistral"  # multi-head attention has nothing to ungroup
    if family == "qwen2" and "use_attn_in" in flags:
        family = "neox"  # transformer-lens has it for multi-head attention only
    base, model = with_flags(cls, family, flags, processed)
    peft, tokens = models.peft_model(family, base), models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft), hf_model=base)
    with torch.no_grad():
        expected = centred(peft(tokens).logits)
    assert (centred(lens.logits(tokens)) - expected).abs().max() < 1e-9
    reverse = ll.first_order(lens, tokens, MARGIN, at=0.5)
    forward = ll.first_order(lens, tokens, MARGIN, at=0.5, mode="forward", progress=False)
    size = reverse.values.abs().max()
    assert (forward.values - reverse.values).abs().max() < 1e-10 * size
    for by in (("head",), ("rank",), ("position",), ("position", "head", "rank")):
        split = ll.first_order(lens, tokens[:, :3], MARGIN, by=by)
        parts = ll.first_order(lens, tokens[:, :3], MARGIN, by=by, mode="forward", progress=False)
        whole = ll.first_order(lens, tokens[:, :3], MARGIN)
        assert (split.per_site - whole.values).abs().max() < 1e-10 * whole.values.abs().max()
        assert (split.values - parts.values).abs().max() < 1e-10 * whole.values.abs().max()
    product = ll.components(lens, tokens, MARGIN, progress=False).first_order
    at_base = ll.first_order(lens, tokens, MARGIN).values
    assert (product - at_base).abs().max() < 1e-10 * at_base.abs().max()


@pytest.mark.parametrize(("cls", "flag"), [c for c in REFUSED if c[0] in models.MAKERS])
def test_refused_flags(cls: str, flag: str):
    """The bridge normalises a split input behind its last hook point: refused by name."""
    base, model = with_flags(cls, "gpt2", (flag,), False)
    adapter = ll.Adapter.from_peft(models.peft_model("gpt2", base))
    with pytest.raises(ll.ModelStateError, match=rf"cfg.{flag} is on.*set_{flag}\(False\)"):
        ll.LoraLens(model, adapter)


def test_heads_with_inputs_of_their_own():
    """Under use_split_qkv_input a user's hook may change one head's input: δ follows, head by head.

    The oracle is a HookedTransformer of the merged weights with the same flag and hook.
    """
    if HT not in models.MAKERS:
        return
    base, model = with_flags(HT, "qwen2", ("use_split_qkv_input",), False)
    peft, tokens = models.peft_model("qwen2", base), models.tokens()
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    merged_hf = peft.merge_and_unload()
    merged_hf.config.architectures = base.config.architectures
    merged = models.hooked_transformer(merged_hf)
    merged.set_use_split_qkv_input(True)

    def one_head(tensor, hook):
        tensor = tensor.clone()
        tensor[:, :, 1] = tensor[:, :, 1].flip(-1)
        return tensor

    for name in ("blocks.1.hook_q_input", "blocks.1.hook_k_input", "blocks.1.hook_v_input"):
        with torch.no_grad():
            expected = merged.run_with_hooks(tokens, fwd_hooks=[(name, one_head)])
            with lens.applied():
                found = model.run_with_hooks(tokens, fwd_hooks=[(name, one_head)])
            plain = merged(tokens)
        assert (found - expected).abs().max() < 1e-9
        assert (plain - expected).abs().max() > 1e-3
