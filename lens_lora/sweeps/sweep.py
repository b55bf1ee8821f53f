"""`sweep`: run many prompts through chosen analyses, into Parquet.

1. The records are read and tokenised; an error in one is kept with its line.
2. What earlier runs finished is skipped. The rest is run in batches of similar length, every n-th
   by one of n processes, and each batch is on the disk before the next begins.
3. The main process merges the batches in the order of the records.

An analysis by token takes the same steps as a stream (`stream.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, overload

import torch
from tqdm import tqdm
from typing_extensions import Unpack

from lens_lora.core import Adapter, LoraLens, Prompts, Readout
from lens_lora.errors import PromptError, SweepError, TokenError, setting
from lens_lora.guesses import fitting
from lens_lora.responses.kl import KL
from lens_lora.runs.fingerprint import fingerprint, fingerprint_without_model, strings_of
from lens_lora.runs.processes import Processes, launched, require_whole_model
from lens_lora.runs.shards import Shard, folder_of_shards, keep_plan
from lens_lora.runs.store import Store
from lens_lora.sweeps import batches
from lens_lora.sweeps.activations_file import ActivationsFile
from lens_lora.sweeps.analyses import (
    ANALYSES,
    BY_TOKEN,
    ByToken,
    chosen,
    options_of,
    require_no_slopes,
)
from lens_lora.sweeps.batches import Job, Make, prepare
from lens_lora.sweeps.records import Record, RecordsLike, read_records
from lens_lora.sweeps.result import AskedReadout, SweepResult, result_of
from lens_lora.sweeps.rows import Content, Row, RowStore, content
from lens_lora.sweeps.shards import SweepShard, notes_of, plan_of
from lens_lora.sweeps.stream import token_sweep

# --- The sweep


class _Options(TypedDict, total=False):
    """The arguments that all overloads of `sweep` have in common."""

    out: str | Path
    batch_size: int
    resume: bool
    version: str | None
    progress: bool


@overload
def sweep(
    lens: LoraLens,
    records: RecordsLike,
    analyses: str | Iterable[str] = ("first_order",),
    *,
    shard: tuple[int, int] | None,
    readout: Readout | Make | None = None,
    **options: Unpack[_Options],
) -> SweepResult | SweepShard: ...
@overload
def sweep(  # pyright: ignore[reportOverlappingOverload]
    lens: LoraLens, records: RecordsLike, analyses: ByToken, **options: Unpack[_Options]
) -> ActivationsFile: ...
@overload
def sweep(
    lens: LoraLens,
    records: RecordsLike,
    analyses: str | Iterable[str] = ("first_order",),
    *,
    readout: Readout | Make | None = None,
    **options: Unpack[_Options],
) -> SweepResult: ...
@fitting
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
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> SweepResult | ActivationsFile | SweepShard:
    """Run analyses on hundreds of prompts; after an interruption, the same call resumes.

    Under `accelerate launch` (or torchrun, mpirun) every process calls this with its own lens and
    takes its share; several machines need one shared folder. With `shard`, a call takes a share
    without any launcher, as in a task of a Slurm array, and `ll.gather(out)` joins the shards.

    Cost: what each analysis costs, and a forward pass per prompt for the base or the adapted model
    where no analysis runs it; a record's numbers do not depend on its batch beyond rounding.

    Args:
        lens: the adapter over the model.
        records: a .jsonl or .csv file, a DataFrame, a Dataset, or mappings. Each record has a
            `prompt`, or in its place `messages`, a conversation; the answers `doc` and `pre`,
            strings with their leading space, of one token or several; and optionally an `id`, by
            default the row's number from 0. A readout of responses needs a `response` in place of
            the answers. Where no answers are needed, a string or a conversation is a record by
            itself.
        analyses: one or several of 'first_order', 'first_order_at_1', 'path', 'add_one',
            'leave_one_out', 'second_order'; or 'activations' (or 'activations_trained') alone,
            which needs no answers and reads the records one after another, so that there may be
            any number of them.
        out: 'results.parquet', one row per prompt and site; beside it 'results.prompts.parquet',
            one row per prompt, and until the end 'results.parts/'. Of activations one row per
            token, and no second file.
        readout: the readout of every prompt, in place of the margin doc − pre. For records with a
            `response` it is what makes a readout of one response per prompt: `ll.AnswerLogProb`,
            `ll.KL` or a function of the responses.
        batch_size: how many prompts are run, and written, together; always one for 'path',
            'add_one' and 'leave_one_out', so that a kill loses at most one prompt's work.
        resume: go on with what is at `out`; False removes it and starts over.
        version: a name for code of your own that takes part: a function in `Readout.of`, a readout
            class, a hook or a `forward` of yours. Code cannot be compared with that of an earlier
            run, so without a version such a sweep cannot be resumed; change it with the code.
        shard: (i, n) runs shard i of n, counted from 1, into a folder of its own; give each shard
            the same records and the same `batch_size`.
        progress: show a bar.

    Returns:
        `SweepResult`, on every process; for a shard `SweepShard`, whose numbers are in its folder;
        for activations `ActivationsFile`. A bad record does not stop the sweep: a warning names it,
        and its row in the prompts' table says what is wrong. A warning also names a damaged part of
        an earlier run, whose prompts run again.

    Raises:
        ArgumentError: a shard that is not (i, n).
        SweepError: there are no records, an analysis is unknown or cannot be run with this readout
            or shard, `batch_size` is below 1, a file is of another kind, an object cannot be a
            record, or `out` holds results of another lens, readout, choice of analyses or prompts,
            or of code of your own without a version, or is being written by another sweep, or
            cannot be written or read.
        TokenError: the readout fits no record's prompt.
        ModelStateError: an analysis cannot be computed on this lens or model.
    """
    _require_batch_size(batch_size)
    names = chosen(analyses)
    own_shard = Shard.of(shard)
    if names[0] in BY_TOKEN:
        _require_neither(names[0], own_shard, readout)
        return token_sweep(
            lens,
            records,
            names[0],
            out=out,
            batch_size=batch_size,
            resume=resume,
            version=version,
            progress=progress,
        )

    rows = _read(lens, records, readout)
    lens = _lens_for(lens, rows, readout)
    _require_slopes(names, readout)

    processes = launched()
    require_whole_model(processes, is_over_ranks=lens.plan.is_over_ranks)
    depends_on = fingerprint(lens, options_of(names), readout, version)
    folder = None if own_shard is None else own_shard.folder_in(folder_of_shards(Path(out)))
    store = RowStore(out, depends_on, lens.sites, names, folder)
    is_shown = progress and processes.is_main
    batch_size = _prompts_at_once(names, batch_size)
    meta = {**lens.describe(), "strings": strings_of(lens) or ""}
    asked = _asked(readout)
    with store.writing(processes):
        finished = store.done(rows) if resume else {}
        prepared = _prepared(lens, rows, readout, is_shown)
        processes.by_main(lambda: store.begin(anew=not resume))

        all_batches = batches.make_batches(prepared.jobs, batch_size)
        share = _share(all_batches, own_shard, processes)
        if own_shard is not None:
            plan = plan_of(prepared.records, all_batches, own_shard.count)
            keep_plan(store, plan, notes_of(lens.sites, names, meta, asked, batch_size))
        unfinished = _without(share, finished)
        with _bar(share, unfinished, processes, is_shown) as bar:
            _run(lens, unfinished, names, store, bar)

        if own_shard is None:
            # Each process counts all records, also those that others ran.
            resumed = _count_finished(prepared.records, finished)
            processes.by_main(lambda: store.merge(prepared.records, finished))
            result = result_of(store, lens.sites, meta, names, resumed, asked)
        else:
            own_records = [job.record for job in itertools.chain.from_iterable(share)]
            resumed = _count_finished(own_records, finished)
            result = SweepShard(
                out=store.path,
                shard=(own_shard.index, own_shard.count),
                prompts=len(own_records),
                resumed=resumed,
                errors=_errors_of(prepared.records),
            )
    if own_shard is not None or processes.is_main:
        store.warn_of_bad_records(result.errors, len(result.errors), len(rows))
        store.warn_of_damaged_parts()
    return result


def _require_neither(analysis: str, own_shard: Shard | None, readout: object) -> None:
    """Refuse a shard or a readout for an analysis by token.

    Raises:
        SweepError: naming the one that was given.
    """
    if own_shard is not None:
        raise SweepError(
            f"{analysis!r} reads one record after another and has no shards; give each job a "
            "file of records, and an out, of its own."
        )
    if readout is not None:
        raise SweepError(f"{analysis!r} has no readout; leave readout out.")


def _prompts_at_once(names: Sequence[str], batch_size: int) -> int:
    """Choose the prompts of a batch: one if an analysis takes many passes for each."""
    takes_many_passes = any(ANALYSES[name].many for name in names)
    return 1 if takes_many_passes else batch_size


def _share(
    all_batches: Sequence[Sequence[Job]], own_shard: Shard | None, processes: Processes
) -> Sequence[Sequence[Job]]:
    """Take every n-th batch: those of this shard, or of this process."""
    if own_shard is None:
        return all_batches[processes.index :: processes.count]
    return [batch for number, batch in enumerate(all_batches) if own_shard.takes(number)]


def _run(
    lens: LoraLens,
    unfinished: Sequence[Sequence[Job]],
    names: Sequence[str],
    store: RowStore,
    bar: tqdm,
) -> None:
    """Run the batches one after another; each is on the disk before the next begins."""
    for batch in unfinished:
        store.add(batches.measure(lens, batch, names))
        bar.update(len(batch))


def _count_finished(records: Sequence[Record], finished: Mapping[Content, Row]) -> int:
    """Count the good records that an earlier run finished."""
    good = [record for record in records if record.error is None]
    return sum(content(record) in finished for record in good)


def _errors_of(records: Sequence[Record]) -> tuple[tuple[int | str, str], ...]:
    """List the id and the fault of each bad record."""
    return tuple((record.id, record.error) for record in records if record.error is not None)


def _require_batch_size(batch_size: object) -> None:
    """Refuse a batch size that is no whole number of at least 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        expected = "expected a whole number of at least 1"
        raise SweepError(f"{setting('batch_size', batch_size)}: {expected}.")


