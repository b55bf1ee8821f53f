"""The remainder: its order, its zero, its noise, its verdict."""

from __future__ import annotations

import cases
import models
import pytest
import reference
import torch
from differences import largest_difference
from two_scalars import scalar_lens

import lens_lora as ll
from lens_lora.core.analyses.remainder import orders
from lens_lora.core.analyses.verdict import Noise

MARGIN = ll.Margin(5, 9)


@pytest.mark.parametrize(("family", "cls", "flags"), cases.CASES)
@pytest.mark.usefixtures("float64")
def test_remainder_is_of_second_order(family: str, cls: str, flags: str):
    """Slope 2.0 ± 0.05 in ε (note, Assumption 2)."""
    lens = cases.case(family, cls, flags).lens
    curve = ll.remainder_curve(lens, models.tokens(), MARGIN, progress=False)
    assert largest_difference(curve.order, 2) < 0.05


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_a_wrong_first_order_has_order_one(cls: str):
    """Negative control: with 1 % of first order missing the fitted order falls to 1."""
    lens = cases.case("llama", cls, "raw").lens
    curve = ll.remainder_curve(lens, models.tokens(), MARGIN, progress=False)
    wrong = curve.remainder + 0.01 * curve.first_order
    assert (orders(curve.scales, wrong, curve.remainder_floor) < 1.5).all()


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_single_sites_equal_plain_runs(cls: str):
    """g(e_l) batched equals one plain `run_with_hooks` a site."""
    lens = cases.case("qwen2", cls, "processed").lens
    tokens = models.tokens()
    found = ll.remainder(lens, tokens, MARGIN, by_site=True, progress=False)
    base = reference.plain_readout(lens, tokens, MARGIN, lens.gates(0.0))
    for i in range(len(lens.sites)):
        gates = torch.eye(len(lens.sites), dtype=torch.float64)[i]
        plain = reference.plain_readout(lens, tokens, MARGIN, gates) - base
        assert largest_difference(found.site_shift[:, i], plain) < 1e-10
    assert ((found.site_shift - found.site_first_order).abs().max(1).values > 1e-6).all()


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.usefixtures("float64")
def test_last_linear_map_alone_leaves_nothing_without_a_norm_after_it(cls: str):
    """Zero iff linear: the last down projection leaves a remainder through the final norm only."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    found = ll.remainder(lens, tokens, MARGIN, by_site=True, progress=False)
    last = [s.name for s in lens.sites].index("blocks.1.mlp.down")
    assert (found.site_shift - found.site_first_order)[:, last].abs().min() > 1e-6

    frozen_scale = {}

    def freeze(tensor, hook):
        return frozen_scale.setdefault(tensor.shape, tensor.detach().clone())

    scale = "ln_final.hook_scale"
    gates = torch.zeros(len(lens.sites), dtype=torch.float64)
    gates[last] = 1.0
    read = MARGIN.of_logits(lens.model, len(tokens))

    def g(eps: float):
        hooks = [*lens.fwd_hooks(gates * eps), (scale, freeze)]
        with torch.no_grad():
            out = lens.model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
        return read(out[:, -1])

    base = g(0.0)
    assert largest_difference(g(1.0) - base, 1e3 * (g(1e-3) - base)) < 1e-9


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("cls", models.MAKERS)
def test_noise_floor_tells_the_truth(cls: str, family: str, dtype: torch.dtype):
    """The measured floor is the σ of the shift's error on the same weights: 3σ holds the error."""
    base = models.hf_model(family, dtype=dtype)
    peft = models.peft_model(family, base)
    tokens = models.tokens(batch=8)
    low = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft))
    with models.lifted(), torch.no_grad():
        exact = [m.double()(tokens).logits[:, -1] for m in (peft, base)]
    curve = ll.remainder_curve(low, tokens, MARGIN, [1.0])
    read = MARGIN.of_logits(low.model, len(tokens))
    error = (curve.shift[:, 0].double() - (read(exact[0]) - read(exact[1]))).abs()
    floor = curve.noise_floor.double()
    ratio = float(error.square().mean().sqrt() / floor.mean())
    assert 1 / 3 < ratio < 3, ratio
    assert (error > 3 * floor).sum() <= 1


def test_verdict_below_the_noise():
    """A vanishing adapter on a float32 model: the shift is rounding, and the verdict says so."""
    base = models.hf_model("llama", dtype=torch.float32)
    peft = models.peft_model("llama", base)
    (maker, *_) = models.MAKERS.values()
    lens = ll.LoraLens(maker(base), ll.Adapter.from_peft(peft).scaled(1e-8))
    found = ll.remainder(lens, models.tokens(), MARGIN)
    assert all(v.kind == "no_shift" for v in found.verdict)
    curve = ll.remainder_curve(lens, models.tokens(), MARGIN, progress=False)
    assert curve.order.isnan().all()


def hand_made(first_order: float, ratios: list[float]) -> ll.results.Remainder:
    scales = (0.25, 0.5, 0.75)
    moved = [e * first_order / (1 - r) for e, r in zip(scales, ratios, strict=True)]
    return ll.results.Remainder(
        base=torch.tensor([0.0]),
        adapted=torch.tensor([10.0]),
        str_tokens=(("a",),),
        first_order=torch.tensor([first_order]),
        noise=Noise(*torch.full((3, 1), 1e-3)),
        path_scales=scales,
        path_shift=torch.tensor([moved]),
        sites=(),
        site_first_order=torch.zeros(1, 0),
        site_shift=None,
        readout="y",
        units="logits",
        meta={},
    )


@pytest.mark.parametrize(
    ("first_order", "ratios", "verdict"),
    [
        (9.84, [0.45, 0.38, 0.2], "a coincidence at ε = 1: 1.6% of the shift there, but 45%"),
        (9.9, [0.01, 0.02, 0.03], "small: 1.0% of the shift at ε = 1, at most 3.0%"),
        (9.96, [4e-3, 4e-3, 4e-3], "small: 0.4% of the shift at ε = 1, at most 0.4%"),
        (5.0, [0.1, 0.2, 0.3], "large: 50% of the shift at ε = 1"),
        (9.9999, [0.01, 0.01, 0.01], "below the noise: the remainder"),
    ],
)
def test_verdicts(first_order: float, ratios: list[float], verdict: str):
    """Agreement at ε = 1 with a large remainder on the way is called what it is."""
    found = hand_made(first_order, ratios)
    assert found.verdict[0].worst == pytest.approx(max(ratios), abs=1e-6)
    assert str(found.verdict[0]).startswith(verdict)


def test_single_sites_are_not_run_unasked():
    found = ll.remainder(scalar_lens(torch.square), torch.tensor([[3]]), ll.Logit(0))
    assert found.site_shift is None
