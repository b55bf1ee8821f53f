"""Many prompts through chosen analyses, into Parquet.

1. The records are read and tokenised; an error in one is kept with its line.
2. What earlier runs finished is skipped. The rest is run in batches of similar length, every n-th
   by one of n processes, and each batch is on the disk before the next begins.
3. The main process merges the batches in the order of the records.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch
from tqdm import tqdm

from lens_lora.adapters.adapter import Adapter
from lens_lora.errors import PromptError, TokenError
from lens_lora.lens import LoraLens
from lens_lora.readouts.divergence import KL
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.readout import Readout, bound
from lens_lora.sweeps.agreement import by_main, require_one_sweep
from lens_lora.sweeps.analyses import ANALYSES, BY_TOKEN, ByToken, chosen
from lens_lora.sweeps.batches import (
    Job,
    Make,
    Row,
    is_make,
    make_batches,
    measure,
    prepare,
    tokenised,
    with_text,
)
from lens_lora.sweeps.fingerprint import (
    fingerprint,
    fingerprint_without_model,
)
from lens_lora.sweeps.lock import only_writer
from lens_lora.sweeps.processes import Processes, launched
from lens_lora.sweeps.records import Record, RecordsLike, SweepError, read_records
from lens_lora.sweeps.result import SweepResult
from lens_lora.sweeps.resume import Content, content
from lens_lora.sweeps.store import Store, require_same_sweep
from lens_lora.sweeps.token_file import ActivationsFile
from lens_lora.sweeps.token_sweep import token_sweep

__all__ = ["require_resumable", "require_slopes", "sweep"]

_WARNED = 10


@overload
def sweep(  # pyright: ignore[reportOverlappingOverload]
    lens: LoraLens,
    records: RecordsLike,
    analyses: ByToken,
    *,
    out: str | Path = "results.parquet",
    batch_size: int = 8,
    resume: bool = True,
    version: str | None = None,
    progress: bool = True,
) -> ActivationsFile: ...


@overload
def sweep(
    lens: LoraLens,
    records: RecordsLike,
    analyses: str | Iterable[str] = ("first_order",),
    *,
    out: str | Path = "results.parquet",
    readout: Readout | Make | None = None,
    batch_size: int = 8,
    resume: bool = True,
    version: str | None = None,
    progress: bool = True,
) -> SweepResult: ...


def sweep(
    lens: LoraLens,
    records: RecordsLike,
    analyses: str | Iterable[str] = ("first_order",),
    *,
    out: str | Path = "results.parquet",
    readout: Readout | Make | None = None,
    batch_size: int = 8,
    resume: bool = True,
    version: str | None = None,
    progress: bool = True,
) -> SweepResult | ActivationsFile:
    """Run analyses on hundreds of prompts; after an interruption, the same call resumes.

    Under `accelerate launch` (or torchrun, mpirun) every process calls this with its own lens and
    takes its share; several machines need one shared folder.

    Cost: two forward passes per prompt, and what each analysis costs; a record's numbers do not
    depend on its batch beyond rounding.

    Args:
        lens: the adapter over the model.
        records: a .jsonl or .csv file, a DataFrame, a Dataset, or mappings, with `prompt`, the
            answers `doc` and `pre` (strings with their leading space, of one token or several),
            and optionally `id`, by default the row's number from 0; in place of `prompt` also
            `messages`, a conversation, and with such a readout `response` in place of answers.
        analyses: one or several of 'first_order', 'first_order_at_1', 'path', 'add_one',
            'leave_one_out', 'second_order'; or 'activations' (or 'activations_trained') alone,
            which needs no answers and reads the records one after another, so that there may be
            any number of them.
        out: 'results.parquet', one row per prompt and site; beside it 'results.prompts.parquet',
            one row per prompt, and until the end 'results.parts/'. Of activations one row per
            token, and no second file.
        readout: read on every prompt, in place of the margin doc − pre; or what makes a readout of
            one response per prompt, `ll.AnswerLogProb`, `ll.KL` or a function of the responses, for
            records that have a `response`.
        batch_size: how many prompts are run, and written, together; one of 'path', 'add_one' and
            'leave_one_out', so that a kill loses at most one prompt's work.
        resume: go on with what is at `out`; False removes it and starts over.
        version: names what the readout and your hooks compute where their code and values cannot
            be hashed (an error says so); change it whenever that changes.
        progress: show a bar.

    Returns:
        SweepResult, on every process. A bad record does not stop the sweep: it is named in a
        warning, and its row in the prompts' table says what is wrong. So is a damaged part of an
        earlier run, whose prompts run again. Of activations, `ActivationsFile`.

    Raises:
        SweepError: there are no records, an analysis is unknown, a file is of another kind, or
            `out` holds results of another lens, readout, choice of analyses or prompts, or is
            being written by another sweep, or cannot be written or read.
        TokenError: the readout fits no record's prompt.
        ModelStateError: an analysis cannot be computed on this lens or model.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SweepError(f"batch_size={batch_size!r}: expected a whole number of at least 1.")
    names = chosen(analyses)
    if names[0] in BY_TOKEN:
        if readout is not None:
            raise SweepError(f"{names[0]!r} has no readout; leave readout out.")
        options: dict[str, Any] = {"batch_size": batch_size, "resume": resume, "version": version}
        return token_sweep(lens, records, names[0], out=out, progress=progress, **options)
    said = is_make(readout)
    read = read_records(records, with_answers=readout is None, with_response=said)
    rows = [with_text(lens, record) for record in read]
    if readout is not None and not said:
        _require_for_all(lens, rows, cast(Readout, readout))
    asked = readout(["", ""]) if is_make(readout) else cast(Readout | None, readout)
    require_slopes(names, asked)
    processes = launched()
    about = fingerprint(lens, names, readout, version)
    store, shown = Store(out, about, lens.sites, names), progress and processes.is_main
    with only_writer(store.sites_path) if processes.is_main else contextlib.nullcontext():
        require_one_sweep(processes.gather(store.fingerprint), processes.index)
        before = store.done(rows) if resume else {}
        prepared = _prepare(lens, rows, readout, before, shown)
        by_main(processes, lambda: store.begin(anew=not resume))
        jobs = [job for job in prepared if isinstance(job, Job)]
        checked = [job if isinstance(job, Record) else job.record for job in prepared]
        resumed = sum(r.error is None and content(r) in before for r in checked)
        size = 1 if any(ANALYSES[name].many for name in names) else batch_size
        mine = make_batches(jobs, size)[processes.index :: processes.count]
        with _bar(mine, resumed, processes, shown) as bar:
            for batch in mine:
                store.add(measure(lens, batch, names))
                bar.update(len(batch))
        by_main(processes, lambda: store.merge(checked, before))
        result = _result(lens, store, checked, names, resumed, _label(readout))
        processes.wait()  # the main process lets no other sweep write before all have read
    if processes.is_main:
        _warn(result)
    return result


