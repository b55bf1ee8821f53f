"""Several prompts: each one's explanation is what `explain` gives of it alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import models
import pytest
import torch
from results_by_hand import (
    explanation,
    two_prompts,
)

import lens_lora as ll
from lens_lora.errors import TokenError
from lens_lora.explanations.one_prompt import one_prompt

CLASSES = list(models.MAKERS)
PROMPTS = ["w13 w14 w15", "w1 w2 w3 w4 w5 w6", "w7 w8", "w20 w21 w22"]
DOC = ["w9", "w9", "w9 w4", "w30"]
PRE = ["w26", "w25", "w24", "w26"]
OFF = {"progress": False}


@pytest.fixture(scope="module", params=CLASSES)
def lens(request):
    with models.lifted():
        yield cases.case("llama", request.param, "raw").lens


def compared(one: Any, other: Any, path: str = "") -> None:
    """Equal in every label, and in every number up to the rounding of another batch."""
    if isinstance(one, torch.Tensor):
        other = other[tuple(slice(size) for size in one.shape)]  # a batch is padded
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10, equal_nan=True, msg=path)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            if field.name not in UNCERTAIN:
                mine = getattr(one, field.name)
                its = getattr(other, field.name)
                compared(mine, its, f"{path}.{field.name}")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            compared(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, tuple):
        assert len(one) == len(other), path
        for i, (mine, its) in enumerate(zip(one, other, strict=True)):
            compared(mine, its, f"{path}.{i}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-8, nan_ok=True), path
    else:
        assert one == other, path


# Draws of rounding depend on the batch, and so does where a root was bracketed.
UNCERTAIN = {"noise", "noise_floor", "curvature_noise", "material", "order", "passes", "flip_scale"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("fast", [True, False])
def test_each_is_what_explain_gives_of_it_alone(lens, fast, float64):
    """Of unlike lengths, and one of them in nats, for it has an answer of two tokens."""
    found = ll.explain(lens, PROMPTS, DOC, PRE, fast=fast, null=2, **OFF)
    assert [e.units for e in found] == ["logits", "logits", "nats", "logits"]
    for i, one in enumerate(found):
        alone = ll.explain(lens, PROMPTS[i], DOC[i], PRE[i], fast=fast, null=2, **OFF)
        compared(alone, one, str(i))
        torch.testing.assert_close(
            one.margin.flip_scale, alone.margin.flip_scale, atol=1e-4, rtol=0, equal_nan=True
        )


def test_a_list_of_one_prompt_gives_an_explanation(lens, float64):
    found = ll.explain(lens, PROMPTS[:1], DOC[:1], PRE[:1], fast=True, **OFF)
    assert isinstance(found, ll.results.Explanation)
    compared(ll.explain(lens, PROMPTS[0], DOC[0], PRE[0], fast=True, **OFF), found)


def test_one_answer_is_every_prompt_s(lens, float64):
    one, other = ll.explain(lens, PROMPTS[:2], "w9", "w26", fast=True, **OFF)
    assert one.margin.doc == other.margin.doc == ("w9",)
    assert one.first_order.readout == ll.Margin("w9", "w26").label


def test_numbers_of_answers_that_do_not_fit_are_refused(lens):
    with pytest.raises(TokenError, match="2 answers for 4 prompts|2 tokens for 4 prompts"):
        ll.explain(lens, PROMPTS, DOC[:2], PRE, fast=True, **OFF)
    with pytest.raises(TokenError, match="same token"):
        ll.explain(lens, PROMPTS, DOC[:2] + ["w26", "w26"], "w26", fast=True, **OFF)
    with pytest.raises(ValueError, match="null=1"):
        ll.explain(lens, PROMPTS, DOC, PRE, null=1, **OFF)


def test_a_share_holds_its_own_numbers_and_no_other():
    """Cut along the axis that the annotation names, wherever it stands; not a view of the batch."""
    e = explanation()
    test = dataclasses.replace(
        e.null,
        observed=two_prompts(),
        null=torch.arange(24.0).view(3, 2, 4),
        null_shift=torch.arange(6.0).view(3, 2),
        noise_floor=torch.tensor([1.0, 2.0]),
    )
    one = one_prompt(test, 1)
    assert torch.equal(one.null, test.null[:, 1:2])
    assert one.noise_floor.tolist() == [2.0]
    assert one.observed.str_tokens == two_prompts().str_tokens[1:]
    assert one.null.untyped_storage().nbytes() == one.null.nbytes
    assert one_prompt(e.faithfulness, 0).orders.keys() == e.faithfulness.orders.keys()
    assert one_prompt(e.margin, 0, "mine").attribution.readout == "mine"
    with pytest.raises(ll.errors.LensLoraError, match="expected a result"):
        one_prompt(3, 0)


@pytest.mark.slow
def test_a_table_a_story_and_a_page_of_all():
    found = ll.results.Explanations((explanation(), explanation(fast=True)))
    frame = found.to_frame()
    assert frame["prompt"].tolist() == [0] * 4 + [1] * 4
    assert len(found) == 2
    assert found.story().startswith("1. “of”: The base model prefers “Paris”")
    assert set(found.figures()) == {"margins", "layers"}
    layers = found.figures()["layers"].data[0]
    assert [list(row) for row in layers.z] == [[3.0, 0.0, 1.0]] * 2
    margins = found.figures()["margins"]
    assert list(margins.data[1].x) == [-4.0] * 2
    assert list(margins.data[2].x) == [4.0] * 2
    assert "2 of 2 prompts flip" in margins.layout.title.text
    assert "prompt-2" in found.report()
