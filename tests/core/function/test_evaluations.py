"""A public call tokenises its prompts and binds its readout once, and runs nothing twice."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import cases
import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.function import memory
from lens_lora.core.function.many_gates import gated_readout
from lens_lora.core.readout.reading import Reading

PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]
POINT = "blocks.0.hook_resid_post"
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
Call = Callable[[ll.LoraLens, ll.Readout], object]


def quiet(verb: Callable[..., object], *args: object, **options: object) -> Call:
    return lambda lens, readout: verb(lens, PROMPTS, readout, *args, progress=False, **options)


# At most so many forward passes of the two prompts, S sites; backward passes come beside them.
VERBS: dict[str, tuple[Call, Callable[[int], int]]] = {
    "components": (quiet(ll.components), lambda S: 1 + S + 1),
    "coupling": (quiet(ll.coupling), lambda S: 3),
    "faithfulness": (
        quiet(ll.faithfulness, torch.ones(14), fractions=[0.5], draws=2),
        lambda S: 2 + 10 + 1 + 2 * 2 * 5,
    ),
    "first_order": (quiet(ll.first_order), lambda S: 3),
    "null_test": (quiet(ll.null_test, draws=2), lambda S: 3 + 10 + 2 * 2),
    "patch_sites": (quiet(ll.patch_sites), lambda S: 2 + S + 5),
    "path_attribution": (quiet(ll.path_attribution, max_nodes=5), lambda S: 5 + 8),
    "reliability": (quiet(ll.reliability, how="leave_one_out"), lambda S: 3 + 10 + S),
    "remainder": (quiet(ll.remainder), lambda S: 5 + 10 + 3),
    "remainder_curve": (quiet(ll.remainder_curve), lambda S: 5 + 10 + 22),
    "second_order": (quiet(ll.second_order), lambda S: 5 + 10 + 22 + 5),
}


class Counts:
    """How often prompts were tokenised, a readout bound, and rows run."""

    tokenised = bound = rows = 0


@contextlib.contextmanager
def counting(lens: ll.LoraLens, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    counts = Counts()
    tokenise = ll.LoraLens.prompts
    reading = ll.Margin.reading

    def prompts(self, given):
        counts.tokenised += not isinstance(given, ll.results.Prompts)
        return tokenise(self, given)

    def reading_of(self, model, ready):
        counts.bound += 1
        return reading(self, model, ready)

    def row(module, args):
        counts.rows += len(args[0])

    with monkeypatch.context() as patch:
        patch.setattr(ll.LoraLens, "prompts", prompts)
        patch.setattr(ll.Margin, "reading", reading_of)
        handle = lens.model.unembed.register_forward_pre_hook(row)
        yield counts
        handle.remove()


@pytest.mark.parametrize("verb", VERBS)
@CLASSES
def test_a_verb_asks_once(verb: str, cls: str, monkeypatch):
    lens = cases.case("llama", cls, "raw").lens
    call, passes = VERBS[verb]
    with counting(lens, monkeypatch) as counts:
        call(lens, ll.Margin(5, 9))
    assert (counts.tokenised, counts.bound) == (1, 1)
    assert counts.rows <= len(PROMPTS) * passes(len(lens.sites))


@CLASSES
def test_explain_asks_once_and_runs_nothing_that_it_has(cls: str, monkeypatch):
    """Its interventions, curves and path take what they take alone; ends and noise come once."""
    lens = cases.case("llama", cls, "raw").lens
    S = len(lens.sites)
    layers = lens.plan.host.n_layers
    with counting(lens, monkeypatch) as counts:
        found = ll.explain(lens, PROMPTS[0], " w5", " w9", progress=False)
    assert (counts.tokenised, counts.bound) == (1, 1)
    roots = 30 if found.margin.flips[0] else 0
    margin = 1 + 2 + 9 + 23 + roots
    tokens = 2 * (1 + 8 + 2)
    ends = 1 + 1
    nodes = 17
    curves = 2 * 5 * (3 + 3) * 5 + 1
    assert counts.rows <= margin + tokens + ends + 2 * S + layers + nodes + curves
    with counting(lens, monkeypatch) as again:
        ll.reliability(lens, PROMPTS[0], ll.Margin(5, 9), progress=False)
    assert again.rows > 0


@CLASSES
def test_what_is_handed_on_is_what_the_verbs_find(cls: str):
    """The parts of an explanation equal the verbs' own results."""
    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        found = ll.explain(lens, PROMPTS[0], " w5", " w9", null=2, progress=False)
        args = (lens, PROMPTS[0], ll.Margin(" w5", " w9"))
        for how, flags in found.reliability.items():
            alone = ll.reliability(*args, how=how, progress=False)
            assert torch.allclose(flags.correction, alone.correction, equal_nan=True, atol=1e-12)
            assert torch.equal(flags.flagged, alone.flagged)
            assert flags.passes == alone.passes
        second = ll.second_order(*args, progress=False)
        assert torch.allclose(found.second_order.half_row_sums, second.half_row_sums, atol=1e-12)
        null = ll.null_test(*args, draws=2, progress=False)
        assert found.null is not None
        assert torch.allclose(found.null.null, null.null, atol=1e-12)
        assert torch.allclose(found.null.noise_floor, null.noise_floor)


