"""The best sets of heads: against a search of all sets in Hugging Face's model with PEFT."""

from __future__ import annotations

import functools
import itertools

import architectures
import cases
import limits
import models
import pytest
import torch
from differences import largest_difference
from heads import features, margin, swapped
from torch import Tensor

import lens_lora as ll
from lens_lora.judging.best_subset import BestSubset
from lens_lora.judging.head_masks import HeadMasks

MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-9
IDS = torch.tensor
FAMILIES = ("llama", "gpt2", "neox", "gemma2")
HEADS = list(itertools.product((0, 1), range(4)))
best = functools.partial(ll.best_subset, over="heads", progress=False)
few = functools.partial(ll.best_subset, k=[1, 2], steps=8, progress=False)


@pytest.fixture
def _float64():
    with architectures.in_float64():
        yield


pytestmark = pytest.mark.usefixtures("_float64")


def kept_of(peft, family: str, tokens: Tensor, members) -> float:
    """The ratio of means over prompts when the base gets z of these heads, by plain hooks."""
    heads = [head for head, is_member in zip(HEADS, members, strict=True) if is_member]
    where = [(layer, "z", features(family, "z", head, 4)) for layer, head in heads]
    base, adapted = (margin(peft, tokens, adapted=end) for end in (False, True))
    sign = (adapted - base).sign()
    moved = swapped(peft, family, tokens, where, into="base") - base
    return float((moved * sign).sum() / (adapted - base).abs().sum())


@functools.cache
def every_set(family: str, count: int) -> tuple[float, ...]:
    """kept of every set of so many heads, the best last."""
    peft = cases.case(family, next(iter(models.MAKERS)), "raw").peft
    tokens = models.tokens(2, 5)
    sets = itertools.combinations(range(len(HEADS)), count)
    masks = ([i in chosen for i in range(len(HEADS))] for chosen in sets)
    return tuple(sorted(kept_of(peft, family, tokens, mask) for mask in masks))


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_of_all_sets_is_found(family: str, cls: str):
    """Two and three of eight heads; what is reported is what PEFT's model keeps."""
    held = cases.case(family, cls, "raw")
    tokens = models.tokens(2, 5)
    found = best(held.lens, tokens, MARGIN, k=[2, 3, 8])
    assert found.names == tuple(f"blocks.{layer}.attn.hook_z[{head}]" for layer, head in HEADS)
    for row, count in enumerate(found.counts):
        kept = kept_of(held.peft, family, tokens, found.members[row])
        assert int(found.members[row].sum()) == count
        assert float(found.kept[row]) == pytest.approx(kept, abs=ROUND_OFF)
        assert float(found.kept[row]) == pytest.approx(every_set(family, count)[-1], abs=ROUND_OFF)
        for prompt in (0, 1):
            alone = kept_of(held.peft, family, tokens[prompt : prompt + 1], found.members[row])
            assert float(found.kept_by_prompt[row, prompt]) == pytest.approx(alone, abs=ROUND_OFF)
    assert abs(float(found.kept[-1]) - 1) > 1e-3  # MLPs write as well
    assert every_set(family, 2)[0] < every_set(family, 2)[-1] - 1e-2


