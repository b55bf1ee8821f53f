"""`sweep`: many prompts through chosen analyses, into Parquet, and what it returns.

1. The records are read and tokenised; an error in one is kept with its line.
2. What earlier runs finished is skipped. The rest is run in batches of similar length, every n-th
   by one of n processes, and each batch is on the disk before the next begins.
3. The main process merges the batches in the order of the records.

An analysis by token takes the same steps as a stream (`stream.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast, overload

import pandas as pd
import torch
from tqdm import tqdm
from typing_extensions import Unpack

from lens_lora.core import (
    Adapter,
    Attribution,
    LoraLens,
    Prompts,
    Readout,
    Site,
    drawing,
    require_readout,
)
from lens_lora.errors import PromptError, SweepError, TokenError, setting
from lens_lora.guesses import fitting
from lens_lora.responses.answers import KL
from lens_lora.runs.fingerprint import fingerprint, fingerprint_without_model, strings_of
from lens_lora.runs.processes import Processes, launched
from lens_lora.runs.store import Store, Unchanged
from lens_lora.sweeps import batches
from lens_lora.sweeps.activations_file import ActivationsFile
from lens_lora.sweeps.batches import Job, Make, prepare
from lens_lora.sweeps.records import (
    ANALYSES,
    BY_TOKEN,
    ByToken,
    Record,
    RecordsLike,
    chosen,
    options_of,
    read_records,
)
from lens_lora.sweeps.rows import Content, Row, RowStore, content, read
from lens_lora.sweeps.stream import token_sweep


@dataclasses.dataclass(frozen=True, eq=False)
class SweepResult:
    """The files of a sweep, and counts of what is in them.

    Attributes:
        path: one row per prompt and site: id, prompt, site, module, layer, kind, and a column per
            analysis, in the units of the prompt's readout. Prompts with an error have no rows.
        prompts_path: one row per record: id, prompt, chat (whether of messages), doc, pre, tokens,
            readout, units, base g(0), adapted g(1), shift, flips (of margins), per analysis its sum
            over sites and remainder (shift − sum; not of second order, which does not stand for
            the shift), and error (null where there is none).
        records: how many records there are.
        resumed: how many of them earlier runs had finished.
        flips: how many margins change sign, beyond three noise floors.
        errors: (id, what is wrong, with its line) of each bad record.
        damaged: files of finished prompts that could not be read, and why; their prompts ran again.
        sites, analyses: the rows and the columns of the site table.
        readout, units: of all prompts; 'margin(doc − pre)' if each prompt has its own, and every
            unit that occurs (nats where an answer has several tokens).
        meta: model, adapter, dtype and versions.
    """

    path: Path
    prompts_path: Path
    records: int
    resumed: int
    flips: int
    errors: tuple[tuple[int | str, str], ...]
    damaged: tuple[str, ...]
    sites: tuple[Site, ...]
    analyses: tuple[str, ...]
    readout: str
    units: str
    meta: Mapping[str, str]
    _sites_file: Unchanged = dataclasses.field(init=False, repr=False)
    _prompts_file: Unchanged = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sites_file", Unchanged(self.path))
        object.__setattr__(self, "_prompts_file", Unchanged(self.prompts_path))

    @property
    def done(self) -> int:
        """How many prompts have numbers."""
        return self.records - len(self.errors)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: `pd.read_parquet(path)`."""
        return pd.read_parquet(self._sites_file.path)

    def prompts(self) -> pd.DataFrame:
        """One row per record: `pd.read_parquet(prompts_path)`."""
        return pd.read_parquet(self._prompts_file.path)

    def plot_prompts(self, column: str = "shift", k: int = 40) -> drawing.Figure:
        """A bar for each record: one column of `prompts`, the largest number on top.

        Args:
            column: a column of numbers, such as 'shift', 'base', 'adapted' or
                'first_order_remainder'.
            k: how many records are shown, those of largest magnitude.

        Raises:
            ArgumentError: no such column of numbers, or a k below 1.
            SweepError: every record has an error.
        """
        return drawing.figure(self, column, k)

    def attribution(self, analysis: str) -> Attribution:
        """One analysis of all prompts without an error, with its tables, sums and figures.

        Its values are in several units if `units` names several.

        Args:
            analysis: one of `analyses`.

        Raises:
            SweepError: the analysis was not run, or every prompt has an error.
        """
        if analysis not in self.analyses or not self.done:
            raise SweepError(
                f"{analysis!r} of {self.done} prompts: the sweep holds {', '.join(self.analyses)}."
            )
        column = pd.read_parquet(self._sites_file.path, columns=[analysis])[analysis]
        values = torch.from_numpy(column.to_numpy(copy=True))
        every = self.prompts()
        good = every[every["error"].isna()]
        return Attribution(
            values=values.view(-1, len(self.sites)),
            by=(),
            sites=self.sites,
            heads=(0,) * len(self.sites),
            base=torch.tensor(good["base"].tolist(), dtype=torch.float64),
            adapted=torch.tensor(good["adapted"].tolist(), dtype=torch.float64),
            str_tokens=tuple((text,) for text in good["prompt"]),
            readout=self.readout,
            units=self.units,
            method=analysis.removesuffix("_at_1"),
            at=ANALYSES[analysis].at,
            meta=self.meta,
        )

    def plot(self, analysis: str | None = None) -> drawing.Figure:
        """Heatmap layer × kind of module of one analysis: its mean over prompts.

        Args:
            analysis: one of `analyses`; None for the first.
        """
        return self.attribution(analysis or self.analyses[0]).plot()

    def __repr__(self) -> str:
        prompts = f"prompts ({self.resumed} before this run)" if self.resumed else "prompts"
        flips = f"{self.flips} flip, " if "margin" in self.readout else ""
        model = f"{self.meta['adapter']} over {self.meta['model']} as {self.meta['model_class']}"
        if self.meta.get("strings"):
            model += f", prompts {self.meta['strings']}"
        lines = [
            f"SweepResult: {self.done} of {self.records} {prompts} × {len(self.sites)} sites",
            f"  {', '.join(self.analyses)} of {self.readout} in {self.units or 'no units'}",
            f"  {flips}{len(self.errors)} with errors",
            f"  {model}",
            f"One row per prompt and site: {self.path}",
            f"One row per prompt: {self.prompts_path}",
        ]
        return "\n".join(lines)


