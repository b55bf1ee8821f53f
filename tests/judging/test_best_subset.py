"""The best sets found, against a search of all sets; what they keep, against runs one by one."""

from __future__ import annotations

import functools
import itertools
import sys

import cases
import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.judging import best_subset as subset_search
from lens_lora.judging.best_subset import BestSubset, best_subset

best_module = sys.modules[best_subset.__module__]
pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ROUND_OFF = 1e-9
KINDS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
FAMILIES = ("llama", "qwen2", "gemma3")


@functools.cache
def ten_sites(family: str, seed: int) -> ll.LoraLens:
    """Two layers of five modules."""
    (cls, *_) = models.MAKERS
    with models.lifted():
        base = models.hf_model(family, seed=seed)
        peft = models.peft_model(family, base, seed=seed, targets=list(KINDS))
        lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft).scaled(0.5))
    assert len(lens.sites) == 10
    return lens


def kept_of_each(lens: ll.LoraLens, tokens: Tensor, gates: Tensor) -> list[float]:
    """The ratio of means over prompts of each set, [set, site], from plain passes."""

    def margins(gates: Tensor) -> Tensor:
        rows = gates.double().repeat_interleave(len(tokens), 0)
        with torch.no_grad(), lens.applied(rows) as model:
            logits = model(tokens.repeat(len(gates), 1))[:, -1]
        return (logits[:, 5] - logits[:, 9]).view(len(gates), -1)

    base, adapted = margins(torch.stack([lens.gates(0.0), lens.gates(1.0)]))
    sign = (adapted - base).sign()
    kept = ((margins(gates) - base) * sign).sum(1) / ((adapted - base) * sign).sum()
    return kept.tolist()


def kept_of(lens: ll.LoraLens, tokens: Tensor, gates: Tensor) -> float:
    (kept,) = kept_of_each(lens, tokens, gates[None])
    return kept


def optimum(lens: ll.LoraLens, tokens: Tensor, count: int) -> float:
    every = list(itertools.combinations(range(len(lens.sites)), count))
    gates = torch.zeros(len(every), len(lens.sites)).double()
    return max(kept_of_each(lens, tokens, gates.scatter(1, torch.tensor(every), 1.0)))