def _read(lens: LoraLens, records: RecordsLike, readout: Readout | Make | None) -> list[Record]:
    """Read all records, with what the readout needs of each, and the texts of conversations."""
    rows = read_records(
        records, with_answers=readout is None, with_response=batches.is_make(readout)
    )
    return [batches.with_text(lens, record) for record in rows]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """The records of a sweep after they were tokenised.

    Attributes:
        records: all records in order; one that does not fit the model is marked as bad.
        jobs: a job for each good record. Records that differ in their ids alone are one job.
    """

    records: list[Record]
    jobs: list[Job]


def _prepared(
    lens: LoraLens,
    records: Sequence[Record],
    readout: Readout | Make | None,
    is_shown: bool,
) -> _Prepared:
    """Tokenise the records, and bind the readout to each.

    Args:
        lens: the adapter over the model.
        records: all records.
        readout: the readout of every prompt; None for the margin of each record's answers.
        is_shown: whether a bar is shown.
    """
    checked: list[Record] = []
    jobs: dict[Content, Job] = {}
    bar = tqdm(records, "reading records", leave=False, disable=not is_shown, unit=" record")
    with bar:
        for record in bar:
            job_or_bad_record = prepare(lens, record, readout)
            if isinstance(job_or_bad_record, Job):
                jobs.setdefault(content(record), job_or_bad_record)
                checked.append(job_or_bad_record.record)
            else:
                checked.append(job_or_bad_record)
    return _Prepared(checked, list(jobs.values()))


