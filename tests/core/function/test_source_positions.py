"""Positions of v where value biases are folded into b_O: its constant belongs to where v reads.

A processed and an unprocessed model are one function, so they have the same splits. The oracle is
Hugging Face: v's own output moved by s·B·A·x at one position, in central differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import models
import pytest
import torch
from peft import PeftModel
from torch import Tensor

import lens_lora as ll
from lens_lora.core.function import reverse
from lens_lora.core.model.plan import Injection

pytestmark = pytest.mark.usefixtures("float64")
ROUND_OFF = 1e-9
DIFFERENCES = 1e-7
SEEN = 1e-2
MARGIN = ll.Margin(5, 9)
POSITION = ("position",)
EVERY = ("position", "head", "rank")
LAYER_NORM = [
    (family, cls)
    for family in ("gpt2", "neox", "gptj", "bloom", "gpt_neo", "opt", "phi")
    for cls in models.MAKERS
    if models.is_built_right(family, cls, "processed")
]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def split(lens: ll.LoraLens, by: tuple[str, ...], **how: Any) -> Tensor:
    return ll.first_order(lens, models.tokens(pos=5), MARGIN, by=by, progress=False, **how).values


@pytest.mark.sample(2)
@pytest.mark.parametrize(("family", "cls"), LAYER_NORM)
def test_a_processed_model_has_the_splits_of_the_unprocessed(family: str, cls: str):
    """By position, head and rank; at both kinds of gates, where o's own update passes it on too."""
    raw, processed = (cases.case(family, cls, flags).lens for flags in ("raw", "processed"))
    assert processed.plan.with_constants
    for by in (POSITION, EVERY):
        for at in (0.0, 0.7):
            expected = split(raw, by, at=at)
            assert relative(split(processed, by, at=at), expected) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("by", [POSITION, EVERY])
def test_forward_mode_has_them_too(cls: str, by: tuple[str, ...]):
    raw, processed = (cases.case("gpt2", cls, flags).lens for flags in ("raw", "processed"))
    found = split(processed, by, at=0.7, mode="forward")
    assert relative(found, split(raw, by, at=0.7)) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
def test_path_margin_and_padding_have_them_too(cls: str):
    """What differentiates at many gates, and prompts of several lengths."""
    raw, processed = (cases.case("opt", cls, flags).lens for flags in ("raw", "processed"))
    texts = ["w5 w7 w8", "w9 w10 w11 w12 w13", "w20"]

    def paths(lens: ll.LoraLens) -> tuple[Tensor, Tensor]:
        path = ll.path_attribution(lens, texts, MARGIN, by="position", max_nodes=5, progress=False)
        margin = ll.fact_margin(lens, texts, 5, 9, by="position", progress=False)
        return path.values, margin.attribution.values

    for found, expected in zip(paths(processed), paths(raw), strict=True):
        assert relative(found, expected) < ROUND_OFF


def of_bias(base, **config: Any) -> ll.Adapter:
    return ll.Adapter.from_peft(models.peft_model("qwen2", base, **config))


def trained_biases(base) -> ll.Adapter:
    peft = models.peft_model("qwen2", base, targets=["v_proj"], bias="lora_only", seed=5)
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if name.endswith("base_layer.bias"):
                p.add_(0.3 * torch.randn(p.shape, generator=models.seeded(7), dtype=p.dtype))
    return ll.Adapter.from_peft(peft)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_changes_of_bias_and_several_adapters_at_once(cls: str):
    """Δb of v folds whatever the norm; two updates of one v have a constant each."""
    base = models.hf_model("qwen2")
    both = of_bias(base, lora_bias=True, targets=["q_proj", "v_proj"]).named("one")
    both = both + of_bias(base, targets=["v_proj", "o_proj"], seed=4)
    both = both + trained_biases(base).named("three")
    raw, processed = (
        ll.LoraLens(models.MAKERS[cls](base, **cases.FLAGS[flags]), both, hf_model=base)
        for flags in ("raw", "processed")
    )
    assert len(processed.plan.with_constants) == 2 * models.LAYERS
    for by in (POSITION, EVERY):
        assert relative(split(processed, by, at=0.7), split(raw, by, at=0.7)) < ROUND_OFF


