"""Within max_memory no forward pass has more rows than the bound has room for, in any analysis."""

from __future__ import annotations

from typing import Any

import cases
import models
import pytest
import torch
from every_call import CALLS
from passes import passes
from shapes import MORE_CASES
from shared_questions import MARGIN, QUIET

import lens_lora as ll
from lens_lora.core.function import footprint, memory
from lens_lora.core.function.footprint import Footprint, dual_pass_bytes, footprint_of

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.bad_input]
# More rows than the smallest bound has room for in a graph, in a plain pass and in one of duals.
ROWS = 40
LENGTH = 3
BRIDGE = list(models.MAKERS)[-1]


def a_lens() -> ll.LoraLens:
    return cases.case("llama", BRIDGE, "raw").lens


def need_of_a_row(lens: ll.LoraLens, length: int) -> Footprint:
    """What a row of so many tokens takes, without its logits: of what is read not all are held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "_logits_held", lambda *_: (0, 0))
        return footprint_of(lens, lens.prompts(torch.ones(1, length, dtype=torch.long)))


def beyond(lens: ll.LoraLens, seen: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The passes whose rows take more than the bound of the lens."""
    found = []
    for kind, rows, length in set(seen):
        need = need_of_a_row(lens, length)
        of_row = {
            "plain": need.in_pass,
            "graph": min(need.of_graph, need.of_rerun),
            "dual": need.of_duals,
        }[kind]
        if rows * of_row > lens.max_memory:
            found.append((kind, rows, length))
    return found


def bounds() -> list[float]:
    """What two rows of dual numbers take, which is the most of any row; twice, and all of it."""
    lens = a_lens()
    least = dual_pass_bytes(lens) + 2.2 * footprint_of(lens, lens.prompts(tokens()[:1])).of_duals
    return [least, 2 * least, 40 * least]


def tokens() -> torch.Tensor:
    return models.tokens(ROWS, LENGTH)


# How many of the three bounds are refused, the smallest ones: where even one prompt takes more, or
# what is kept is as large as the result. All other calls run under each of them.
REFUSED: dict[str, int] = {
    "forward": 2, "first_orders": 2, "frozen, forward": 2, "by token": 2, "by token and layer": 1,
    "kl_shares": 1, "path of a KL": 2, "patch_sites, a KL": 1, "explain a response": 1,
    "components": 2, "logit_shift": 2, "tangents": 2, "gradients": 2,
    "repair": 2, "g in a graph": 2,
}  # fmt: skip
# Of the calls that make hundreds of passes: still more rows than a pass of duals has room for.
FEWER_ROWS = {"together": 12, "explain_all": 12}
# The model as it is called, whose batches are the caller's; generation, which has its own test; and
# a bank, which refuses the hook that counts.
LEFT_OUT = {"logits", "generate", "counted_speech", "bank", "scan"}
# One of each kind of pass, for the quick suite.
QUICK = ("path_attribution", "second_order", "joint", "kl_shares", "patch_edges", "feature_shift")


def is_refused_within(bound: float, name: str) -> bool:
    """Whether this bound refuses the call; where it does not, no pass goes beyond it."""
    lens = a_lens()
    few = lens.within(bound)
    try:
        with passes(lens) as seen:
            CALLS[name](few, tokens()[: FEWER_ROWS.get(name, ROWS)])
    except ll.errors.ArgumentError as error:
        assert "max_memory=" in str(error)
        return True
    assert seen or name in ("weight_alignment", "intruders")
    assert not beyond(few, seen)
    return False


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", QUICK)
def test_some_analyses_keep_the_middle_bound(name: str):
    assert not is_refused_within(bounds()[1], name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in CALLS if name not in LEFT_OUT])
def test_every_analysis_keeps_the_smallest_bound_that_it_takes(name: str):
    """At night also those above it, in which there is more room."""
    refused = REFUSED.get(name, 0)
    at_night = MORE_CASES > 1
    kept = bounds()[refused:] if at_night else bounds()[refused : refused + 1]
    for bound in bounds()[:refused]:
        assert is_refused_within(bound, name)
    for bound in kept:
        assert not is_refused_within(bound, name)