@CLASSES
def test_memory_bounds_the_tangents_of_components_and_first_order(cls: str, monkeypatch):
    """Fewer rows at once, the same numbers; less than one site takes is refused."""
    from lens_lora.core.function.footprint import dual_copy_bytes, dual_pass_bytes

    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        R = ll.Margin(5, 9)
        longest = lens.prompts(PROMPTS[1])
        bytes_of_three = dual_pass_bytes(lens) + 3 * dual_copy_bytes(lens, longest, 2)
        calls: dict[str, Call] = {
            "first_order": lambda lens, bound: (
                ll.first_order(
                    lens, PROMPTS, R, mode="forward", max_memory=bound, progress=False
                ).values
            ),
            "components": lambda lens, bound: (
                ll.components(lens, PROMPTS, R, max_memory=bound, progress=False).gain
            ),
        }
        for call in calls.values():
            most: list[int] = []
            handle = lens.model.unembed.register_forward_pre_hook(
                lambda module, args, most=most: most.append(len(args[0]))
            )
            whole = call(lens, None)
            bounded = len(most)
            few = call(lens, bytes_of_three)
            handle.remove()
            assert max(most[bounded:]) <= 4 < max(most[:bounded])
            assert torch.allclose(few, whole, rtol=1e-10, equal_nan=True)
            with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
                call(lens, 1.0)


@CLASSES
def test_ends_ride_in_passes_that_are_run_anyway(cls: str):
    """g(0) and g(1) beside other gates are those run alone; later gates do not repeat them."""
    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        alone, riding = (Evaluations(lens.function(PROMPTS, ll.Margin(5, 9))) for _ in range(2))
        half = lens.gates(0.5)[None]
        values = riding(half)
        assert torch.allclose(riding.ends, alone.ends, rtol=1e-12)
        assert torch.allclose(alone(half), values, rtol=1e-12)


def spread(logits: Tensor) -> Tensor:
    return logits.std(-1) + torch.arange(len(logits)).to(logits)


READOUTS = {
    "margin": ll.Margin(5, 9),
    "answers of two tokens": ll.Margin([5, 6], [9, 7]),
    "response": ll.AnswerLogProb(" w5 w9 w3"),
    "own function": ll.Readout.of(spread),
    "KL": ll.KL(),
}


@CLASSES
@pytest.mark.parametrize(
    ("at", "name"),
    # A divergence has no derivative at the base.
    [(at, name) for at in (0.0, 0.37, 1.0) for name in READOUTS if (at, name) != (0.0, "KL")],
)
def test_the_pass_of_slopes_shows_the_ends(cls: str, name: str, at: float, monkeypatch):
    """Riding in it, or a pass each but for the one that it is, they are g(0) and g(1) run alone."""
    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        ends = Evaluations(lens.function(PROMPTS, READOUTS[name])).ends
        found = []
        for bound in (10**6, 0):
            monkeypatch.setattr(memory, "RIDING_TOKENS", bound)
            with counting(lens, monkeypatch) as counts:
                found.append(ll.first_order(lens, PROMPTS, READOUTS[name], at=at))
            if name == "margin":
                assert counts.rows == len(PROMPTS) * (3 if at == 0.37 else 2)
        for attribution in found:
            assert torch.allclose(attribution.base, ends[0], rtol=1e-12, atol=1e-14)
            assert torch.allclose(attribution.adapted, ends[1], rtol=1e-12)
        assert torch.allclose(found[0].values, found[1].values, rtol=1e-10, atol=1e-14)


