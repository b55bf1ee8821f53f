"""Every target and every family: heads, embeddings, biases, DoRA; exact, and differentiated right.

What the host library gets wrong or cannot build is named in `refusal`, and seen to be refused.
"""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference
from targets import EVERY, EXACT, HOST_ERROR, MARGIN, ROUND_OFF, base_for, hooked, peft_with

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")


def refusal(family: str, cls: str, flags: str, target: str) -> str | None:
    """The message with which this cell must be refused, if it must."""
    is_of_rows = target in ("embedding", "token_rows")
    if (family, cls) == ("bloom", "HookedTransformer") and is_of_rows:
        return "normalises inside its embedding"
    trains_betas = target == "norms" or (target == "bias_all" and family != "qwen2")
    if flags == "processed" and trains_betas:
        return "folded into the weights that read the norm"
    if family == "mixtral" and not models.is_built_right(family, cls, flags):
        return "its weights show that they were not|computes other logits than hf_model"
    return None


def lens_of_gpt2(cls: str, target: str) -> ll.LoraLens:
    """A processed GPT-2 with an adapter of this target."""
    base, model = hooked("gpt2", cls, "processed")
    adapter = ll.Adapter.from_peft(peft_with("gpt2", base, target))
    return ll.LoraLens(model, adapter, hf_model=base)


def is_not_built(family: str, cls: str, flags: str) -> bool:
    """Whether the host library cannot build the model at all."""
    return family == "phi" and not models.is_built_right(family, cls, flags)


NOT_BUILT: list[tuple[str, str, str]] = []
REFUSED: list[tuple[str, str, str, str]] = []
EXACT_CELLS: list[tuple[str, str, str, str]] = []
for family, cls, flags, target in EVERY:
    if is_not_built(family, cls, flags):
        NOT_BUILT.append((family, cls, flags))
    elif refusal(family, cls, flags, target) is not None:
        REFUSED.append((family, cls, flags, target))
    else:
        EXACT_CELLS.append((family, cls, flags, target))


@pytest.mark.sample(6)
@pytest.mark.parametrize(("family", "cls", "flags", "target"), REFUSED)
def test_what_the_host_library_gets_wrong_is_refused(
    family: str, cls: str, flags: str, target: str
):
    base, model = hooked(family, cls, flags)
    adapter = ll.Adapter.from_peft(peft_with(family, base, target))
    message = refusal(family, cls, flags, target)
    with pytest.raises(ll.errors.ModelStateError, match=message):
        ll.LoraLens(model, adapter, hf_model=base_for(base, flags, target))


@pytest.mark.parametrize(("family", "cls", "flags"), sorted(set(NOT_BUILT)))
def test_what_the_host_library_cannot_build(family: str, cls: str, flags: str):
    """Left out everywhere else; should it be built one day, this fails, and it comes back in."""
    with pytest.raises(AttributeError, match="partial_rotary_factor"):
        models.MAKERS[cls](models.hf_model(family), **cases.FLAGS[flags])


@pytest.mark.sample(11)
@pytest.mark.parametrize(("family", "cls", "flags", "target"), EXACT_CELLS)
def test_exact_and_differentiated_on_every_target(family: str, cls: str, flags: str, target: str):
    """f(1) is PEFT's; forward equals reverse at ε = 1; parts sum to sites.

    Derivatives of a raw model are not taken if those of the processed one are, which has its norms
    folded and is therefore the harder case.
    """
    base, model = hooked(family, cls, flags)
    peft = peft_with(family, base, target)
    adapter = ll.Adapter.from_peft(peft)
    lens = ll.LoraLens(model, adapter, hf_model=base_for(base, flags, target))
    tokens = models.tokens()

    with torch.no_grad():
        adapted = cases.centred(peft(tokens).logits)
        plain = cases.centred(base(tokens).logits)
    bound = HOST_ERROR.get((family, cls), EXACT)
    assert largest_difference(cases.centred(lens.logits(tokens, 0.0)), plain) < bound
    assert largest_difference(cases.centred(lens.logits(tokens)), adapted) < bound
    assert largest_difference(adapted, plain) > 0.05
    is_derived_elsewhere = flags == "raw" and (family, cls, "processed", target) in EXACT_CELLS
    if is_derived_elsewhere:
        return

    reverse = ll.first_order(lens, tokens, MARGIN, at=1.0)
    forward = ll.first_order(lens, tokens, MARGIN, at=1.0, mode="forward", progress=False)
    split = ll.first_order(lens, tokens, MARGIN, at=1.0, by=("position", "head", "rank"))
    bound = ROUND_OFF * float(reverse.values.abs().max())
    assert largest_difference(forward.values, reverse.values) < bound
    assert largest_difference(split.per_site, reverse.values) < bound
    sum_of_table = split.to_frame()["value"].sum()
    assert abs(sum_of_table - float(split.values.sum())) < bound


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("target", ["lm_head", "embedding", "positions", "lora_bias", "dora"])
def test_first_order_of_every_target_against_differences(target: str, cls: str):
    """∂g/∂ε of PEFT's own model, by central differences through the lens' exact f."""
    lens = lens_of_gpt2(cls, target)
    tokens = models.tokens()
    read = MARGIN.of_logits(lens.model, len(tokens))

    def g(scale: float) -> torch.Tensor:
        return read(lens.logits(tokens, scale)[:, -1])

    step = 1e-5
    difference = (g(1 + step) - g(1 - step)) / (2 * step)
    found = ll.first_order(lens, tokens, MARGIN, at=1.0).total
    assert largest_difference(found, difference) < 1e-7 * found.abs().max()


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("target", ["lm_head", "embedding", "positions", "lora_bias"])
def test_parts_of_every_target_agree_in_both_modes(target: str, cls: str):
    """Positions and heads, forward against reverse, with padding."""
    lens = lens_of_gpt2(cls, target)
    texts = ["w5 w7 w8", "w9 w10 w11 w12"]
    by = ("position", "head")
    reverse = ll.first_order(lens, texts, MARGIN, by=by)
    forward = ll.first_order(lens, texts, MARGIN, by=by, mode="forward", progress=False)
    bound = ROUND_OFF * reverse.values.abs().max()
    assert largest_difference(forward.values, reverse.values) < bound
    parts = ll.components(lens, texts, MARGIN, progress=False)
    assert largest_difference(parts.first_order, reverse.per_site) < bound


@models.NEEDS_HOOKED_TRANSFORMER
def test_what_needs_the_base_says_so():
    """Trained biases on a HookedTransformer, DoRA on centred weights: the remedy is named."""
    base = models.hf_model("gpt2")

    biased = ll.Adapter.from_peft(peft_with("gpt2", base, "lora_only"))
    plain = models.hooked_transformer(base)
    with pytest.raises(ll.errors.ModelStateError, match="trained bias.*hf_model"):
        ll.LoraLens(plain, biased)

    dora = ll.Adapter.from_peft(peft_with("gpt2", base, "dora")).only("*mlp.c_proj")
    centred = models.hooked_transformer(base, center_writing_weights=True)
    with pytest.raises(ll.errors.ModelStateError, match="DoRA.*centred.*hf_model"):
        ll.LoraLens(centred, dora)
