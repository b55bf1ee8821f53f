"""What processes of one sweep do together: wait for the main one, and agree on what is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lens_lora.sweeps.fingerprint import Fingerprint, differences
from lens_lora.sweeps.processes import Processes
from lens_lora.sweeps.records import SweepError

__all__ = ["by_main", "require_one_sweep"]


def by_main(processes: Processes, work: Callable[[], object]) -> None:
    """The main process works while the others wait.

    Args:
        processes: of this sweep.
        work: of the main one.
    """
    processes.wait()
    if processes.is_main:
        work()
    processes.wait()


def require_one_sweep(fingerprints: Sequence[Fingerprint], index: int) -> None:
    """Check that this process computes what the main process does.

    Args:
        fingerprints: of all processes.
        index: of this one.

    Raises:
        SweepError: its model, adapter or readout is another.
    """
    differ = differences(fingerprints[0], fingerprints[index])
    if differ:
        raise SweepError(
            f"process {index + 1} of {len(fingerprints)} runs another sweep than process 1: "
            f"{'; '.join(differ)}. Give each of them the same model, adapter and readout."
        )