def _without(share: Sequence[Sequence[Job]], finished: Mapping[Content, Row]) -> list[list[Job]]:
    """Leave out the jobs that an earlier run finished, and batches that are finished as a whole.

    Batches are made of all records, whatever is finished. So after an interruption a prompt is run
    together with the same other prompts, and its numbers are the same to the last bit.
    """
    unfinished_batches: list[list[Job]] = []
    for batch in share:
        unfinished = [job for job in batch if content(job.record) not in finished]
        if unfinished:
            unfinished_batches.append(unfinished)
    return unfinished_batches


def _asked(readout: Readout | Make | None) -> AskedReadout:
    """Return the name and units of the sweep's readout, if it has one."""
    if readout is None:
        return AskedReadout(None, None)
    example = _example_of(readout)
    return AskedReadout(example.label, example.units)


def _example_of(readout: Readout | Make) -> Readout:
    """Return the readout itself, or one that its function makes of two empty responses.

    It is used for its label, its units and its class alone.
    """
    return readout(["", ""]) if batches.is_make(readout) else Readout.required(readout)


def _bar(
    share: Sequence[Sequence[Job]],
    unfinished: Sequence[Sequence[Job]],
    processes: Processes,
    is_shown: bool,
) -> tqdm:
    """Make the bar of this process's share, of which an earlier run may have finished a part.

    It counts jobs, so records that differ in their ids alone count once.
    """
    total = sum(len(batch) for batch in share)
    left = sum(len(batch) for batch in unfinished)
    return tqdm(
        total=total,
        initial=total - left,
        desc=f"sweep{processes.share}",
        unit=" prompt",
        disable=not is_shown,
    )