def _prepare(
    lens: LoraLens,
    records: Sequence[Record],
    readout: Readout | Make | None,
    done: Mapping[Content, Row],
    shown: bool,
) -> list[Job | Record]:
    """Each record as a job; finished and bad records as they are."""
    with tqdm(records, "reading records", leave=False, disable=not shown, unit="record") as bar:
        return [r if content(r) in done else prepare(lens, r, readout) for r in bar]


def _bar(mine: Sequence[list[Job]], resumed: int, processes: Processes, shown: bool) -> tqdm:
    """A bar that counts prompts; with several processes, those of the first."""
    share = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    begun = 0 if share else resumed
    total = begun + sum(map(len, mine))
    return tqdm(total=total, initial=begun, desc=f"sweep{share}", unit="prompt", disable=not shown)


def _require_for_all(lens: LoraLens, records: Sequence[Record], readout: Readout) -> None:
    """Check that the readout fits some prompt, and no list of them: batches regroup the prompts.

    Raises:
        TokenError: the readout has one token per prompt, or a token that no prompt can read.
    """
    one = torch.ones(1, 1, dtype=torch.long, device=lens.device)
    some, first = Prompts(one, one[:, 0]), None
    for record in records:
        try:
            some = tokenised(lens, record) if record.error is None else some
            for count in (1, 2):
                bound(readout, lens.model, some.repeat(count))
            return
        except PromptError:
            continue
        except TokenError as error:
            first = first or error
    if first is not None:
        raise first


def require_resumable(
    out: str | Path,
    adapter: Adapter,
    analyses: str | Iterable[str],
    readout: Readout | Make | None = None,
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
    require_same_sweep(out, fingerprint_without_model(adapter, chosen(analyses), readout))


def require_slopes(names: Sequence[str], readout: Readout | None) -> None:
    """Refuse the derivatives of a KL, which has none at ε = 0; its base is not held here.

    Args:
        names: from `ANALYSES`.
        readout: of all records; None for margins.

    Raises:
        SweepError: naming the analysis, and those that read a KL.
    """
    none = sorted({"first_order", "second_order", "first_order_at_1"}.intersection(names))
    if isinstance(readout, KL) and none:
        raise SweepError(
            f"{readout.label} is not read by {none[0]!r} in a sweep; use 'path', 'add_one' or "
            "'leave_one_out'."
        )


def _label(readout: Readout | Make | None) -> str:
    """Of what is read, where records have readouts of their own."""
    return readout(["", ""]).label if is_make(readout) else "margin(doc − pre)"


def _result(
    lens: LoraLens,
    store: Store,
    records: Sequence[Record],
    analyses: tuple[str, ...],
    resumed: int,
    label: str,
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
        damaged=tuple(map(str, store.damaged)),
        sites=lens.sites,
        analyses=analyses,
        readout=readouts.pop() if len(readouts) == 1 else label,
        units=" and ".join(sorted(units)),
        meta=lens.describe(),
    )


def _warn(result: SweepResult) -> None:
    """Name the bad records and the damaged parts, if there are any."""
    if result.errors:
        shown = [f"  {identity!r}: {error}" for identity, error in result.errors]
        _warn_of(
            f"{len(result.errors)} of {result.records} records have no numbers (column 'error' of "
            f"{result.prompts_path})",
            shown,
        )
    if result.damaged:
        _warn_of(
            f"{len(result.damaged)} files of finished prompts could not be read, and their "
            "prompts were run again",
            [f"  {damage}" for damage in result.damaged],
        )


def _warn_of(fact: str, lines: Sequence[str]) -> None:
    more = [f"  … and {len(lines) - _WARNED} more"] if len(lines) > _WARNED else []
    warnings.warn("\n".join([f"{fact}:", *lines[:_WARNED], *more]), stacklevel=4)
