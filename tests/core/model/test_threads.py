"""Threads: one at a time works with a model, and all numbers are those of one thread alone."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import models
import pytest
import torch
from every_call import CALLS, same
from interrupts import held

import lens_lora as ll
from lens_lora.compat import without_warnings
from lens_lora.core.model import adapted_model, locks, public_call
from lens_lora.core.model import hooks as model_hooks
from lens_lora.spans import Temporary

NAMES = ("logits", "first_order", "forward", "frozen", "tangents", "second_order", "patch_sites")
LONG = 60


@pytest.fixture(scope="module", params=models.MAKERS)
def two(request) -> tuple[list[ll.LoraLens], list[ll.LoraLens]]:
    """Two adapters over one model, and each over a model of its own."""
    base = models.hf_model("llama", dtype=torch.float32)
    adapters = [ll.Adapter.from_peft(models.peft_model("llama", base, seed)) for seed in (0, 5)]
    one, other = (models.MAKERS[request.param](base) for _ in range(2))
    return (
        [ll.LoraLens(one, adapter) for adapter in adapters],
        [ll.LoraLens(model, a) for model, a in zip((one, other), adapters, strict=True)],
    )


def tokens() -> torch.Tensor:
    return models.tokens(batch=2, pos=4)


def run_in(pool: ThreadPoolExecutor, work: Callable, jobs) -> list:
    """Their results; a deadlock fails."""
    futures = [pool.submit(work, *job) for job in jobs]
    assert not wait(futures, timeout=LONG).not_done, "the threads wait for one another"
    return [future.result() for future in futures]


@pytest.mark.sample(1)
@pytest.mark.parametrize("models_of", ["one model", "two models"])
def test_mixed_calls_in_four_threads(models_of: str, two):
    lenses = two[models_of == "two models"]
    jobs = [(i, name) for i in range(2) for name in NAMES]
    expected = {job: CALLS[job[1]](lenses[job[0]], tokens()) for job in jobs}
    many = random.Random(0).sample(jobs * 4, len(jobs) * 4)
    before = [held(lens.model) for lens in lenses]
    with ThreadPoolExecutor(4) as pool:
        found = run_in(pool, lambda i, name: CALLS[name](lenses[i], tokens()), many)
    assert all(same(f, expected[job], 1e-5) for f, job in zip(found, many, strict=True))
    assert [held(lens.model) for lens in lenses] == before


def test_a_block_keeps_others_out_until_it_ends(two):
    """Within `applied` this thread goes on; another one waits, and then is right."""
    (first, second), _ = two
    expected = second.logits(tokens())
    seen = []
    with ThreadPoolExecutor(1) as pool:
        with torch.no_grad(), first.applied() as model:
            waiting = pool.submit(lambda: seen.append(second.logits(tokens())))
            assert not wait([waiting], timeout=0.2).done
            adapted = model(tokens())
            with second.applied(0.5):
                assert not torch.allclose(model(tokens()), adapted, atol=1e-2)
            assert torch.equal(model(tokens()), adapted)
        assert wait([waiting], timeout=LONG).done
    waiting.result()
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert torch.allclose(first.logits(tokens()), adapted, atol=1e-5)


def test_a_thread_that_waits_long_says_so(two, monkeypatch):
    monkeypatch.setattr(locks, "_PATIENCE", 0.01)
    (first, second), _ = two
    said: list[str] = []
    waits = threading.Event()

    def note(fact: str) -> None:
        said.append(fact)
        waits.set()

    # Neither filters of warnings nor a listener in a context reach the thread that waits.
    monkeypatch.setattr(locks, "warn", note)
    with ThreadPoolExecutor(1) as pool:
        with first.applied():
            waiting = pool.submit(second.logits, tokens())
            assert waits.wait(timeout=LONG)
        assert wait([waiting], timeout=LONG).done
    assert "lens.applied()" in said[0]


def test_a_lock_is_let_go_once_however_many_blocks_hold_it():
    lock = locks.Lock()

    def hold(span: Temporary) -> None:
        locks.hold(span, lock)

    with Temporary(hold):
        with Temporary(hold):
            pass
        assert len(lock.holders) == 1
    assert not lock.holders


@pytest.mark.sample(2)
@pytest.mark.parametrize("how", ["left elsewhere", "resumed elsewhere", "collected elsewhere"])
def test_a_block_that_ends_in_another_thread_lets_others_in(how: str, two):
    """As a server's generators do, each step of which is run by the next thread that is free."""
    (first, second), _ = two
    expected = second.logits(tokens())
    before = held(first.model)
    pools = [ThreadPoolExecutor(1) for _ in range(3)]
    block = first.applied()

    def stream():
        with torch.no_grad(), first.applied() as model:
            yield model(tokens())

    def abandon() -> None:
        lost = [first.applied()]
        lost.append(lost)
        lost[0].__enter__()

    steps: list[Callable] = [block.__enter__, lambda: block.__exit__(None, None, None)]
    if how == "resumed elsewhere":
        said = stream()
        steps = [lambda: next(said), lambda: next(said, None)]
    elif how == "collected elsewhere":
        gc.disable()
        steps = [abandon, gc.collect]
    try:
        for pool, step in zip(pools, steps, strict=False):
            run_in(pool, step, [()])
        assert held(first.model) == before
        (found,) = run_in(pools[2], second.logits, [(tokens(),)])
        assert torch.equal(found, expected)
    finally:
        gc.enable()