# --- The sweep


class _Options(TypedDict, total=False):
    out: str | Path
    batch_size: int
    resume: bool
    version: str | None
    progress: bool


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
    progress: bool = True,
) -> SweepResult | ActivationsFile:
    """Run analyses on hundreds of prompts; after an interruption, the same call resumes.

    Under `accelerate launch` (or torchrun, mpirun) every process calls this with its own lens and
    takes its share; several machines need one shared folder.

    Cost: what each analysis costs, and a forward pass per prompt for the base or the adapted model
    where no analysis runs it; a record's numbers do not depend on its batch beyond rounding.

    Args:
        lens: the adapter over the model.
        records: a .jsonl or .csv file, a DataFrame, a Dataset, or mappings, with `prompt`, the
            answers `doc` and `pre` (strings with their leading space, of one token or several),
            and optionally `id`, by default the row's number from 0; in place of `prompt` also
            `messages`, a conversation, and with such a readout `response` in place of answers.
            Where no answers are needed, strings and conversations are records of their own.
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
        version: a name for code of your own that takes part: a function in `Readout.of`, a readout
            class, a hook or a `forward` of yours. Code cannot be compared with that of an earlier
            run, so without a version such a sweep cannot be resumed; change it with the code.
        progress: show a bar.

    Returns:
        SweepResult, on every process. A bad record does not stop the sweep: it is named in a
        warning, and its row in the prompts' table says what is wrong. So is a damaged part of an
        earlier run, whose prompts run again. Of activations, `ActivationsFile`.

    Raises:
        SweepError: there are no records, an analysis is unknown, a file is of another kind, an
            object can be no record, or `out` holds results of another lens, readout, choice of
            analyses or prompts, or of code of your own without a version, or is being written by
            another sweep, or cannot be written or read.
        TokenError: the readout fits no record's prompt.
        ModelStateError: an analysis cannot be computed on this lens or model.
    """
    _require_batch_size(batch_size)
    names = chosen(analyses)
    if names[0] in BY_TOKEN:
        if readout is not None:
            raise SweepError(f"{names[0]!r} has no readout; leave readout out.")
        return token_sweep(lens, records, names[0], out, batch_size, resume, version, progress)

    rows = _read(lens, records, readout)
    if readout is not None and not batches.is_make(readout):
        one_for_all = require_readout(readout)
        _require_fits_some_prompt(lens, rows, one_for_all)
        lens = _sites_that_matter(lens, rows, one_for_all)
    require_slopes(names, readout)

    processes = launched()
    depends_on = fingerprint(lens, options_of(names), readout, version)
    store = RowStore(out, depends_on, lens.sites, names)
    is_shown = progress and processes.is_main
    with store.writing(processes):
        finished = store.done(rows) if resume else {}
        checked, jobs = _prepared(lens, rows, readout, finished, is_shown)
        processes.by_main(lambda: store.begin(anew=not resume))

        keeps_each_prompt = any(ANALYSES[name].many for name in names)
        all_batches = batches.make_batches(jobs, 1 if keeps_each_prompt else batch_size)
        share = all_batches[processes.index :: processes.count]
        resumed = sum(record.error is None and content(record) in finished for record in checked)
        with _bar(share, resumed, processes, is_shown) as bar:
            for batch in share:
                store.add(batches.measure(lens, batch, names))
                bar.update(len(batch))

        processes.by_main(lambda: store.merge(checked, finished))
        result = _result(lens, store, names, resumed, readout)
    if processes.is_main:
        store.warn_of_bad_records(result.errors, len(result.errors), len(rows), level=2)
        store.warn_of_damaged_parts(level=2)
    return result


