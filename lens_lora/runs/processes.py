"""The processes that work on a run together, and the lock that lets only one run write an output.

The processes are those of `accelerate launch`, `torchrun` or `mpirun`, or there is a single one.
The main process holds a lock of `filelock` on '.results.parquet.lock' while the run lasts; the
others need none. The operating system releases the lock when the process ends. The file may stay;
then it locks nothing.

Only `launched` imports torch, and only if there are several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

from lens_lora.errors import LensLoraError, SweepError, warn

# --- The processes that were launched together


# How long a process waits for the others; one may finish its share long before another.
_PATIENCE = timedelta(days=7)
# The environment variables in which launchers give the number of processes, and this one's rank.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# The variables that accelerate's launcher sets if it starts one process although several were asked
# for.
_SINGLE_OF_ACCELERATE = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"}


def _wait_for_nobody() -> None:
    pass


def _of_one_process(value: Any) -> list[Any]:
    return [value]


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that were launched together.

    Attributes:
        index: the number of this process, from 0.
        count: the number of processes.
        device: the device on which this process runs, as torch names it.
        wait: returns once every process has called it.
        gather: returns the values that all processes pass to it, in the order of the processes.
    """

    index: int = 0
    count: int = 1
    device: str = "cpu"
    wait: Callable[[], None] = _wait_for_nobody
    gather: Callable[[Any], list[Any]] = _of_one_process

    @property
    def is_main(self) -> bool:
        """Whether this is the process that merges, prints and writes."""
        return self.index == 0

    @property
    def share(self) -> str:
        """' (process 1 of 2)' for a progress bar; empty for a single process."""
        return f" (process {self.index + 1} of {self.count})" if self.count > 1 else ""

    def by_main(self, work: Callable[[], object]) -> None:
        """Do the work in the main process, while the others wait."""
        self.wait()
        if self.is_main:
            work()
        self.wait()


def rank() -> int:
    """This process's number as its launcher gives it, 0 without a launcher; nothing is set up."""
    return max(int(os.environ.get(name) or 0) for name in _RANKS)


def launched_count() -> int:
    """The number of processes as their launcher gives it, 1 without a launcher."""
    return max(int(os.environ.get(name) or 1) for name in _SIZES)


def launched() -> Processes:
    """The processes launched together, or this one alone.

    Warns:
        UserWarning: `accelerate launch` was asked for several processes and started this one alone.
    """
    size = launched_count()
    if size > 1:
        return _by_accelerate(size)
    if os.environ.keys() >= _SINGLE_OF_ACCELERATE:
        warn(
            "accelerate launch was asked for several processes and started one, which does all "
            "the work. Launch with --multi_gpu, on CPUs too: accelerate launch --multi_gpu "
            "--num_processes 2 -m lens_lora sweep …"
        )
    return Processes()


def _by_accelerate(size: int) -> Processes:
    """The processes as accelerate knows them, checked against the number that was launched."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    is_on_cpu = wants_cpu or not torch.cuda.is_available()
    with _all_alive():
        state = PartialState(cpu=is_on_cpu, timeout=_PATIENCE)
    if state.num_processes != size:
        raise LensLoraError(
            f"{size} processes were launched, but accelerate counts {state.num_processes}, so "
            "each would do all the work; on CPUs call accelerate.PartialState(cpu=True) first."
        )

    @_all_alive()
    def wait() -> None:
        state.wait_for_everyone()

    @_all_alive()
    def gather(value: Any) -> list[Any]:
        return list(gather_object([value]))

    return Processes(state.process_index, state.num_processes, str(state.device), wait, gather)


@contextlib.contextmanager
def _all_alive() -> Generator[None]:
    """Within the block, an error that another process has ended becomes one of this package's."""
    try:
        yield
    except RuntimeError as error:
        raise LensLoraError(
            "another process of this run has ended too early, and its own message says why; run it "
            f"again to resume. ({error})"
        ) from error


def require_one_process(processes: Processes) -> None:
    """Refuse shards under a launcher: both divide the same work.

    Args:
        processes: the processes that were launched.

    Raises:
        SweepError: there are several processes.
    """
    if processes.count > 1:
        raise SweepError(
            f"this is a shard of a run, and {processes.count} processes were launched together: "
            "both would divide the prompts. Start each shard as a process of its own, without a "
            "launcher, or leave the shard out."
        )


def require_whole_model(processes: Processes, *, is_over_ranks: bool) -> None:
    """Refuse to divide prompts among processes that each hold only a part of the model.

    Args:
        processes: the processes that were launched.
        is_over_ranks: whether the model's weights are split over processes.

    Raises:
        SweepError: there are several processes, and the weights are split.
    """
    if processes.count > 1 and is_over_ranks:
        raise SweepError(
            f"the model's weights are split over processes (tp_plan= or FSDP2), and "
            f"{processes.count} processes would divide the prompts: each needs the others' "
            "weights for every prompt. Call the analyses themselves, with the same prompts on "
            "every process, or load the whole model in each."
        )


# --- One writer for each output


@contextlib.contextmanager
def only_writer(out: Path) -> Generator[None]:
    """Within the block, no other run can write to this output.

    Raises:
        SweepError: another run holds the lock, or the lock cannot be made.
    """
    from filelock import FileLock, Timeout

    path = out.with_name(f".{out.name}.lock")
    # On a file system without locks, filelock would fall back to a mere file, which some versions
    # take away from another run.
    lock = FileLock(path, fallback_to_soft=False)
    with write_errors_of(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise SweepError(
                f"{out} is being written by another sweep, which holds {path}. Wait until it has "
                "ended, or give another out."
            ) from error
    try:
        yield
    finally:
        # The file is not removed: otherwise two runs could each lock a file of their own.
        lock.release()


@contextlib.contextmanager
def write_errors_of(path: Path) -> Generator[None]:
    """Within the block, a system's error becomes one of this package's, which names the path."""
    try:
        yield
    except OSError as error:
        fact = error.strerror or error
        raise SweepError(
            f"{path} cannot be written ({fact}). Remove the cause and run the same sweep again, "
            "which goes on where this one stopped, or give another out."
        ) from error
