"""Many prompts through chosen analyses, into Parquet.

1. The records are read and tokenised; an error in one is kept with its line.
2. What earlier runs finished is skipped. The rest is run in batches of similar length, every n-th
   by one of n processes, and each batch is on the disk before the next begins.
3. The main process merges the batches in the order of the records.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lens_lora.adapters.adapter import Adapter
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout, bound
from lens_lora.sweeps.analyses import chosen
from lens_lora.sweeps.batches import Job, Row, make_batches, measure, prepare
from lens_lora.sweeps.processes import Processes, launched
from lens_lora.sweeps.records import Record, RecordsLike, SweepError, read_records
from lens_lora.sweeps.result import SweepResult
from lens_lora.sweeps.store import Store, require_same_sweep

__all__ = ["require_resumable", "sweep"]

_SAMPLED, _WARNED = 64, 10


def sweep(
    lens: LoraLens,
    records: RecordsLike,
    analyses: str | Iterable[str] = ("first_order",),
    *,
    out: str | Path = "results.parquet",
    readout: Readout | None = None,
    batch_size: int = 8,
    resume: bool = True,
    progress: bool = True,
) -> SweepResult:
    """Run analyses on hundreds of prompts; after an interruption, the same call resumes.

    Under `accelerate launch` (or torchrun, mpirun) every process calls this with its own lens and
    takes its share; several machines need one shared folder.

    Cost: two forward passes per prompt, and what each analysis costs; a record's numbers do not
    depend on its batch beyond rounding.

    Args:
        lens: the adapter over the model.
        records: a .jsonl or .csv file, a DataFrame, a Dataset, or mappings, with `prompt`, the
            answers `doc` and `pre` (strings with their leading space, of one token or several),
            and optionally `id`, by default the row's number from 0.
        analyses: one or several of 'first_order', 'first_order_at_1', 'path', 'add_one',
            'leave_one_out', 'second_order'.
        out: 'results.parquet', one row per prompt and site; beside it 'results.prompts.parquet',
            one row per prompt, and until the end 'results.parts/'.
        readout: read on every prompt, in place of the margin doc − pre.
        batch_size: how many prompts are run, and written, together.
        resume: go on with what is at `out`; False removes it and starts over.
        progress: show a bar.

    Returns:
        SweepResult, on every process. A bad record does not stop the sweep: it is named in a
        warning, and its row in the prompts' table says what is wrong.

    Raises:
        SweepError: there are no records, an analysis is unknown, a file is of another kind, or
            `out` holds results of another lens, readout, choice of analyses or prompts.
        TokenError: the readout does not fit the model.
        ModelStateError: an analysis cannot be computed on this lens or model.
    """
    if batch_size < 1:
        raise SweepError(f"batch_size={batch_size}: expected at least 1.")
    names = chosen(analyses)
    rows = read_records(records, with_answers=readout is None)
    if readout is not None:
        _require_for_all(lens, readout)
    processes = launched()
    store = Store(out, _fingerprint(lens, names, readout), lens.sites, names)
    before = store.done() if resume else {}
    _require_same_records(rows, before, store.prompts_path)
    shown = progress and processes.is_main
    prepared = _prepare(lens, rows, readout, before, shown)
    processes.wait()
    if processes.is_main:
        store.begin(anew=not resume)
    processes.wait()
    jobs = [job for job in prepared if isinstance(job, Job)]
    mine = make_batches(jobs, batch_size)[processes.index :: processes.count]
    with _bar(mine, len(before), processes, shown) as bar:
        for batch in mine:
            store.add(measure(lens, batch, names))
            bar.update(len(batch))
    processes.wait()
    checked = [job if isinstance(job, Record) else job.record for job in prepared]
    if processes.is_main:
        store.merge(checked, before)
    processes.wait()
    result = _result(lens, store, checked, names, len(before))
    if result.errors and processes.is_main:
        _warn(result)
    return result


def _prepare(
    lens: LoraLens,
    records: Sequence[Record],
    readout: Readout | None,
    done: Mapping[str, Row],
    shown: bool,
) -> list[Job | Record]:
    """Each record as a job; finished and bad records as they are."""
    with tqdm(records, "reading records", leave=False, disable=not shown, unit="record") as bar:
        return [r if str(r.id) in done else prepare(lens, r, readout) for r in bar]


def _bar(mine: Sequence[list[Job]], resumed: int, processes: Processes, shown: bool) -> tqdm:
    """A bar that counts prompts; with several processes, those of the first."""
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    begun = 0 if share else resumed
    total = begun + sum(map(len, mine))
    return tqdm(total=total, initial=begun, desc=f"sweep{share}", unit="prompt", disable=not shown)


def _require_for_all(lens: LoraLens, readout: Readout) -> None:
    """Check that the readout has no list of tokens, one per prompt: batches regroup the prompts.

    Raises:
        TokenError: the readout has one token per prompt, or a token that the model lacks.
    """
    for count in (1, 2):
        ones = torch.ones(count, 1, dtype=torch.long, device=lens.device)
        bound(readout, lens.model, Prompts(ones, ones[:, 0]))


def _require_same_records(records: Sequence[Record], done: Mapping[str, Row], path: Path) -> None:
    """Check that finished results are of these records and not of other prompts.

    Raises:
        SweepError: a finished id is missing now, or has another prompt or answers.
    """
    now: dict[str, Record] = {}
    for record in records:
        now.setdefault(str(record.id), record)
    remedy = "Give another out, or start over with resume=False (--no-resume)."
    for name, row in done.items():
        record = now.get(name)
        if record is None:
            raise SweepError(
                f"{path} or its parts hold the id {name!r} (prompt {row.prompt!r}), but the "
                f"records do not. {remedy}"
            )
        for field in ("prompt", "doc", "pre"):
            there, here = getattr(row, field), getattr(record, field)
            if there != here:
                raise SweepError(
                    f"the {field} of id {name!r} is {there!r} in {path} or its parts, but {here!r} "
                    f"in the records ({record.where}). {remedy}"
                )


def require_resumable(
    out: str | Path, adapter: Adapter, analyses: str | Iterable[str], readout: Readout | None = None
) -> None:
    """Check, before a model is loaded, that results at `out` belong to the same sweep.

    Args:
        out: the results' path, ending in .parquet.
        adapter: of the sweep to be run.
        analyses: one or several names from `ANALYSES`.
        readout: for all prompts; None for the margin between each record's answers.

    Raises:
        SweepError: `out` holds results of another adapter, choice of analyses or readout.
    """
    require_same_sweep(out, _without_model(adapter, chosen(analyses), readout))


def _without_model(
    adapter: Adapter, analyses: Sequence[str], readout: Readout | None
) -> dict[str, Any]:
    factors = {
        f"{module}.{field.name}": getattr(factor, field.name)
        for module, factor in adapter.modules.items()
        for field in dataclasses.fields(factor)
    }
    return {
        "adapter_weights": _digest(factors),
        "analyses": list(analyses),
        "readout": f"{readout.label}, {readout.units}" if readout else "margin of doc and pre",
    }


def _fingerprint(
    lens: LoraLens, analyses: Sequence[str], readout: Readout | None
) -> dict[str, Any]:
    """What the numbers depend on besides the records, as plain JSON."""
    return {
        **lens.describe(),
        "sites": len(lens.sites),
        "model_weights": _digest(dict(lens.model.named_parameters())),
        **_without_model(lens.adapter, analyses, readout),
    }


def _digest(values: Mapping[str, Any]) -> str:
    """A short hash of tensors (of a sample of each one's numbers) and plain values."""
    digest = hashlib.sha256()
    for name, value in values.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", torch.float64)
            digest.update(str(tuple(value.shape)).encode() + some.numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:12]


def _result(
    lens: LoraLens,
    store: Store,
    records: Sequence[Record],
    analyses: tuple[str, ...],
    resumed: int,
) -> SweepResult:
    rows = store.prompts()
    good = [row for row in rows if row["error"] is None]
    readouts, units = ({row[name] for row in good} for name in ("readout", "units"))
    return SweepResult(
        path=store.sites_path,
        prompts_path=store.prompts_path,
        records=len(records),
        resumed=resumed,
        flips=sum(row["flips"] is True for row in good),
        errors=tuple((row["id"], row["error"]) for row in rows if row["error"] is not None),
        sites=lens.sites,
        analyses=analyses,
        readout=readouts.pop() if len(readouts) == 1 else "margin(doc − pre)",
        units=" and ".join(sorted(units)),
        meta=lens.describe(),
    )


def _warn(result: SweepResult) -> None:
    shown = [f"  {identity!r}: {error}" for identity, error in result.errors[:_WARNED]]
    if len(result.errors) > _WARNED:
        shown.append(f"  … and {len(result.errors) - _WARNED} more")
    lines = "\n".join(shown)
    warnings.warn(
        f"{len(result.errors)} of {result.records} records have no numbers (column 'error' of "
        f"{result.prompts_path}):\n{lines}",
        stacklevel=3,
    )