# Of which kind of pass five rows fit, and what is asked.
NUMBERS: dict[str, tuple[str, Any]] = {
    "path": (
        "graph",
        lambda lens, t: (
            ll.path_attribution(lens, t, MARGIN, tol=0.5, by="position", **QUIET).values
        ),
    ),
    "norms of δz and G": (
        "graph",
        lambda lens, t: ll.foils(lens, t, MARGIN)["norm_product"].values,
    ),
    "second order": (
        "second",
        lambda lens, t: ll.second_order(lens, t, MARGIN, **QUIET).half_row_sums,
    ),
    "coupling": (
        "second",
        lambda lens, t: ll.coupling(lens, t, MARGIN, group="kind", **QUIET).matrix,
    ),
    "joint": ("dual", lambda lens, t: ll.logit_shift(lens, t, by_site=False).values),
    "divergence": ("dual", lambda lens, t: ll.kl_shares(lens, t, **QUIET).attribution.values),
    "two adapters": (
        "dual",
        lambda lens, t: (
            ll.compare_adapters(lens, lens.adapter.scaled(0.5), t, draws=0, **QUIET).function
        ),
    ),
    "activations": ("plain", lambda lens, t: ll.lora_activations(lens, t).values),
    "features": (
        "dual",
        lambda lens, t: (
            ll.feature_shift(
                lens, t, torch.eye(16).double()[:2], "blocks.1.hook_resid_post", positions="each"
            ).shift
        ),
    ),
    "features by site": (
        "plain",
        lambda lens, t: ll.feature_shift(lens, t, torch.eye(16).double()[:2], by="site").values,
    ),
    "one edge": (
        "plain",
        lambda lens, t: (
            ll.patch_edges(lens, t, MARGIN, [(lens.sites[0].name, "logits")], **QUIET).values
        ),
    ),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", NUMBERS)
def test_groups_of_prompts_have_the_numbers_of_all_together(name: str):
    """Texts of several lengths, so that a group may be shorter than the whole."""
    kind, call = NUMBERS[name]
    lens = a_lens()
    prompts = lens.prompts(["w5 w6 w7 w8", "w9", "w10 w11 w12", "w13 w14"] * 4)
    need = footprint_of(lens, prompts.at_each_token())
    of_row = {
        "plain": need.in_pass,
        "graph": need.of_graph,
        "second": memory.SECOND_ORDER_GRAPHS * need.of_graph,
        "dual": need.of_duals,
    }[kind]
    few = lens.within(5.5 * of_row + (dual_pass_bytes(lens) if kind == "dual" else 0))
    with passes(lens) as seen:
        found = call(few, prompts)
    if kind == "second":
        # The passes with a graph are those of first derivatives too, of which more rows fit.
        rows = min(rows for of, rows, _ in seen if of == "graph")
    else:
        rows = max(rows for of, rows, _ in seen if of == kind)
    assert rows < 16
    expected = call(lens, prompts)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12, equal_nan=True)


def test_two_rows_of_one_prompt_are_not_taken_for_one():
    """An answer margin runs two rows a prompt; a bound with room for one is refused."""
    lens = a_lens()
    readout = ll.AnswerMargin("w5 w7", "w8 w9")
    reading = readout.reading(lens.model, lens.prompts("w5 w6"))
    need = footprint_of(lens, reading)
    assert len(reading.owner) == 2
    of_row = min(need.of_graph, need.of_rerun)
    with pytest.raises(ll.errors.ArgumentError, match="enough for 1 of 2 rows.*of one prompt"):
        ll.first_order(lens.within(need.graphed + 1.5 * of_row), "w5 w6", readout)
    texts = ["w5 w6", "w7"]
    graphed = footprint_of(lens, readout.reading(lens.model, lens.prompts(texts))).graphed
    with passes(lens) as seen:
        found = ll.first_order(lens.within(graphed + 2.5 * of_row), texts, readout).values
    assert {rows for kind, rows, _ in seen if kind == "graph"} == {2}
    assert torch.allclose(found, ll.first_order(lens, texts, readout).values, rtol=1e-10)


def test_a_function_that_reads_all_prompts_together_is_refused():
    """It may rely on their order, so it is never shown a part of them."""
    lens = a_lens()
    wanted = torch.arange(6) + 5

    def each_its_own(logits: torch.Tensor) -> torch.Tensor:
        return logits[torch.arange(6), wanted]

    readout = ll.Readout.of(each_its_own, "each its own", "logits")
    need = footprint_of(lens, lens.prompts(models.tokens(6, 3)))
    few = lens.within(3.5 * min(need.of_graph, need.of_rerun))
    with pytest.raises(ll.errors.ArgumentError, match="a function of yours reads them together"):
        ll.first_order(few, models.tokens(6, 3), readout)
    assert ll.first_order(lens, models.tokens(6, 3), readout).values.isfinite().all()