# --- What is refused before anything is run


def _require_slopes(names: Sequence[str], readout: Readout | Make | None) -> None:
    """Refuse the derivatives of a KL in a sweep.

    Raises:
        SweepError: naming an analysis that needs them.
    """
    if readout is None:
        return
    example = _example_of(readout)
    if isinstance(example, KL):
        require_no_slopes(names, example.label)


def require_resumable(
    out: str | Path, adapter: Adapter, analyses: Sequence[str], readout: Readout | Make | None
) -> None:
    """Check, before a model is loaded, that results at `out` belong to the same sweep.

    Raises:
        SweepError: they belong to another one.
    """
    known = fingerprint_without_model(adapter, options_of(analyses), readout)
    RowStore(out, known, (), analyses).require_same_sweep()


def is_begun(out: str | Path) -> bool:
    """Whether some prompt of a sweep is finished: in its parts, or in the result."""
    store = Store(out, {})
    return store.path.exists() or any(store.folder.glob("*.parquet"))


def _lens_for(
    lens: LoraLens, records: Sequence[Record], readout: Readout | Make | None
) -> LoraLens:
    """Restrict the lens to the sites that can move the one readout of all prompts.

    Without such a readout the lens is returned as it is.

    Raises:
        TokenError: the readout fits no record's prompt.
    """
    if readout is None or batches.is_make(readout):
        return lens
    one_for_all = Readout.required(readout)
    _require_fits_some_prompt(lens, records, one_for_all)
    return _sites_that_matter(lens, records, one_for_all)


def _require_fits_some_prompt(lens: LoraLens, records: Sequence[Record], readout: Readout) -> None:
    """Refuse a readout that fits no record's prompt, or that names a token for each prompt.

    Batches regroup the prompts, so what is read must fit one prompt as well as two.

    Raises:
        TokenError: what is wrong with it on the first prompt that can be read.
    """
    # A prompt of one token, until a record's own can be read.
    token = torch.ones(1, 1, dtype=torch.long, device=lens.device)
    prompt = Prompts(token, token[:, 0])
    first_error: TokenError | None = None
    for record in records:
        try:
            if record.error is None:
                prompt = batches.tokenised(lens, record)
            for count in (1, 2):
                readout.reading(lens.model, prompt.repeat(count))
            return
        except PromptError:
            continue
        except TokenError as error:
            first_error = first_error or error
    if first_error is not None:
        raise first_error


def _sites_that_matter(lens: LoraLens, records: Sequence[Record], readout: Readout) -> LoraLens:
    """Restrict the lens to the sites that can move what is read.

    For a readout of the logits these are all sites.
    """
    for record in records:
        if record.error is None:
            f = lens.function(batches.tokenised(lens, record), progress=False)
            return readout.reaching(f).lens
    return lens
