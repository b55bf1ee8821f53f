"""Texts, of any number, through `activations`, into one Parquet file with a row per token.

1. Records are read, tokenised and run window by window (windows.py); nothing is held of what is
   done, so the memory does not grow with the number of texts.
2. Each window is on the disk before the next begins (token_store.py), and a run that was
   interrupted goes on with the records that no window holds.
3. The main process puts the windows together in the order of the records.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sized
from pathlib import Path

from tqdm import tqdm

from lens_lora.engine.activations import activation_ranks, in_gauge
from lens_lora.lens import LoraLens
from lens_lora.sweeps.agreement import by_main, require_one_sweep
from lens_lora.sweeps.analyses import BY_TOKEN
from lens_lora.sweeps.fingerprint import fingerprint
from lens_lora.sweeps.lock import only_writer
from lens_lora.sweeps.processes import Processes, launched
from lens_lora.sweeps.records import Record, RecordsLike, each_record
from lens_lora.sweeps.token_file import ActivationsFile
from lens_lora.sweeps.token_store import TokenStore
from lens_lora.sweeps.token_table import window_table
from lens_lora.sweeps.windows import Windows

__all__ = ["token_sweep"]


def token_sweep(
    lens: LoraLens,
    records: RecordsLike,
    name: str,
    *,
    out: str | Path,
    batch_size: int,
    resume: bool,
    version: str | None,
    progress: bool,
) -> ActivationsFile:
    """`sweep` of an analysis by token.

    Args:
        lens, records, out, batch_size, resume, version, progress: as for `sweep`.
        name: of the analysis, from `BY_TOKEN`.

    Raises:
        SweepError, UnsupportedAdapterError: as for `sweep`, and for `activations`.
    """
    gauge = BY_TOKEN[name].options["gauge"]
    ranks = activation_ranks(lens, range(len(lens.sites)), gauge)
    processes = launched()
    store = TokenStore(out, fingerprint(lens, (name,), None, version), lens.sites, ranks)
    shown = progress and processes.is_main
    with only_writer(store.path) if processes.is_main else contextlib.nullcontext():
        require_one_sweep(processes.gather(store.fingerprint), processes.index)
        done = store.sources() if resume else []
        by_main(processes, lambda: store.begin(anew=not resume))
        windows = Windows(lens, _counted(records, processes, shown), done, processes)
        turned = in_gauge(lens, gauge)
        for window in windows:
            store.drop(windows.stale)
            store.add(*window_table(turned, window, ranks, batch_size))
        by_main(processes, lambda: store.merge(windows.seen))
        found = ActivationsFile(store.path)
        processes.wait()  # the main process lets no other sweep write before all have read
    if processes.is_main:
        _warn(found, store)
    return found


def _counted(records: RecordsLike, processes: Processes, shown: bool) -> Iterator[Record]:
    """The records, with a bar that counts them; of several processes, the first one's."""
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    total = len(records) if isinstance(records, Sized) and not isinstance(records, str) else None
    with tqdm(
        total=total, desc=f"sweep{share}", unit="text", leave=total is not None, disable=not shown
    ) as bar:
        for record in each_record(records, with_answers=False):
            yield record
            bar.update()


def _warn(found: ActivationsFile, store: TokenStore) -> None:
    """Say how many records are bad, and how many parts were damaged."""
    if found.errors:
        warnings.warn(
            f"{found.errors} of {found.texts} records have no numbers; the column 'error' of "
            f"{found.path} says why.",
            stacklevel=4,
        )
    if store.damaged:
        names = "\n".join(f"  {damage}" for damage in store.damaged)
        warnings.warn(
            f"{len(store.damaged)} files of finished texts could not be read, and their texts were "
            f"run again:\n{names}",
            stacklevel=4,
        )
