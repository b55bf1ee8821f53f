"""What glibc keeps of freed memory is given back in long passes, and before a bank is stacked."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import architectures
import cases
import models
import pytest
import torch

import lens_lora as ll
from lens_lora import compat
from lens_lora.banks import record
from lens_lora.compat import torch_tensors

MIB = 2**20
COUNT = 64


def resident_mib() -> float:
    """MiB that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_memory_that_was_freed_between_tensors_is_given_back():
    tensors = [torch.zeros(MIB // 4) for _ in range(COUNT)]
    between = tensors[::8]
    held = resident_mib()
    tensors.clear()
    compat.give_back_freed_memory()
    # Without this the allocator keeps what lies below the last of them.
    assert held - resident_mib() > COUNT / 2
    assert all(not tensor.any() for tensor in between)


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    compat.give_back_freed_memory()


@pytest.mark.parametrize(("largest", "times"), [(0, 1), (2**30, 0)])
def test_only_a_large_pool_gives_back(largest: int, times: int, monkeypatch: pytest.MonkeyPatch):
    given_back: list[None] = []
    monkeypatch.setattr(record, "_LARGE", largest)
    monkeypatch.setattr(record, "give_back_freed_memory", lambda: given_back.append(None))
    pool = record.TensorPool()
    tensor = torch.ones(1, 2, 3)
    name, index = pool.address_of(tensor)
    assert torch.equal(pool.stacks()[name][index], tensor)
    assert len(given_back) == times


@pytest.mark.parametrize("analysis", ["bank", "edges"])
def test_a_pass_that_keeps_tensors_gives_freed_memory_back(
    analysis: str, monkeypatch: pytest.MonkeyPatch
):
    """Each time that it has kept enough: here all of them, and none on a short prompt."""
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    given_back: list[None] = []
    monkeypatch.setattr(torch_tensors, "give_back_freed_memory", lambda: given_back.append(None))

    def times() -> int:
        given_back.clear()
        prompts = models.tokens(1, 5)
        if analysis == "bank":
            ll.bank(lens.model, prompts, ll.Logit(3), progress=False)
        else:
            with architectures.in_float64():
                ll.edges(lens, prompts, ll.Logit(3), progress=False)
        return len(given_back)

    assert times() == 0
    monkeypatch.setattr(torch_tensors, "_KEPT", 0)
    assert times() >= len(lens.sites)
