"""The scale at which a margin changes sign, of many prompts at a time."""

from __future__ import annotations

from typing import Any

import cases
import models
import numpy as np
import pytest
import torch

import lens_lora as ll
from lens_lora.core.analyses import flips as module
from lens_lora.core.analyses.remainder import USUAL_SCALES
from lens_lora.core.readout.reading import Reading

pytestmark = pytest.mark.usefixtures("float64")
COUNT = 12
STAYING = (1, 4, 5, 11)


@pytest.fixture
def lens() -> ll.LoraLens:
    return cases.case("llama", list(models.MAKERS)[-1], "raw").lens


def answers(lens: ll.LoraLens, prompts: ll.results.Prompts) -> tuple[list[int], list[int]]:
    """Of each prompt two tokens whose margin clearly flips, or clearly stays where it is to."""
    base, adapted = (margins(lens, prompts, scale) for scale in (0.0, 1.0))
    stays = torch.tensor([i in STAYING for i in range(COUNT)])[:, None, None]
    clear = torch.minimum(torch.where(stays, base, -base), adapted)
    # The first five tokens are special ones.
    clear[:, :5] = -torch.inf
    clear[:, :, :5] = -torch.inf
    vocab = clear.shape[-1]
    clearest = clear.flatten(1).argmax(1)
    doc = clearest // vocab
    pre = clearest % vocab
    return doc.tolist(), pre.tolist()


def margins(lens: ll.LoraLens, prompts: ll.results.Prompts, scale: float) -> torch.Tensor:
    """The margin between any two tokens, [prompt, doc, pre]."""
    logits = prompts.at_read(lens.logits(prompts, scale))
    return logits[:, :, None] - logits[:, None]


def test_a_batch_flips_where_each_prompt_alone_does(
    lens: ll.LoraLens, monkeypatch: pytest.MonkeyPatch
):
    prompts = lens.prompts(torch.randint(5, 40, (COUNT, 6), generator=torch.manual_seed(0)))
    doc, pre = answers(lens, prompts)
    batches: list[int] = []
    run = module.gated_readout

    def counted(lens: ll.LoraLens, reading: Reading, *args: Any, **options: Any) -> torch.Tensor:
        batches.append(reading.batch)
        return run(lens, reading, *args, **options)

    monkeypatch.setattr(module, "gated_readout", counted)
    np.random.seed(0)
    state_of_numpy = np.random.get_state()[1].copy()
    found = ll.fact_margin(lens, prompts, doc, pre, progress=False)
    # The global generator is the caller's, from which nothing is drawn.
    assert np.array_equal(np.random.get_state()[1], state_of_numpy)

    assert found.flips == tuple(i not in STAYING for i in range(COUNT))
    # Only prompts that flip are run again, and fewer each time.
    assert batches[0] == COUNT - len(STAYING)
    assert batches == sorted(batches, reverse=True)
    assert len(batches) <= 3

    for i in range(COUNT):
        prompt = prompts.row(i)
        alone = ll.fact_margin(lens, prompt, doc[i], pre[i], progress=False)
        torch.testing.assert_close(
            found.flip_scale[i], alone.flip_scale[0], rtol=0, atol=2e-6, equal_nan=True
        )
        if i not in STAYING:
            logits = lens.logits(prompt, float(found.flip_scale[i]))[0, -1]
            assert abs(float(logits[doc[i]] - logits[pre[i]])) < 1e-5


@pytest.mark.parametrize("values", [[-1e-17, 1.0, 3.0], [-3.0, 1e-17, 1.0], [-1.0, 1.0, 3.0]])
def test_probes_are_distinct_wherever_the_root_is(values: list[float]):
    """At a neighbour, where a polynomial would have one point twice, as in the middle."""
    crossing = module._Crossing(np.array([0.0, 0.5, 1.0]), np.array(values), 0)
    for _ in range(module._MOST_PASSES):
        if crossing.is_narrow:
            break
        low, high = crossing.step
        points = [low, *crossing.probes, high]
        assert points == sorted(set(points))
        crossing = crossing.narrowed(np.interp(crossing.probes, [0.0, 0.5, 1.0], values))
    assert abs(np.interp(crossing.root, [0.0, 0.5, 1.0], values)) < 1e-4


@pytest.mark.parametrize("flip", [0.337, 0.5041, 0.93])
def test_a_smooth_margin_takes_one_pass(flip: float):
    """The polynomial through six of the usual ε is off by less than the precision of a flip."""

    def margin(scales: np.ndarray) -> np.ndarray:
        return 4 * np.tanh(1.5 * (scales - flip)) + (scales - flip) ** 3

    scales = np.array([0.0, *sorted(USUAL_SCALES)])
    crossing = module._Crossing(scales, margin(scales), int((scales < flip).sum()) - 1)
    assert not crossing.is_narrow
    crossing = crossing.narrowed(margin(np.array(crossing.probes)))
    assert crossing.is_narrow
    assert abs(crossing.root - flip) < 1e-6


def test_a_margin_that_is_exactly_zero_is_the_flip():
    crossing = module._Crossing(np.array([0.0, 0.5, 1.0]), np.array([-1.0, 0.0, 2.0]), 0)
    assert crossing.is_narrow
    assert crossing.root == 0.5


@pytest.mark.parametrize("jump", [0.318401, 0.3500001, 0.39])
def test_a_margin_that_jumps_through_zero(jump: float):
    """Where experts switch on the way; no polynomial leads there, so the step is halved."""

    def margin(scales: np.ndarray) -> np.ndarray:
        return np.where(scales < jump, 0.3 * scales - 0.13, 0.22 + scales**2)

    scales = np.array([0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0])
    crossing = module._Crossing(scales, margin(scales), 4)
    for _ in range(module._MOST_PASSES):
        if not crossing.is_narrow:
            crossing = crossing.narrowed(margin(np.array(crossing.probes)))
    assert abs(crossing.root - jump) < 1e-5