@pytest.mark.parametrize("cls", models.MAKERS)
def test_without_the_search_fewer_are_found(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Negative control: slopes of the wrong sign, and no swaps, fall behind."""
    held = cases.case("llama", cls, "raw")
    tokens = models.tokens(2, 5)
    right = HeadMasks.slopes
    monkeypatch.setattr(HeadMasks, "slopes", lambda self, mask: -right(self, mask))
    monkeypatch.setattr("lens_lora.judging.best_subset._swapped", lambda search, start: start)
    worse = best(held.lens, tokens, MARGIN, k=2, steps=1)
    assert float(worse.kept[0]) < every_set("llama", 2)[-1] - 1e-2


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize(
    "readout",
    [
        MARGIN,
        ll.AnswerMargin([torch.tensor([5, 9]), 11, 7], [4, torch.tensor([6, 8]), 12]),
        ll.KL(),
    ],
)
def test_slopes_are_central_differences(readout: ll.Readout, cls: str):
    """Of a padded batch; within a bound of memory the same, to rounding."""
    lens = cases.case("gemma2", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(3, 6), torch.tensor([6, 4, 5]))
    masks = HeadMasks(lens.function(prompts, readout))
    mask = torch.rand(8, generator=models.seeded(4), dtype=torch.float64)
    slopes = masks.slopes(mask)
    step = 1e-5 * torch.eye(8, dtype=torch.float64)
    values = masks.values(torch.cat([mask + step, mask - step]))
    differences = (values[:, :8] - values[:, 8:]) / 2e-5
    assert slopes.shape == (3, 8)
    assert largest_difference(slopes, differences) < 1e-7 * slopes.abs().max()
    groups = set[int]()
    reruns = set[bool]()
    for bound in (2e5, 9e4, 6e4, 3.9e4):
        few = HeadMasks(lens.within(bound).function(prompts, readout))
        assert largest_difference(few.slopes(mask), slopes) < 1e-10 * slopes.abs().max()
        assert largest_difference(few.values(mask[None]), masks.values(mask[None])) < 1e-10
        groups.add(len(few._groups))
        reruns |= {limits.blocks_run_again(group) for group in few._groups}
    assert max(groups) > 1
    assert reruns == {True, False}
    with pytest.raises(ll.errors.ArgumentError, match="max_memory"):
        HeadMasks(lens.within(1e3).function(prompts, readout)).values(mask[None])


def as_function(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 9]


@functools.cache
def of_every_second(over: str, first: int) -> BestSubset:
    """The best sets of half of the prompts alone."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(4, 5)
    return few(lens, tokens[first::2], MARGIN, over=over)


@pytest.mark.sample(1)
@pytest.mark.parametrize("over", ["heads", "sites"])
@pytest.mark.parametrize("readout", [MARGIN, ll.Readout.of(as_function)])
def test_held_out_prompts_are_not_searched_on(over: str, readout: ll.Readout):
    """The sets are those of the other prompts alone; what they keep is judged on each part."""
    held = cases.case("llama", next(iter(models.MAKERS)), "raw")
    tokens = models.tokens(4, 5)
    found = few(held.lens, tokens, readout, over=over, held_out=[3, 1])
    alone, judged = (of_every_second(over, first) for first in (0, 1))
    assert found.held_out == (1, 3)
    assert torch.equal(found.members, alone.members)
    assert not torch.equal(found.members, judged.members)  # else held out or not is the same
    assert largest_difference(found.kept, alone.kept) < ROUND_OFF
    assert (found.kept_held_out < judged.kept + ROUND_OFF).all()
    if over == "heads":
        for row, members in enumerate(found.members):
            kept = kept_of(held.peft, "llama", tokens[1::2], members)
            assert float(found.kept_held_out[row]) == pytest.approx(kept, abs=ROUND_OFF)
    assert found.to_frame()["keep_held_out"].tolist() == found.kept_held_out.tolist()
    assert alone.kept_held_out.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("over", ["heads", "sites"])
def test_held_out_prompts_of_other_readouts(over: str):
    """Of a KL, whose logits are held, and of answers, some of which take two rows."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(3, 5)
    doc = [IDS([5, 9]), 11, 7]
    pre = [4, IDS([6, 8]), 12]
    for readout, others in (
        (ll.KL(), ll.KL()),
        (ll.AnswerMargin(doc, pre), ll.AnswerMargin(doc[::2], pre[::2])),
        (ll.AnswerLogProb(doc), ll.AnswerLogProb(doc[::2])),
    ):
        two = functools.partial(few, lens, over=over, k=2, steps=4)
        found = two(tokens, readout, held_out=[1])
        alone = two(tokens[::2], others)
        assert torch.equal(found.members, alone.members)
        assert largest_difference(found.kept, alone.kept) < ROUND_OFF
        assert largest_difference(found.kept_held_out, found.kept_by_prompt[:, 1]) < ROUND_OFF


def test_starts_of_held_out_prompts_do_not_leak():
    """A score that is right on held-out prompts alone begins no search."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(4, 5)
    scores = torch.zeros(4, len(lens.sites), dtype=torch.float64)
    scores[[1, 3]] = torch.randn(2, len(lens.sites), generator=models.seeded(1)).double()
    two = functools.partial(few, lens, tokens, MARGIN, k=2, held_out=[1, 3], steps=2)
    found = two(starts={"leak": scores})
    plain = two(starts={"none": torch.zeros(len(lens.sites))})
    assert torch.equal(found.members, plain.members)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_one_head_is_the_strongest_of_those_patched_alone(cls: str, tmp_path):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(2, 5)
    single = ll.patch_activations(
        lens, tokens, MARGIN, "blocks.*.attn.hook_z", direction="adapted_to_base", heads="each",
        progress=False,
    )  # fmt: skip
    found = best(lens, tokens, MARGIN, k=1)
    strongest = (single.values * single.shift.sign()[:, None]).sum(0) / single.shift.abs().sum()
    assert float(found.kept[0]) == pytest.approx(float(strongest.max()))
    assert found.chosen()["point"].tolist() == [single.names[int(strongest.argmax())]]
    loaded = BestSubset.load(found.save(tmp_path / "heads.safetensors"))
    assert loaded.names == found.names
    assert loaded.over == "heads"
    drawn = found.plot().data[0]
    assert len(drawn.z) == 2
    assert sum(value or 0 for row in drawn.z for value in row) == 1
    assert "1 of 8 heads keep" in found.plot().layout.title.text
    for scores in (ll.first_order(lens, tokens, MARGIN), torch.zeros(8)):
        with pytest.raises(ll.errors.ArgumentError, match="scores of sites"):
            best(lens, tokens, MARGIN, k=1, starts=scores)


def test_the_hooks_are_gone_after_a_failure():
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(2, 5)

    def fails_in_a_graph(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            raise KeyError("mid-forward")
        return logits[:, 5]

    before = lens.logits(tokens, scale=0)
    with pytest.raises(KeyError, match="mid-forward"):
        best(lens, tokens, ll.Readout.of(fails_in_a_graph), k=1)
    assert torch.equal(lens.logits(tokens, scale=0), before)


@pytest.mark.bad_input
def test_refusals():
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens = models.tokens(2, 5)
    for options, words in (
        ({"over": "ranks"}, "over='ranks': expected 'sites' or 'heads'"),
        ({"k": 9}, "numbers of heads from 1 to 8"),
        ({"held_out": [2]}, "held_out=.*of prompts 0 to 1"),
        ({"held_out": [0, 1]}, "and not all"),
        ({"held_out": [-1]}, "of prompts 0 to 1"),
        ({"held_out": 1}, "held_out=1: expected a list"),
        ({"held_out": [0.0]}, "whole number"),
        ({"held_out": "each"}, "expected a list"),
    ):
        with pytest.raises(ll.errors.ArgumentError, match=words):
            best(lens, tokens, MARGIN, **({"k": 1} | options))


@models.NEEDS_NEWEST
def test_heads_of_two_widths_are_refused():
    """Gemma 4's layers with full attention have wider heads."""
    lens = architectures.case("Gemma 4").lens
    with pytest.raises(ll.errors.ModelStateError, match="hook_z holds .* heads"):
        best(lens, models.tokens(2, 5), MARGIN, k=1)
