"""A readout's own units stand in every table, figure and story of what was read by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import models
import pytest
import torch
from every_result import every_result

import lens_lora as ll
from lens_lora.core import Drawn, Paged, Pictured, Result
from lens_lora.show import text

UNITS = "furlongs"
BRIDGE = list(models.MAKERS)[-1]
# Classes whose picture shows shares, which have no units.
SHARES = ("Faithfulness", "BestSubset", "KLShares", "ConstantPart", "ScaledIntruders")
# Classes whose story is of steps at which a sign changes, and holds no value of the readout.
OF_STEPS = ("Checkpoints",)


def has_units(value: Any) -> bool:
    """Whether it was read in units of some readout: itself, or a result within it."""
    if not dataclasses.is_dataclass(value) or isinstance(value, ll.results.ResponseExplanation):
        return False  # what explains a response chooses its readouts itself: nats
    fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return hasattr(value, "units") or any(isinstance(f, Result) and has_units(f) for f in fields)


def in_other_units(value: Any) -> Any:
    """The same result of a readout in furlongs."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        held = getattr(value, field.name)
        if field.name == "units":
            fields["units"] = UNITS
        elif isinstance(held, Result):
            fields[field.name] = in_other_units(held)
        elif isinstance(held, tuple) and held and isinstance(held[0], Result):
            fields[field.name] = tuple(map(in_other_units, held))
    return dataclasses.replace(value, **fields) if fields else value


EVERY = [in_other_units(result) for result in every_result() if has_units(result)]


@pytest.mark.sample(10)
@pytest.mark.parametrize("result", EVERY, ids=lambda result: type(result).__name__)
def test_texts_say_the_units(result: Result):
    assert UNITS in repr(result)
    if isinstance(result, Paged):
        assert UNITS in result.report()
        assert type(result).__name__ in OF_STEPS or UNITS in result.story()


@pytest.mark.parametrize(
    "result",
    [r for r in EVERY if isinstance(r, Pictured | Drawn)],
    ids=lambda result: type(result).__name__,
)
def test_figures_say_the_units(result: Any):
    if type(result).__name__ in SHARES:
        pytest.skip("its picture is of shares")
    drawn = result.plot() if isinstance(result, Pictured) else result.plot(0)
    assert UNITS in drawn.to_json()


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


def test_units_of_a_function_of_one_s_own(float64: None):
    """Through an analysis each; without units it says that they are the readout's."""
    lens = cases.case("llama", BRIDGE, "raw").lens
    text = "w5 w6"
    named = ll.Readout.of(entropy, "H", units="bits")
    assert (named.label, named.units) == ("H", "bits")
    assert ll.Readout.of(entropy, "H", "bits").units == "bits"
    assert ll.Readout.of(entropy).units == "units of the readout"
    quiet = {"progress": False}
    for found in (
        ll.first_order(lens, text, named),
        ll.first_order(lens, text, named, by="position"),
        ll.patch_sites(lens, text, named, **quiet),
        ll.remainder(lens, text, named, **quiet),
        ll.remainder_curve(lens, text, named, **quiet),
        ll.coupling(lens, text, named, group="layer", **quiet),
        ll.path_attribution(lens, text, named, tol=0.5, **quiet),
    ):
        assert (found.readout, found.units) == ("H", "bits")
        assert "H" in repr(found)
        assert "in bits" in repr(found)
        if hasattr(found, "plot"):
            assert "bits" in found.plot().to_json()


@pytest.mark.bad_input
@pytest.mark.parametrize("units", ["", "  ", None, 3])
def test_units_that_are_no_words_are_refused(units: Any):
    with pytest.raises(ll.errors.ArgumentError, match="units=.*such as 'nats'"):
        ll.Readout.of(entropy, units=units)


def test_layers_are_one_line():
    """Runs of three and more by their ends, in the order of the model, each once."""
    written = {
        (20, 24, 26, 27, 28, 29): "layers 20, 24 and 26–29",
        (3,): "layer 3",
        (3, 3): "layer 3",
        (4, 5): "layers 4 and 5",
        (5, 3, 4): "layers 3–5",
        (0, 1, 2, 9): "layers 0–2 and 9",
    }
    assert {layers: text.layers_text(layers) for layers in written} == written