@models.NEEDS_HOOKED_TRANSFORMER
def test_repeated_heads():
    """Heads of k and v that a flag repeats before their hook points."""
    base = models.hf_model("qwen2")
    adapter = of_bias(base, lora_bias=True)
    lenses = []
    for flags in ("raw", "processed"):
        model = models.hooked_transformer(base, **cases.FLAGS[flags])
        model.set_ungroup_grouped_query_attention(True)
        lenses.append(ll.LoraLens(model, adapter, hf_model=base))
    raw, processed = lenses
    assert processed.plan.with_constants
    assert relative(split(processed, EVERY, at=0.7), split(raw, EVERY, at=0.7)) < ROUND_OFF


# --- against Hugging Face


def peft_parts_of_v(
    peft: PeftModel, module: str, rows: slice, tokens: Tensor, read: Callable[[Tensor], Tensor]
) -> Tensor:
    """∂g/∂ε of v's s·B·A·x at one position each, on the base: [batch, pos]. No package code."""
    layer = peft.base_model.model.get_submodule(module)
    step = 1e-4
    parts = []

    def moved(position: int, eps: float) -> Tensor:
        def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            update = layer.lora_B["default"](layer.lora_A["default"](args[0]))
            out = out.clone()
            delta = layer.scaling["default"] * update[:, position, rows]
            out[:, position, rows] += eps * delta
            return out

        handle = layer.register_forward_hook(hook)
        try:
            with torch.no_grad(), peft.disable_adapter():
                return read(peft(tokens).logits[:, -1])
        finally:
            handle.remove()

    for position in range(tokens.shape[1]):
        near = moved(position, step) - moved(position, -step)
        far = moved(position, 2 * step) - moved(position, -2 * step)
        parts.append((8 * near - far) / (12 * step))
    return torch.stack(parts, 1)


V_OF = {
    "gpt2": ("transformer.h.{}.attn.c_attn", slice(32, 48)),
    "opt": ("model.decoder.layers.{}.self_attn.v_proj", slice(None)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", V_OF)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_positions_are_hugging_face_s(family: str, cls: str, mode: str):
    case = cases.case(family, cls, "processed")
    tokens = models.tokens(pos=5)
    found = split(case.lens, POSITION, mode=mode)
    path, rows = V_OF[family]
    for layer in range(models.LAYERS):
        site = case.lens.site_index(f"blocks.{layer}.attn.v")
        expected = peft_parts_of_v(
            case.peft, path.format(layer), rows, tokens, lambda logits: logits[:, 5] - logits[:, 9]
        )
        assert relative(found[:, site], expected) < DIFFERENCES


# --- controls


def at_o(injection: Injection):
    return injection.map


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_constant_left_at_o_shows(cls: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    """Split where it is added, the constant is credited to the positions that read it."""
    raw, processed = (cases.case("gpt2", cls, flags).lens for flags in ("raw", "processed"))
    expected = split(raw, POSITION)
    monkeypatch.setattr(Injection, "map_by_position", property(at_o))
    monkeypatch.setattr(reverse, "require_split", lambda *args: None)
    wrong = split(processed, POSITION, mode=mode)
    assert relative(wrong, expected) > SEEN
    assert relative(wrong.sum(2), expected.sum(2)) < ROUND_OFF


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_where_a_hook_edits_attention_there_is_no_split(cls: str, mode: str):
    """Without positions the number is still that of the edited model."""
    lens = cases.case("gpt2", cls, "processed").lens
    point = next(site.read for site in lens.sites if site.name == "blocks.1.attn.o")

    def half(z: Tensor, hook: Any) -> Tensor:
        return z / 2

    def looked_at(z: Tensor, hook: Any) -> None:
        return None

    with lens.model.hooks([(point, half)]):
        with pytest.raises(
            ll.errors.ModelStateError, match=r"blocks\.1\.attn\.v: .*folded.*'position'"
        ):
            split(lens, POSITION, mode=mode)
        step = 1e-5
        ends = [lens.logits(models.tokens(pos=5), scale)[:, -1] for scale in (step, -step)]
        up, down = (logits[:, 5] - logits[:, 9] for logits in ends)
        assert relative(split(lens, (), mode=mode).sum(1), (up - down) / (2 * step)) < 1e-6
    with lens.model.hooks([(point, looked_at)]):
        assert split(lens, POSITION, mode=mode).isfinite().all()