@pytest.mark.sample(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_best_of_all_sets_is_found(family: str):
    """Two or three of ten sites, on several models: the optimum, in all or all but one."""
    missed = 0
    for seed, count in itertools.product(range(2), (2, 3)):
        lens = ten_sites(family, seed)
        tokens = models.tokens(2, 5, seed)
        found = best_subset(lens, tokens, MARGIN, k=count, progress=False)
        best = optimum(lens, tokens, count)
        assert float(found.kept[0]) <= best + ROUND_OFF
        missed += float(found.kept[0]) < best - ROUND_OFF
    assert missed <= 1


@pytest.mark.slow
def test_what_is_reported_is_what_the_sets_keep():
    """Every size by runs of its own; all prompts together, and each prompt."""
    lens = ten_sites("llama", 0)
    tokens = models.tokens(3, 6)
    found = best_subset(lens, tokens, MARGIN, size=(0.1, 0.2, 0.5, 1.0), progress=False)
    assert found.counts == (1, 2, 5, 10)
    assert found.fractions.tolist() == [0.1, 0.2, 0.5, 1.0]
    for members, count, kept, each in zip(
        found.members, found.counts, found.kept, found.kept_by_prompt, strict=True
    ):
        assert int(members.sum()) == count
        assert float(kept) == pytest.approx(kept_of(lens, tokens, members), abs=ROUND_OFF)
        for row, share in zip(tokens, each, strict=True):
            assert float(share) == pytest.approx(kept_of(lens, row[None], members), abs=ROUND_OFF)
    assert found.kept[-1] == pytest.approx(1.0)
    assert found.found_by[-1] == "all"
    frame = found.to_frame()
    assert frame["keep"].tolist() == found.kept.tolist()
    assert list(frame["count"]) == [1, 2, 5, 10]
    chosen = found.chosen(2)
    assert set(chosen["site"]) == {
        s.name for s, on in zip(lens.sites, found.members[1], strict=True) if on
    }
    kept_only = ll.LoraLens(lens.model, lens.adapter.only(*chosen["module"]))
    whole = ll.LoraLens(lens.model, lens.adapter)
    assert len(kept_only.sites) == 2
    assert len(whole.sites) == 10


def test_no_ranking_that_it_starts_at_keeps_more():
    """Also the random ones; and the passes are counted."""
    lens = ten_sites("gemma3", 1)
    tokens = models.tokens(2, 5)
    noise = torch.randn(6, 10, generator=models.seeded(1), dtype=torch.float64)
    starts = {f"r{i}": row for i, row in enumerate(noise)}
    found = best_subset(lens, tokens, MARGIN, k=3, starts=starts, steps=1, progress=False)
    sign = (found.shift.sign().mean()).sign()
    for row in noise:
        top = torch.zeros(10).double().index_fill(0, (row * sign).argsort(descending=True)[:3], 1.0)
        assert float(found.kept[0]) >= kept_of(lens, tokens, top) - ROUND_OFF
    assert found.gradients >= 3 + 1 + 1
    assert found.forwards >= 10


@pytest.mark.slow
def test_the_search_is_what_finds_it(monkeypatch: pytest.MonkeyPatch):
    """The negative controls: without gates and swaps, first order's tops fall behind."""
    whole = []
    less = []
    for seed in range(6):
        lens = ten_sites("llama", seed)
        tokens = models.tokens(2, 5, seed)
        whole.append(float(best_subset(lens, tokens, MARGIN, k=3, progress=False).kept[0]))
        with monkeypatch.context() as without:
            without.setattr(subset_search, "_climbed", lambda search, count: [])
            without.setattr(subset_search, "_swapped", lambda search, start: start)
            less.append(float(best_subset(lens, tokens, MARGIN, k=3, progress=False).kept[0]))
    assert all(a >= b - ROUND_OFF for a, b in zip(whole, less, strict=True))
    assert sum(a > b + 1e-3 for a, b in zip(whole, less, strict=True)) >= 2


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_gates_stay_allowed(count: int):
    """0 ≤ ε ≤ 1 and Σ ε = k; gates that are allowed stay as they are."""
    gates = 3 * torch.randn(10, generator=models.seeded(count), dtype=torch.float64)
    found = subset_search._allowed(gates, count)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(found.sum()) == pytest.approx(count)
    assert torch.allclose(subset_search._allowed(found, count), found)
    inner = (found > 0) & (found < 1)
    moved = (found - gates)[inner]
    # The nearest allowed gates: all that no bound stops are moved by the same amount.
    assert torch.allclose(moved, moved[:1].expand_as(moved))


@pytest.mark.slow
def test_several_sizes_are_each_searched(tmp_path):
    lens = ten_sites("llama", 0)
    tokens = models.tokens(2, 5)
    found = best_subset(lens, tokens, MARGIN, k=[3, 2, 2], progress=False)
    assert found.counts == (2, 3)
    loaded = BestSubset.load(found.save(tmp_path / "best.safetensors"))
    assert torch.equal(loaded.members, found.members)
    assert loaded.found_by == found.found_by
    with pytest.raises(ll.errors.ArgumentError, match=r"count=4.*\(2, 3\)"):
        found.chosen(4)
    with pytest.raises(ll.errors.ArgumentError, match=r"count=None.*\(2, 3\)"):
        found.chosen()
    for way in found.found_by:
        assert way in repr(found)


@pytest.mark.bad_input
def test_refusals():
    lens = ten_sites("llama", 0)
    tokens = models.tokens(2, 5)
    for options, words in (
        ({"size": 0.0}, "size 0: expected a fraction"),
        ({"size": 1.5}, "size 1.5: expected a fraction"),
        ({"size": []}, r"size=\[\]: expected a fraction"),
        ({"k": 11}, "k=11.*from 1 to 10"),
        ({"k": 0}, "at least 1"),
        ({"k": 2.5}, "expected a whole number"),
        ({"steps": 0}, "at least 1"),
        ({"k": 2, "starts": torch.zeros(9)}, r"expected \[10\]"),
    ):
        with pytest.raises(ll.errors.ArgumentError, match=words):
            best_subset(lens, tokens, MARGIN, progress=False, **options)
    still = ll.LoraLens(lens.model, lens.adapter.scaled(1e-18))
    with pytest.raises(ll.errors.ArgumentError, match="rounding alone may"):
        best_subset(still, tokens, MARGIN, progress=False)


@pytest.mark.slow
def test_a_hooked_bridge_too():
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("no TransformerBridge in this transformer-lens")
    lens = cases.case("llama", "TransformerBridge", "processed").lens
    tokens = models.tokens(2, 5)
    found = best_subset(lens, tokens, MARGIN, k=3, progress=False)
    assert float(found.kept[0]) == pytest.approx(
        kept_of(lens, tokens, found.members[0]), abs=ROUND_OFF
    )