def test_a_block_is_no_block_of_two_threads(two):
    (first, _), _ = two
    block = first.applied()
    with ThreadPoolExecutor(1) as pool, block, pytest.raises(RuntimeError, match="open already"):
        pool.submit(block.__enter__).result(timeout=LONG)
    with block:  # again, once it has ended
        pass
    with ThreadPoolExecutor(1) as pool:
        run_in(pool, first.logits, [(tokens(),)])


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_quiet_block_leaves_no_filter_where_another_threads_block_overlaps(ours_first: bool):
    """`catch_warnings` in another thread puts back the list of filters that it found."""
    before = list(warnings.filters)
    quiet = without_warnings()
    theirs = contextlib.ExitStack()
    if ours_first:
        quiet.__enter__()
        theirs.enter_context(warnings.catch_warnings())
        quiet.close()
        theirs.close()
    else:
        theirs.enter_context(warnings.catch_warnings())
        quiet.__enter__()
        theirs.close()
        quiet.close()
    assert list(warnings.filters) == before


def test_quiet_blocks_that_say_the_same_do_not_end_one_another():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with without_warnings("said twice"):
            with without_warnings("said twice"):
                warnings.warn("said twice", stacklevel=1)
            warnings.warn("said twice", stacklevel=1)
        warnings.warn("said twice", stacklevel=1)
    assert len(seen) == 1


def test_without_the_lock_it_shows(two, monkeypatch):
    """The control: errors, other numbers, or hooks left behind."""
    (first, second), _ = two
    for module in (model_hooks, public_call, adapted_model):
        monkeypatch.setattr(module, "hold", lambda span, lock: None)
    expected = [lens.logits(tokens()) for lens in (first, second)]
    barrier = threading.Barrier(2)

    def at_the_same_time(i: int) -> bool:
        lens = (first, second)[i]
        try:
            with torch.no_grad(), lens.applied() as model:
                barrier.wait(timeout=LONG)
                found = model(tokens())
                barrier.wait(timeout=LONG)
        except (ll.errors.LensLoraError, threading.BrokenBarrierError):
            barrier.abort()  # the other one waits at it
            return False
        return torch.allclose(found, expected[i], atol=1e-3)

    monkeypatch.setattr(adapted_model, "hold", lambda span, lock: None)
    with ThreadPoolExecutor(2) as pool:
        assert not all(run_in(pool, at_the_same_time, [(0,), (1,)]))
