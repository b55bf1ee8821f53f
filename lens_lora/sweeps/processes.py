"""The processes of `accelerate launch`, `torchrun` or `mpirun`, or a single process.

Only `launched` imports torch, and only if there are several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import Any

from lens_lora.errors import LensLoraError

__all__ = ["Processes", "launched", "rank"]

# One process may finish its share long before another.
_PATIENCE = timedelta(days=7)
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that were launched together.

    Attributes:
        index: this process, from 0.
        count: how many there are.
        device: where this process runs, as torch names it.
        wait: returns when every process has called it.
        gather: the values of all processes, in their order.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = lambda: None
    gather: Callable[[Any], list[Any]] = lambda value: [value]

    @property
    def is_main(self) -> bool:
        """Whether this is the process that merges, prints and writes."""
        return self.index == 0


def rank() -> int:
    """This process's number as its launcher gives it, 0 without a launcher. Sets nothing up."""
    return max(int(os.environ.get(name) or 0) for name in _RANKS)


def launched() -> Processes:
    """The processes launched together, or this one alone.

    Raises:
        LensLoraError: several were launched, but accelerate was already set up in each of them as
            a single process, or one of them has ended.
    """
    size = max(int(os.environ.get(name) or 1) for name in _SIZES)
    if size < 2:
        return Processes()
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    is_on_cpu = wants_cpu or not torch.cuda.is_available()
    with _together():
        state = PartialState(cpu=is_on_cpu, timeout=_PATIENCE)
    if state.num_processes != size:
        raise LensLoraError(
            f"{size} processes were launched, but accelerate counts {state.num_processes}, so "
            "each would do all the work; on CPUs call accelerate.PartialState(cpu=True) first."
        )

    def wait() -> None:
        with _together():
            state.wait_for_everyone()

    def gather(value: Any) -> list[Any]:
        with _together():
            return list(gather_object([value]))

    return Processes(state.process_index, state.num_processes, str(state.device), wait, gather)


@contextlib.contextmanager
def _together() -> Generator[None]:
    """Within the block, every process must be alive."""
    try:
        yield
    except RuntimeError as error:
        raise LensLoraError(
            "another process of this run has ended before its end, and its own message says why; "
            f"run it again to resume. ({error})"
        ) from error
