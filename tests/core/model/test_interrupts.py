"""Ctrl-C at any line of the package leaves nothing behind: no hook, no method, no mode of torch.

Every call is interrupted at a few lines, chosen with a seed, and the shortest at every line (under
the check of shapes at a fifth of them). All lines of all calls (about 40,000 points, half an hour):

    LENS_LORA_INTERRUPTS=all pytest tests/core/model/test_interrupts.py -k every_line -s
"""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import sys
from pathlib import Path

import cases
import interrupts
import models
import pytest
import torch
from every_call import CALLS, OWN
from shapes import share
from shared_questions import MARGIN

import lens_lora as ll
from lens_lora import compat, spans
from lens_lora.core.function import duals, memory, rerun
from lens_lora.core.model import public_call
from lens_lora.spans import Temporary

pytestmark = pytest.mark.usefixtures("float64", "swallowed")
ALL = os.environ.get("LENS_LORA_INTERRUPTS") == "all"
FEW = share(3)
SHORT = ("applied", "logits")
TARGETS = ("q_proj", "down_proj")
EVERY = {**OWN, **CALLS}


@pytest.fixture
def swallowed(monkeypatch):
    """Python itself swallows an interrupt within a finaliser, and would print each one."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)


def case(cls: str) -> tuple[ll.LoraLens, torch.Tensor]:
    return cases.case("llama", cls, "raw", TARGETS).lens, models.tokens(batch=1, pos=4)


def leaks(call, model, points) -> dict[str, list[str]]:
    found = {where: interrupts.left_by(call, model, number) for number, where in points}
    return {where: left for where, left in found.items() if left}


def some(name: str, points: dict[int, str]) -> list[tuple[int, str]]:
    every = list(points.items())
    few = share(len(every)) if name in SHORT else FEW
    return every if ALL else random.Random(name).sample(every, few)


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("name", EVERY)
def test_every_line(name: str, cls: str):
    lens, tokens = case(cls)

    def call() -> None:
        EVERY[name](lens, tokens)

    points = some(name, interrupts.points_of(call))
    assert leaks(call, lens.model, points) == {}
    print(f"{cls} {name}: {len(points)} points", end="; ")


@pytest.mark.parametrize("cls", models.MAKERS)
def test_making_a_lens(cls: str):
    """Its logits are compared with those of the base."""
    case = cases.case("llama", cls, "processed", TARGETS)

    def call() -> None:
        ll.LoraLens(case.model, case.lens.adapter, hf_model=case.base)

    points = interrupts.points_of(call)
    assert leaks(call, case.model, some("making", points)) == {}


def points_in(call, *functions) -> dict[int, str]:
    """Where a call can be interrupted, within these functions."""
    lines = {
        f"{Path(inspect.getfile(inspect.unwrap(fn))).relative_to(interrupts.PACKAGE)}:{first + i}"
        for fn in functions
        for source, first in [inspect.getsourcelines(inspect.unwrap(fn))]
        for i in range(len(source))
    }
    return {n: at for n, at in interrupts.points_of(call).items() if at in lines}


@pytest.mark.slow
@models.NEEDS_BRIDGE
def test_blooms_own_gelu():
    """Forward mode replaces a method of transformers' Bloom."""
    lens = cases.case("bloom", "TransformerBridge", "raw").lens
    tokens = models.tokens(1, 4)

    def call() -> None:
        ll.logit_shift(lens, tokens, by_site=False)

    points = points_in(
        call,
        *(duals._begin_dual, duals._begin_level, duals._leave_dual_level),
        *(duals.attention_from_formula, compat.plain_bloom_gelu, compat.use_attention_kernels),
        *(compat.allow_forward_mode, compat.enter_mode),
    )
    assert len(points) > 30
    assert leaks(call, lens.model, points.items()) == {}


@pytest.mark.parametrize("cls", models.MAKERS)
def test_blocks_that_run_again(cls: str, monkeypatch: pytest.MonkeyPatch):
    """Within a bound every block's forward is replaced until the way back is done."""
    monkeypatch.setattr(memory, "must_rerun", lambda *_, **__: True)
    lens, tokens = case(cls)

    def call() -> None:
        ll.first_order(lens, tokens, MARGIN)

    put_back = compat.torch_modules._put_back
    points = points_in(call, rerun.blocks_rerun, rerun._run_twice, compat.replace_forward, put_back)
    assert len(points) > 20
    assert leaks(call, lens.model, points.items()) == {}


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_an_error_and_an_interrupt_in_what_it_unwinds(cls: str):
    """A hook of the user's own raises, and the interrupt falls into the taking off."""
    lens, tokens = case(cls)

    def explode(tensor, hook):
        raise ValueError("the user's own")

    def call() -> None:
        with contextlib.suppress(ValueError), lens.applied() as model:
            model.run_with_hooks(tokens, fwd_hooks=[(lens.sites[-1].write, explode)])
        lens.model.reset_hooks()

    assert leaks(call, lens.model, interrupts.points_of(call).items()) == {}


# --- planted faults


def leaks_of(name: str, cls: str) -> set[str]:
    """What was left, of a model of its own."""
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, targets=list(TARGETS))
    lens = ll.LoraLens(models.MAKERS[cls](base), ll.Adapter.from_peft(peft))
    tokens = models.tokens()

    def call() -> None:
        EVERY[name](lens, tokens)

    found: set[str] = set()
    for number in interrupts.points_of(call):
        found |= set(interrupts.left_by(call, lens.model, number))
        if found:
            return found
    return found


@pytest.fixture
def repaired():
    """The state of torch, put back after a planted fault."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_way_back_that_is_registered_once_shows(cls: str, monkeypatch, repaired):
    monkeypatch.setattr(Temporary, "way_back", lambda self, back: self.callback(back))
    assert leaks_of("applied", cls) & {"hooks", "listed hooks", "replaced forward"}


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_call_that_closes_no_span_shows(cls: str, monkeypatch, repaired):
    for module in (public_call, spans):
        monkeypatch.setattr(module, "close_but", lambda others: None)
    assert leaks_of("logits", cls)
