"""One writer for each output: a lock that the system releases when its process ends.

1. The main process of a sweep holds an `flock` on '.results.parquet.lock' while it runs; the other
   processes of the same sweep need none.
2. A second sweep on the same output is refused, and told which process holds the lock.
3. The file is removed at the end. One that a killed process left behind is nobody's: the next
   sweep takes it over.

On a file system without locks a warning says so. On Windows, which has no `flock`, nothing is
locked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections.abc import Generator
from pathlib import Path

from lens_lora.sweeps.files import told
from lens_lora.sweeps.records import SweepError

__all__ = ["only_writer"]


@contextlib.contextmanager
def only_writer(out: Path) -> Generator[None]:
    """Within the block, no other sweep can write to this output.

    Args:
        out: the results' path; its folder is made.

    Raises:
        SweepError: another process writes there, or the folder cannot be made.
    """
    path = out.with_name(f".{out.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(
            f"{path.parent}: the folder cannot be made ({error.strerror}); give another out."
        ) from error
    with told(path):
        file = _held(path, out)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # removed while it is held: nobody else can have it
            path.unlink(missing_ok=True)
        os.close(file)


def _held(path: Path, out: Path) -> int:
    """The lock file, open and locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, path, out)
            if _is_at(path, file):
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # its last owner removed it just before it was locked


def _lock(file: int, path: Path, out: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(file, 200).decode(errors="replace") or "another process"
        raise SweepError(
            f"{out} is being written by {holder}. Wait until it has ended, or give another out."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{path.parent}: its file system has no locks ({error.strerror}), so a second sweep to "
            f"{out} would not be noticed; do not start one.",
            stacklevel=2,
        )


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