@CLASSES
def test_several_readouts_share_the_passes_of_their_ends(cls: str, monkeypatch):
    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        readouts = [ll.Margin(5, 9), ll.Logit(3)]
        for at, passes in ((0.0, 2), (1.0, 2), (0.37, 3)):
            with counting(lens, monkeypatch) as counts:
                several = ll.first_order(lens, PROMPTS, readouts, at=at, progress=False)
            assert counts.rows == passes * len(PROMPTS)
            for attribution, readout in zip(several, readouts, strict=True):
                base, adapted = Evaluations(lens.function(PROMPTS, readout)).ends
                assert torch.allclose(attribution.base, base, rtol=1e-12)
                assert torch.allclose(attribution.adapted, adapted, rtol=1e-12)


@CLASSES
@pytest.mark.parametrize("known", [True, False])
def test_an_end_among_the_points_is_not_run_again(
    cls: str, known: bool, monkeypatch: pytest.MonkeyPatch
):
    run: list[int] = []

    def counted(lens: ll.LoraLens, reading: Reading, gates: Tensor, **said: Any) -> Tensor:
        run.append(len(gates))
        return gated_readout(lens, reading, gates, **said)

    monkeypatch.setattr("lens_lora.core.function.many_gates.gated_readout", counted)
    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        g = Evaluations(lens.function(PROMPTS, ll.Margin(5, 9)))
        other = Evaluations(lens.function(PROMPTS, ll.Margin(5, 9)))
        base, adapted = (g if known else other).ends
        run.clear()
        points = torch.stack([lens.gates(e) for e in (1.0, 0.5, 0.0, 1.0)])
        values = g(points)
        assert run == [1 if known else 3]
        for point, end in zip((0, 2, 3), (adapted, base, adapted), strict=True):
            assert torch.allclose(values[point], end, rtol=1e-12)
        ends_alone = g(points[[2, 0]])
        assert torch.equal(ends_alone, g.ends)
        assert len(run) == 1
        half = Evaluations(lens.function(PROMPTS, ll.Margin(5, 9)))(points[1])
        assert torch.allclose(values[1], half, rtol=1e-12)


@CLASSES
@pytest.mark.parametrize("case", ["all sites", "last block", "8 bit"])
def test_the_path_and_the_draws_share_a_pass(cls: str, case: str, monkeypatch):
    """Not where points share their blocks, nor where rows of a batch change one another."""
    run: list[int] = []
    plain = ll.LoraLens.run

    def counted(lens: ll.LoraLens, rows: ll.results.Prompts) -> Tensor:
        run.append(rows.batch)
        return plain(lens, rows)

    with models.lifted():
        lens = cases.case("llama", cls, "raw").lens
        if case == "last block":
            lens = lens.with_adapter(lens.adapter.only("*layers.1.*"))
        reading = lens.function(PROMPTS, ll.Margin(5, 9)).reading
        scales = [0.1, 0.25, 0.5]
        gates = torch.stack([lens.gates(scale) for scale in scales])
        expected = gated_readout(lens, reading, gates)
        if case == "8 bit":
            monkeypatch.setattr(type(lens.plan), "activation_rounding", 2.0**-52)
        monkeypatch.setattr(ll.LoraLens, "run", counted)
        curve = ll.remainder_curve(lens, PROMPTS, ll.Margin(5, 9), scales, progress=False)
    batches = {
        "all sites": [5, 1 + 8 + 3],  # slopes and their draws; g(1), eight draws, the path
        "8 bit": [1, 4, 1 + 3, 8],
    }
    if case == "last block":
        assert run[0] == 2 * 5
        assert run[-1] == 2 * 8
        assert run[1:-1] == [1, 1]  # a tree of each prompt
    else:
        assert run == [2 * rows for rows in batches[case]]
    assert torch.allclose(curve.values, expected, rtol=1e-12)


def test_what_needs_a_readout_says_so():
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    f = lens.function(PROMPTS)
    assert f.str_tokens[0][-1] == "w8"
    with pytest.raises(ll.errors.ArgumentError, match="no readout"):
        _ = f.ends
