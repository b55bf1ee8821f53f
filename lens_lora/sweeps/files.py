"""Files that are whole or not there, and errors of the disk as errors of a sweep."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

from lens_lora.sweeps.records import SweepError

__all__ = ["told", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], object], scratch: Path) -> None:
    """Write under a temporary name, and rename once the file is complete and on the disk.

    Args:
        path: the file.
        write: writes to the path that it is given.
        scratch: a folder of the same file system, for the unfinished file.

    Raises:
        SweepError: it cannot be written (a full disk, say).
    """
    unfinished = scratch / f".{uuid.uuid4().hex}"
    try:
        with told(path):
            write(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            _keep_name(path.parent)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def told(path: Path) -> Generator[None]:
    """Within the block, an error of the system becomes one of the sweep.

    Args:
        path: what is written, for the message.

    Raises:
        SweepError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        fact = error.strerror or error
        raise SweepError(
            f"{path} cannot be written ({fact}). Finished prompts are kept: mend that and run the "
            "same sweep again to resume, or give another out."
        ) from error


def _keep_name(folder: Path) -> None:
    """Wait until the folder's own entries are on the disk, where its file system can say so."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
