"""Which modules to leave out: a planted spoiler is found, shares are those of runs one by one."""

from __future__ import annotations

import functools
from typing import Any

import models
import pytest
import torch

import lens_lora as ll
from lens_lora.errors import ArgumentError

pytestmark = pytest.mark.usefixtures("float64")
GIVEN = models.tokens()
OTHERS = models.tokens(seed=8)
ONE = ll.Margin(5, 9)
TWO = ll.Margin(7, 11)
SPOILER = "model.layers.1.self_attn.o_proj"
USEFUL = "model.layers.1.mlp.down_proj"
QUIET: dict[str, Any] = {"progress": False}


@functools.cache
def planted() -> tuple[ll.LoraLens, dict[str, ll.Adapter]]:
    """Each adapter writes the direction of its own margin; the second one also undoes the first."""
    with models.lifted():
        base = models.hf_model("llama")
        rows = base.lm_head.weight.detach()
        of_one = rows[5] - rows[9]
        of_two = rows[7] - rows[11]
        apart = of_two - of_one * (of_one @ of_two) / (of_one @ of_one)
        first = _writing(base, SPOILER, of_one)
        second = _writing(base, USEFUL, 0.2 * apart)
        undone = ll.LoRAFactors(first.A, first.B, -0.8 * first.scale)
        adapters = {
            "one": ll.Adapter.from_factors({SPOILER: first}),
            "two": ll.Adapter.from_factors({SPOILER: undone, USEFUL: second}),
        }
        lens = ll.LoraLens(next(iter(models.MAKERS.values()))(base), adapters["one"])
    return lens, adapters


def _writing(base: Any, path: str, direction: torch.Tensor) -> ll.LoRAFactors:
    """A module's update of rank one, which writes this direction."""
    width = base.get_submodule(path).in_features
    read = torch.randn(1, width, generator=models.seeded(5), dtype=torch.float64)
    return ll.LoRAFactors(read, direction[:, None].double(), 1.0)


HOLD = {"one": (GIVEN, ONE), "two": (GIVEN, TWO)}


def ask(**changed: Any) -> ll.results.Reconciled:
    lens, adapters = planted()
    arguments: dict[str, Any] = {"hold": HOLD, "leave_out_of": "two"}
    return ll.reconcile(lens, adapters, **(arguments | changed), **QUIET)


def test_a_planted_spoiler_is_left_out():
    test = {"one": (OTHERS, ONE), "two": (OTHERS, TWO)}
    found = ask(test=test)
    assert found.left_out == (SPOILER,)
    assert found.held[0, 0] < 0.5, "both on, the first behaviour is lost"
    assert found.held[1].min() > found.held[[0, 2, 3]].amin(1).max()
    assert found.held_out is not None
    assert found.held_out[1, 0] > found.held_out[0, 0]


def test_shares_are_those_of_runs_one_by_one():
    lens, adapters = planted()
    found = ask()
    one, two = (adapters[name].named(name) for name in ("one", "two"))
    for behaviour, (name, readout) in enumerate((("one", ONE), ("two", TWO))):
        alone = lens.with_adapter(adapters[name]).function(GIVEN, readout)
        base, with_its_own = alone.ends
        own = with_its_own - base
        states = {0: one + two, 1: one + two.without_modules(*found.left_out)}
        for state, adapter in states.items():
            _, both = lens.with_adapter(adapter).function(GIVEN, readout).ends
            share = ((both - base) * own.sign()).sum() / own.abs().sum()
            assert (found.held[state, behaviour] - share).abs() < 1e-9


def test_where_nothing_is_in_the_way_nothing_is_left_out():
    lens, adapters = planted()
    apart = {"one": adapters["one"], "two": adapters["two"].only(USEFUL)}
    hold = {"one": (GIVEN, ONE), "two": (GIVEN, TWO)}
    found = ll.reconcile(lens, apart, hold, "two", **QUIET)
    assert found.held[1].min() >= found.held[0].min()
    frame = found.to_frame()
    assert frame["keep"].tolist() == found.held.T.flatten().tolist()


def test_it_comes_back_from_a_file(tmp_path: Any):
    found = ask()
    again = ll.load_result(found.save(tmp_path / "reconciled.safetensors"))
    assert isinstance(again, ll.results.Reconciled)
    assert again.left_out == found.left_out
    assert torch.equal(again.held, found.held)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hold": {"one": (GIVEN, ONE)}}, "two or more behaviours"),
        ({"hold": {"one": (GIVEN, ONE), "three": (GIVEN, TWO)}}, "three"),
        ({"hold": {"one": GIVEN, "two": (GIVEN, TWO)}}, "prompts and a readout"),
        ({"leave_out_of": "three"}, "leave_out_of"),
        ({"test": {"one": (OTHERS, ONE)}}, "two or more behaviours"),
        ({"draws": 0}, "draws"),
    ],
    ids=["one behaviour", "no adapter of that name", "no pair", "of none", "test of one", "draws"],
)
def test_what_cannot_be_asked_is_refused(changed: dict[str, Any], words: str):
    with pytest.raises(ArgumentError, match=words):
        ask(**changed)


def test_a_behaviour_that_its_adapter_does_not_move_is_refused():
    lens, adapters = planted()
    silent = {"one": adapters["one"].scaled(0.0), "two": adapters["two"]}
    with pytest.raises(ArgumentError, match="no behaviour to hold"):
        ll.reconcile(lens, silent, HOLD, "two", **QUIET)