def _require_batch_size(batch_size: object) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        expected = "expected a whole number of at least 1"
        raise SweepError(f"{setting('batch_size', batch_size)}: {expected}.")


def _read(lens: LoraLens, records: RecordsLike, readout: Readout | Make | None) -> list[Record]:
    """All records, with what the readout needs of each, and the texts of conversations."""
    has_response = batches.is_make(readout)
    read = read_records(records, with_answers=readout is None, with_response=has_response)
    return [batches.with_text(lens, record) for record in read]


def _prepared(
    lens: LoraLens,
    records: Sequence[Record],
    readout: Readout | Make | None,
    finished: Mapping[Content, Row],
    is_shown: bool,
) -> tuple[list[Record], list[Job]]:
    """All records, with what is wrong with each, and a job for each good one not yet finished."""
    checked: list[Record] = []
    jobs: list[Job] = []
    shown = tqdm(records, "reading records", leave=False, disable=not is_shown, unit="record")
    with shown as bar:
        for record in bar:
            if content(record) in finished:
                checked.append(record)
                continue
            prepared = prepare(lens, record, readout)
            if isinstance(prepared, Job):
                jobs.append(prepared)
                checked.append(prepared.record)
            else:
                checked.append(prepared)
    return checked, jobs


def _bar(
    share: Sequence[Sequence[Job]], resumed: int, processes: Processes, is_shown: bool
) -> tqdm:
    """The progress over this process's share; a single process counts finished prompts, too."""
    begun = 0 if processes.count > 1 else resumed
    return tqdm(
        total=begun + sum(len(batch) for batch in share),
        initial=begun,
        desc=f"sweep{processes.share}",
        unit="prompt",
        disable=not is_shown,
    )


# --- What is refused before anything is run


def require_slopes(names: Sequence[str], readout: Readout | Make | None) -> None:
    """Refuse the derivatives of a KL in a sweep.

    It has none at ε = 0, and a sweep does not hold the base's distributions for those elsewhere.

    Raises:
        SweepError: naming an analysis that needs them.
    """
    read = readout(["", ""]) if batches.is_make(readout) else readout
    without = sorted({"first_order", "second_order", "first_order_at_1"}.intersection(names))
    if isinstance(read, KL) and without:
        raise SweepError(
            f"{read.label} is not read by {without[0]!r} in a sweep; use 'path', 'add_one' or "
            "'leave_one_out'."
        )


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
    """The lens of those sites alone that can move what is read.

    For what is read from the logits these are all of them.
    """
    for record in records:
        if record.error is None:
            f = lens.function(batches.tokenised(lens, record), progress=False)
            return readout.reaching(f).lens
    return lens


# --- What is returned


def _result(
    lens: LoraLens,
    store: RowStore,
    analyses: tuple[str, ...],
    resumed: int,
    readout: Readout | Make | None,
) -> SweepResult:
    rows = read(store.prompts_path).to_pylist()
    good = [row for row in rows if row["error"] is None]
    label, units = _label_and_units(good, readout)
    return SweepResult(
        path=store.path,
        prompts_path=store.prompts_path,
        records=len(rows),
        resumed=resumed,
        flips=sum(row["flips"] is True for row in good),
        errors=tuple((row["id"], row["error"]) for row in rows if row["error"] is not None),
        damaged=tuple(f"{path}: {reason}" for path, reason in store.damaged.items()),
        sites=lens.sites,
        analyses=analyses,
        readout=label,
        units=units,
        meta={**lens.describe(), "strings": strings_of(lens) or ""},
    )


def _label_and_units(
    good: Sequence[Mapping[str, Any]], readout: Readout | Make | None
) -> tuple[str, str]:
    """The label and the units of what was read of all good prompts.

    A readout that was asked for has its name and units also where no prompt could be read.
    """
    labels = {row["readout"] for row in good}
    units = {row["units"] for row in good}
    asked = readout(["", ""]) if batches.is_make(readout) else cast(Readout | None, readout)
    if asked is not None and not units:
        units = {asked.units}
    all_units = " and ".join(sorted(units))
    if len(labels) == 1:
        return labels.pop(), all_units
    return "margin(doc − pre)" if asked is None else asked.label, all_units
