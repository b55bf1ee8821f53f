"""`explain` of a readout: parts that are the functions' own, of the logits or inside the model."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

import by_folder
import cases
import models
import pytest
import reference
import torch
from results_by_hand import without_plotly
from torch import Tensor

import lens_lora as ll
from lens_lora.errors import ArgumentError

readout_explanation = by_folder.made_public("explanations").readout_explanation

pytestmark = pytest.mark.usefixtures("float64")
TOKENS = models.tokens()
QUIET: dict[str, Any] = {"progress": False}
POINT = "blocks.0.hook_resid_post"
CLASSES = list(models.MAKERS)
NULL = 3


def projection(case: cases.Case) -> ll.Projection:
    width = int(case.model.cfg.d_model)
    d = torch.randn(width, generator=models.seeded(17), dtype=torch.float64)
    return ll.Projection(d, POINT)


Explained = tuple[cases.Case, ll.Projection, ll.results.ReadoutExplanation]


@pytest.fixture(scope="module", params=CLASSES)
def explained(request: pytest.FixtureRequest) -> Explained:
    with models.lifted():
        case = cases.case("llama", request.param, "raw")
        readout = projection(case)
        return case, readout, ll.explain(case.lens, TOKENS, readout=readout, null=NULL, **QUIET)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, equal_nan=True)


# --- the parts are what the functions give


def test_first_and_second_order_are_the_functions_own(explained: Explained):
    case, readout, found = explained
    for part, by in (("first_order", "position"), ("by_head", "head"), ("by_rank", "rank")):
        alone = ll.first_order(case.lens, TOKENS, readout, by=by)
        mine = getattr(found, part)
        same(mine.values, alone.values)
        assert (mine.by, mine.sites, mine.readout) == (alone.by, alone.sites, alone.readout)
    same(found.adapted_end.values, ll.first_order(case.lens, TOKENS, readout, at=1.0).values)
    curve = ll.remainder_curve(case.lens, TOKENS, readout, **QUIET)
    same(found.curve.values, curve.values)
    same(found.curve.remainder, curve.remainder)
    second = ll.second_order(case.lens, TOKENS, readout, **QUIET)
    same(found.second_order.half_row_sums, second.half_row_sums)
    coupling = ll.coupling(case.lens, TOKENS, readout, group="layer", **QUIET)
    assert found.coupling is not None
    same(found.coupling.matrix, coupling.matrix)


def test_interventions_path_and_curves_are_the_functions_own(explained: Explained):
    case, readout, found = explained
    assert found.path is not None
    assert found.faithfulness is not None
    assert found.null is not None
    scores: dict[str, Any] = {}
    for how in ("add_one", "leave_one_out"):
        alone = ll.patch_sites(case.lens, TOKENS, readout, how, **QUIET)
        same(getattr(found, how).values, alone.values)
        flags = ll.reliability(case.lens, TOKENS, readout, how=how, **QUIET)
        assert torch.equal(found.reliability[how].flagged, flags.flagged)
        scores[how] = alone
    path = ll.path_attribution(case.lens, TOKENS, readout, tol=1e-2, max_nodes=17, **QUIET)
    same(found.path.values, path.values)
    first = ll.first_order(case.lens, TOKENS, readout)
    rankings = {score.key: score for score in (first, path, scores["leave_one_out"])}
    fractions = found.faithfulness.fractions.tolist()
    curves = ll.faithfulness(case.lens, TOKENS, readout, rankings, fractions=fractions, **QUIET)
    assert curves.names == found.faithfulness.names
    same(found.faithfulness.keep, curves.keep)
    same(found.faithfulness.drop, curves.drop)
    same(found.null.null, ll.null_test(case.lens, TOKENS, readout, draws=NULL, **QUIET).null)


def test_both_ends_and_added_modules_are_those_of_peft(explained: Explained):
    """PEFT's own model with a hook on the first block; the module alone at full strength."""
    case, readout, found = explained
    assert found.add_one is not None
    block = case.peft.base_model.model.get_submodule("model.layers.0")
    modules = list(case.lens.adapter.modules)

    def at(*on: str) -> Tensor:
        seen: list[Tensor] = []

        def keep(_: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handle = block.register_forward_hook(keep)
        factors = dict.fromkeys(modules, 0.0) | dict.fromkeys(on, 1.0)
        with reference.peft_scales(case.peft, factors), torch.no_grad():
            case.peft(TOKENS)
        handle.remove()
        return (seen[-1] @ readout.direction)[:, 1:].mean(1)

    same(found.base, at())
    same(found.adapted, at(*modules))
    same(found.shift, at(*modules) - at())
    for index, site in enumerate(found.add_one.sites):
        same(found.add_one.values[:, index], at(site.module) - at())
    assert {site.layer for site in found.add_one.sites} == {0}


def test_one_prompt_of_several_is_its_explanation(explained: Explained):
    case, readout, found = explained
    for index in (0, 1):
        mine = found.of_prompt(index)
        alone = ll.explain(
            case.lens, TOKENS[index : index + 1], readout=readout, fast=True, **QUIET
        )
        assert mine.prompts == alone.prompts == (found.prompts[index],)
        for name in ("first_order", "by_head", "by_rank", "adapted_end"):
            same(getattr(mine, name).values, getattr(alone, name).values)
        same(mine.curve.values, alone.curve.values)
        frame = found.to_frame().query("prompt == @index").reset_index(drop=True)
        assert frame["prompt"].eq(index).all()
        own = mine.to_frame()
        assert own.drop(columns="prompt").equals(frame.drop(columns="prompt"))
        assert own["first_order"].tolist() == pytest.approx(
            alone.to_frame()["first_order"].tolist()
        )
        assert own["flagged_add_one"].tolist() == (
            found.reliability["add_one"].flagged[index].tolist()
        )
    with pytest.raises(ArgumentError, match="prompts 0 to 1"):
        found.of_prompt(2)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_readout_of_the_logits_quickly(cls: str):
    case = cases.case("gpt2", cls, "raw")
    readout = ll.Logit(3)
    found = ll.explain(case.lens, TOKENS, readout=readout, fast=True, **QUIET)
    assert found.is_fast
    assert found.null is None
    assert not found.reliability
    assert not found.comparisons
    first = ll.first_order(case.lens, TOKENS, readout)
    same(found.first_order.per_site, first.values)
    same(found.by_rank.per_site, first.values)
    assert found.readout == readout.label
    assert found.units == readout.units
    assert len(found.to_frame()) == len(TOKENS) * len(case.lens.sites)
    assert "Not measured: single modules added or left out" in found.of_prompt(0).story()


# --- words, pictures, page


def test_the_story_of_one_prompt_has_its_numbers():
    found = readout_explanation()
    story = found.story()
    assert "moves margin(' Lyon' − ' Paris') by +8.00 logits, from −4.00 in the base model" in story
    assert "predicts a shift of +4.00 logits, to a value of 0.00. It misses 50%" in story
    assert "blocks.0.mlp.down +2.00 (25%)" in story
    assert "of this readout alone" in story
    assert "It is of one prompt." in story
    assert not any(
        word in story for word in ("prefers", "flips", "pair of answers", "margin moves")
    )


def test_a_shift_within_rounding_has_no_shares():
    found = readout_explanation()
    still = found.curve
    noise = dataclasses.replace(still.noise, shift=torch.tensor([10.0]))
    second = dataclasses.replace(found.second_order, curve=dataclasses.replace(still, noise=noise))
    story = dataclasses.replace(found, second_order=second).story()
    assert "shows no effect of the adapter" in story
    assert "no share of it is given" in story
    assert "%" not in story.partition("Against random directions")[0]


def test_the_page_of_one_prompt_has_each_section():
    page = html.unescape(without_plotly(readout_explanation().report()))
    for heading in (
        "The readout in numbers",
        "The remainder and its parts",
        "Where first order finds the shift",
        "Largest modules",
        "By head and by rank",
        "Where in the prompt",
        "Coupling between layers",
        "First order against measurements",
        "Reliability flags",
        "Which few modules carry the shift",
        "Against random directions",
    ):
        assert heading in page, heading
    assert "Tokens promoted" not in page
    assert "flips" not in page


def test_figures_are_of_the_prompt_or_of_the_mean(explained: Explained):
    _, _, found = explained
    of_one = found.of_prompt(1).figures()
    assert {"positions", "second_order", "coupling", "null", "heads", "ranks"} <= set(of_one)
    of_several = found.figures()
    assert {"sites", "heads", "ranks", "remainder", "faithfulness"} <= set(of_several)
    assert "positions" not in of_several


@pytest.mark.slow
def test_the_page_of_several_prompts_begins_with_all_of_them(explained: Explained, tmp_path: Any):
    _, readout, found = explained
    page = html.unescape(without_plotly(found.save_report(tmp_path / "a.html").read_text()))
    assert readout.label in page
    assert page.count("The readout in numbers") == 2
    story = found.story()
    assert story.startswith(
        "In the mean over 2 prompts the adapter moves the projection on the direction at blocks.0"
    )
    assert f"{float(found.shift.mean()):+.2f}".replace("-", "−") in story


def test_an_adapter_of_mlps_alone_has_no_heads():
    case = cases.case("llama", CLASSES[0], "raw")
    lens = case.lens.with_adapter(case.lens.adapter.only("*.down_proj"))
    figures = ll.explain(lens, TOKENS, readout=projection(case), fast=True, **QUIET).figures()
    assert "heads" not in figures
    assert "ranks" in figures


# --- what is refused


@pytest.mark.bad_input
def test_two_questions_at_once_are_refused():
    case = cases.case("llama", CLASSES[0], "raw")
    ask: Any = ll.explain
    readout = ll.Logit(3)
    with pytest.raises(ArgumentError, match="doc and pre beside readout: explain takes"):
        ask(case.lens, TOKENS, 5, 9, readout=readout)
    with pytest.raises(ArgumentError, match="doc beside readout: explain takes"):
        ask(case.lens, TOKENS, 5, readout=readout)
    with pytest.raises(ArgumentError, match="response beside readout: explain takes"):
        ask(case.lens, TOKENS[:1], response=torch.tensor([5]), readout=readout)
    with pytest.raises(ArgumentError, match="is not a readout"):
        ask(case.lens, TOKENS, readout=[readout])
    with pytest.raises(ArgumentError, match="is least at ε = 0"):
        ask(case.lens, TOKENS, readout=ll.KL(torch.tensor([5, 9])), **QUIET)


# --- its bar


def test_a_bar_is_shown_unless_it_is_turned_off(capsys: pytest.CaptureFixture[str]):
    case = cases.case("llama", CLASSES[0], "raw")
    ll.explain(case.lens, TOKENS[:1], readout=ll.Logit(3), fast=True)
    assert "the remainder, and second order" in capsys.readouterr().err
    ll.explain(case.lens, TOKENS[:1], readout=ll.Logit(3), fast=True, progress=False)
    assert not capsys.readouterr().err
