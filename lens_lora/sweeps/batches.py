"""Records → batches → rows: what is run, and what is kept of it.

1. Every record is tokenised and its readout bound on its own, so that a bad one is found, with its
   line, before anything is run.
2. Prompts of one length go together, and margins of single tokens apart from those of answers of
   several tokens (logits and nats). Right padding is exact, so a batch gives what one prompt gives.
3. A batch with a non-finite number is run again one by one, and only that record fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lens_lora.engine.function import gated_readout, require_finite
from lens_lora.errors import NumericsError, PromptError, TokenError
from lens_lora.lens import LoraLens
from lens_lora.readouts.answers import AnswerMargin, margin_between
from lens_lora.readouts.readout import Margin, Readout
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.records import Record

__all__ = ["Job", "Row", "make_batches", "measure", "prepare"]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A good record: the length of its prompt in tokens, and its readout."""

    record: Record
    prompt: str
    tokens: int
    readout: Readout


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What a sweep keeps of one record. Without numbers where it has an error.

    Attributes:
        base, adapted: g(0) and g(1), exact.
        values: {analysis: [site]}.
    """

    id: str
    prompt: str | None
    doc: str | None
    pre: str | None
    tokens: int | None = None
    readout: str | None = None
    units: str | None = None
    base: float | None = None
    adapted: float | None = None
    flips: bool | None = None
    error: str | None = None
    values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @staticmethod
    def failed(record: Record) -> Row:
        """The row of a bad record."""
        return Row(str(record.id), record.prompt, record.doc, record.pre, error=record.error)


def prepare(lens: LoraLens, record: Record, readout: Readout | None) -> Job | Record:
    """The record as a job, or with what is wrong with it. Tokenises; runs nothing.

    Raises:
        TokenError: a readout, given for all records, that does not fit the model.
    """
    if record.error is not None or record.prompt is None:
        return record
    try:
        prompts = lens.prompts(record.prompt)
        own = readout or margin_between(lens.model, record.doc or "", record.pre or "", 1)
        own.over(lens.model, prompts)
    except (PromptError, TokenError) as error:
        if readout is not None and isinstance(error, TokenError):
            raise
        return record.bad(error)
    return Job(record, record.prompt, int(prompts.lengths[0]), own)


def make_batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Of one kind of readout each, and of like length; the longest first.

    What needs the most memory is seen to fit at once, and the time left is no underestimate.
    """
    kinds: dict[type[Readout], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: -job.tokens):
        kinds.setdefault(type(job.readout), []).append(job)
    some = [same[i : i + size] for same in kinds.values() for i in range(0, len(same), size)]
    return sorted(some, key=lambda batch: -batch[0].tokens)


def measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    """The jobs' rows: two forward passes, and what the analyses cost."""
    try:
        return _measure(lens, jobs, analyses)
    except (NumericsError, PromptError, TokenError) as error:
        if len(jobs) == 1:
            return [Row.failed(jobs[0].record.bad(error))]
    return [row for job in jobs for row in measure(lens, [job], analyses)]


def _measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    prompts, readout = lens.prompts([job.prompt for job in jobs]), _together(lens, jobs)
    reading = readout.over(lens.model, prompts)
    ends = torch.stack([lens.gates(0.0), lens.gates(1.0)])
    base, adapted = _numbers(gated_readout(lens, reading, ends, progress=False)).T
    values = {name: _values(lens, jobs, name) for name in analyses}
    return [
        Row(
            id=str(job.record.id),
            prompt=job.prompt,
            doc=job.record.doc,
            pre=job.record.pre,
            tokens=job.tokens,
            readout=job.readout.label,
            units=job.readout.units,
            base=float(base[i]),
            adapted=float(adapted[i]),
            flips=_flips(job.readout, base[i], adapted[i]),
            values={name: found[i] for name, found in values.items()},
        )
        for i, job in enumerate(jobs)
    ]


def _values(lens: LoraLens, jobs: Sequence[Job], name: str) -> np.ndarray:
    analysis = ANALYSES[name]
    found = [
        analysis.values(lens, lens.prompts([job.prompt for job in some]), _together(lens, some))
        for some in ([[job] for job in jobs] if analysis.alone else [jobs])
    ]
    values = torch.cat(found)
    require_finite(values, name)
    if values.shape != (len(jobs), len(lens.sites)):
        raise RuntimeError(
            f"analysis {name!r} gave {tuple(values.shape)} numbers for {len(jobs)} prompts × "
            f"{len(lens.sites)} sites."
        )
    return _numbers(values)


def _together(lens: LoraLens, jobs: Sequence[Job]) -> Readout:
    """One readout for all of them; margins with an answer for each prompt."""
    if jobs[0].record.doc is None:
        return jobs[0].readout
    docs, pres = [j.record.doc or "" for j in jobs], [j.record.pre or "" for j in jobs]
    return margin_between(lens.model, docs, pres, len(jobs))


def _flips(readout: Readout, base: float, adapted: float) -> bool | None:
    """Whether a margin changes sign; of other readouts, nothing."""
    is_margin = isinstance(readout, Margin | AnswerMargin)
    return bool(np.sign(base) != np.sign(adapted)) if is_margin else None


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
