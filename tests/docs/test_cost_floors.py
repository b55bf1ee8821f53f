"""The floor of an analysis runs the passes of the analysis, or is refused."""

from __future__ import annotations

import cases
import models
import pytest

import lens_lora as ll
from benchmarks import measuring
from benchmarks.cost import floors, works

MARGIN = ll.Margin(5, 9)


@pytest.fixture
def lens(monkeypatch: pytest.MonkeyPatch) -> ll.LoraLens:
    for module in (floors, measuring, works):
        monkeypatch.setattr(module, "MARGIN", MARGIN)
    return cases.case("llama", list(models.MAKERS)[-1], "raw").lens


def test_passes_are_counted_with_their_rows_and_backward_passes(lens: ll.LoraLens):
    prompts = lens.prompts(models.tokens(2, 5))

    def three_passes() -> None:
        measuring.plain_forward(lens, prompts)
        measuring.plain_backward(lens, prompts)
        floors.dual_to_embeddings(lens, lambda: lens.run(prompts))

    found = floors.passes_of(lens, three_passes)
    assert found == [("plain", 2, 5, 0), ("graph", 2, 5, 1), ("dual", 2, 5, 1)]
    texts = ["forward of 2 rows", "graph of 2 rows and back", "dual of 2 rows and back"]
    assert [str(one) for one in found] == texts


@pytest.mark.parametrize("name", ["first_order, with its exact shift", "kl_shares"])
def test_the_passes_of_an_analysis_are_run_in_its_place(lens: ll.LoraLens, name: str):
    prompts = lens.prompts(models.tokens(1, 5))
    (work,) = [work for work in works.ANALYSES if work.name == name]
    runs = floors.runs_of_analysis(lens, prompts, work)
    assert runs.passes
    for run in (runs.analysis, runs.alone, runs.written):
        assert floors.passes_of(lens, run) == runs.passes


def test_passes_over_other_tokens_than_the_prompt_are_refused(lens: ll.LoraLens):
    longer = lens.prompts(models.tokens(1, 7))

    def run(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
        measuring.plain_forward(lens, prompts)
        measuring.plain_forward(lens, longer)

    prompts = lens.prompts(models.tokens(1, 5))
    two_lengths = works.Work("two lengths", run)
    with pytest.raises(SystemExit, match="two lengths .* not run in its place"):
        floors.runs_of_analysis(lens, prompts, two_lengths)
