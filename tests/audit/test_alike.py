"""Texts that begin alike have the logits of whole texts, and what they begin with is run once."""

from __future__ import annotations

from typing import Any

import cases
import models
import pytest
import torch
from torch import Tensor

import lens_lora as ll
from lens_lora.audit import brief
from lens_lora.audit.alike import alike, logits_after

pytestmark = pytest.mark.usefixtures("float64")
OPENING = 9
LENGTHS = [14, 12, 13, 6, 11]
READS = [4, 2, 3, 6, 2]
FAMILIES = [
    (family, cls)
    for family in models.FAMILIES
    for cls in models.MAKERS
    if models.is_built_right(family, cls, "raw")
]


def texts() -> ll.results.Prompts:
    """Four texts that begin alike and one that does not, each read at its last tokens."""
    tokens = models.tokens(len(LENGTHS), max(LENGTHS))
    tokens[:, :OPENING] = tokens[0, :OPENING]
    tokens[3] = tokens[3].flip(0)
    # Two texts are alike for one more token, which is no part of what all begin with.
    tokens[1, OPENING] = tokens[0, OPENING]
    tokens[2, OPENING] = (tokens[0, OPENING] + 1) % models.VOCAB
    return ll.results.Prompts(tokens, torch.tensor(LENGTHS), torch.tensor(READS))


@pytest.mark.sample(3)
@pytest.mark.parametrize(("family", "cls"), FAMILIES)
def test_logits_are_those_of_whole_texts(family: str, cls: str):
    lens = cases.case(family, cls, "raw").lens
    every = texts()
    seen: list[int] = []
    for scale in (0.0, 1.0):
        gated = (lens, lens.gates(scale))
        for some in alike(lens, every, 512, has_cache=True):
            assert len(some.opening) == (0 if some.places == [3] else OPENING)
            whole = every.chosen(some.places)
            with torch.no_grad(), lens.adapted(scale):
                expected = whole.at_slots(lens.run(whole))
            difference = (logits_after(gated, some) - expected)[whole.read_mask]
            assert difference.abs().max() < 1e-10
            seen += some.places
    assert sorted(seen) == sorted([*range(len(LENGTHS))] * 2)


def test_nothing_is_shared_without_a_cache_that_is_right_or_under_a_hook():
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    for some in alike(lens, texts(), 512, has_cache=False):
        assert len(some.opening) == 0
    place = "blocks.0.hook_resid_post"
    with lens.model.hooks(fwd_hooks=[(place, lambda tensor, hook: tensor + 0)]):
        for some in alike(lens, texts(), 512, has_cache=True):
            assert len(some.opening) == 0


def test_texts_that_all_begin_alike_share_nothing_without_a_cache_that_is_right():
    """They form one group then, whose common beginning was run with the wrong cache."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    every = texts().chosen([0, 1, 2, 4])
    (some,) = alike(lens, every, 512, has_cache=False)
    assert len(some.opening) == 0
    (some,) = alike(lens, every, 512, has_cache=True)
    assert len(some.opening) == OPENING


def test_a_cache_that_chooses_the_right_tokens_may_have_wrong_logits(
    monkeypatch: pytest.MonkeyPatch,
):
    """Logits that are a thousandth too large choose the same tokens, and were taken for right."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    host = type(lens.host)
    run_cached = host.run_cached

    def slightly_wrong(self: Any, tokens: Tensor, cache: Any, mask: Any = None) -> Any:
        logits, after = run_cached(self, tokens, cache, mask)
        return (logits if cache is None else 1.001 * logits), after

    monkeypatch.setattr(host, "run_cached", slightly_wrong)
    every = texts()
    for some in alike(lens, every, 512, has_cache=True):
        whole = every.chosen(some.places)
        with torch.no_grad(), lens.adapted(1.0):
            expected = whole.at_slots(lens.run(whole))
        difference = logits_after((lens, lens.gates(1.0)), some) - expected
        assert difference[whole.read_mask].abs().max() < 1e-10


def test_the_base_is_run_once_for_the_adapter_and_all_controls(monkeypatch: pytest.MonkeyPatch):
    """The tokens of each model's passes: the opening once, and what follows it in each text."""
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    tokens_of: dict[float, int] = {}
    logits_after_opening = brief.logits_after
    tokens: list[int] = []

    def noted(gated: Any, some: Any) -> Tensor:
        tokens.clear()
        logits = logits_after_opening(gated, some)
        scale = float(gated[1].flatten()[0])
        tokens_of[scale] = tokens_of.get(scale, 0) + sum(tokens)
        return logits

    monkeypatch.setattr(brief, "logits_after", noted)

    def look(module: Any, args: Any, output: Any) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        tokens.append(stream.shape[0] * stream.shape[1])

    handle = lens.model.blocks[0].register_forward_hook(look)
    scales = (1.0, 0.5, 0.25)
    brief._largest_parts(lens, [(lens, scale) for scale in scales], brief._Spoken(texts(), True))
    handle.remove()
    following = [length - OPENING for i, length in enumerate(LENGTHS) if i != 3]
    padded = max(following) * len(following)
    assert tokens_of == dict.fromkeys((0.0, *scales), LENGTHS[3] + OPENING + padded)
