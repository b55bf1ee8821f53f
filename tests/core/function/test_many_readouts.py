"""Several readouts at once give what each alone gives."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from differences import largest_difference

import lens_lora as ll

pytestmark = pytest.mark.usefixtures("float64")
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
READOUTS = [
    ll.Margin(5, 9),
    ll.LogProb("w7"),
    ll.AnswerMargin("w5 w7", "w8"),
    ll.Logit([3, 4]),
    ll.Readout.of(lambda logits: logits.logsumexp(-1), label="log Z"),
]


@CLASSES
@pytest.mark.parametrize(("family", "flags"), [("llama", "raw"), ("gpt2", "processed")])
@pytest.mark.parametrize("at", [0.0, 0.8])
def test_each_equals_its_own_first_order(family: str, flags: str, at: float, cls: str):
    lens = cases.case(family, cls, flags).lens
    found = ll.first_order(lens, PROMPTS, READOUTS, at=at, progress=False)
    for mine, readout in zip(found, READOUTS, strict=True):
        alone = ll.first_order(lens, PROMPTS, readout, at=at)
        size = alone.values.abs().max()
        assert largest_difference(mine.values, alone.values) < 1e-11 * size
        for name in ("base", "adapted"):
            assert torch.allclose(getattr(mine, name), getattr(alone, name), rtol=1e-12)
        for name in ("readout", "units", "method", "at", "sites", "str_tokens", "meta"):
            assert getattr(mine, name) == getattr(alone, name)


@CLASSES
def test_any_number_at_once(cls: str):
    from lens_lora.core.function.footprint import dual_copy_bytes, dual_pass_bytes

    lens = cases.case("llama", cls, "raw").lens
    readouts = [ll.Logit(i) for i in range(7)]
    whole = ll.first_order(lens, PROMPTS, readouts, progress=False)
    memory = dual_pass_bytes(lens) + 3 * dual_copy_bytes(lens, lens.prompts(PROMPTS), 2)
    few = ll.first_order(lens, PROMPTS, readouts, max_memory=memory, progress=False)
    for one, other in zip(whole, few, strict=True):
        assert torch.allclose(one.values, other.values, rtol=1e-11, atol=1e-14)


@pytest.mark.bad_input
def test_what_is_no_readout_is_refused():
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    with pytest.raises(ll.errors.ArgumentError, match="or a list of at least one"):
        ll.first_order(lens, PROMPTS, [])
    with pytest.raises(ll.errors.ArgumentError, match="a list of readouts is"):
        ll.first_order(lens, PROMPTS, ["w7"])


@CLASSES
def test_readouts_that_are_mixed_up_would_show(cls: str, monkeypatch):
    """The control: covectors in another order give each readout another's values."""
    from lens_lora.core.function.gate_graph import GateGraph

    lens = cases.case("llama", cls, "raw").lens
    right = ll.first_order(lens, PROMPTS, READOUTS[:2], progress=False)
    pulled_back = GateGraph.pulled_back
    monkeypatch.setattr(
        GateGraph,
        "pulled_back",
        lambda graph, v, covectors: pulled_back(graph, v, covectors.flip(0)),
    )
    wrong = ll.first_order(lens, PROMPTS, READOUTS[:2], progress=False)
    assert largest_difference(wrong[0].values, right[0].values) > 1e-3


ODD_OPTIONS = {
    "a misspelt name": {"gague": "svd"},
    "another misspelt name": {"ruels": 1},
    "rules=False": {"rules": False},
    "rules=0": {"rules": 0},
    "by=0": {"by": 0},
    "by=''": {"by": ""},
    "by=None": {"by": None},
    "mode=None": {"mode": None},
    "gauge=None": {"gauge": None},
    "a gauge without ranks": {"gauge": "svd"},
    "at=None": {"at": None},
    "group=0": {"group": 0},
}


@pytest.mark.bad_input
@pytest.mark.parametrize("options", ODD_OPTIONS.values(), ids=ODD_OPTIONS)
def test_several_readouts_refuse_what_one_refuses(options: dict[str, object]):
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    with pytest.raises((ll.errors.ArgumentError, TypeError)) as of_one:
        ll.first_order(lens, PROMPTS, READOUTS[0], **options)
    for readouts in (READOUTS[:1], READOUTS[:2]):
        with pytest.raises(of_one.type):
            ll.first_order(lens, PROMPTS, readouts, progress=False, **options)
