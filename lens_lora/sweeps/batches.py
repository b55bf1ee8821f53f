"""Records → batches → rows: what is run, and what is kept of it.

1. Every record is tokenised and its readout bound on its own, so that a bad one is found, with its
   line, before anything is run.
2. Prompts of similar length share a batch; margins of single tokens (logits) and of answers of
   several tokens (nats) do not. Right padding is exact, so a prompt's numbers do not depend on its
   batch beyond rounding.
3. A batch with a non-finite number is run again prompt by prompt, and only that record fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.function import gated_readout, require_finite
from lens_lora.errors import NumericsError, PromptError, TokenError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.answers import AnswerMargin, margin_between
from lens_lora.readouts.prompts import Prompts, joined
from lens_lora.readouts.readout import Margin, Readout
from lens_lora.results.signs import changes_sign
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.records import Record
from lens_lora.sweeps.values import VALUES

__all__ = [
    "Job",
    "Make",
    "Row",
    "is_make",
    "make_batches",
    "measure",
    "prepare",
    "tokenised",
    "with_text",
]

Make = Callable[[Any], Readout]
Vector = NDArray[np.float64]
_ROUNDINGS = 2**16  # of one logit: no margin above so many is within three noise floors


def is_make(readout: object) -> TypeGuard[Make]:
    """Whether this makes a readout of responses, as the class `KL` does.

    Args:
        readout: a readout, what makes one, or None.
    """
    return callable(readout) and not isinstance(readout, Readout)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A good record, ready to run.

    Attributes:
        record: as it was read.
        prompt: its prompt, tokenised, on the CPU.
        readout: its own margin or response, or the readout given for all records.
        make: of one response a prompt their readout, where each record has a response.
    """

    record: Record
    prompt: Prompts
    readout: Readout
    make: Make | None = None

    @property
    def tokens(self) -> int:
        """The length of its prompt."""
        return int(self.prompt.lengths[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """What a sweep keeps of one record; a record with an error has no numbers.

    Attributes:
        id, prompt, doc, pre: of the record.
        tokens: the length of the prompt.
        readout, units: the readout's label and the units of its numbers.
        base, adapted: g(0) and g(1), exact.
        flips: whether a margin changes sign; False where either end is within three noise floors
            of zero; None for other readouts.
        error: what is wrong with the record.
        values: {analysis: [site]}.
        chat: whether the prompt is what a chat template made of messages.
        response: of the record.
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
    values: Mapping[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    chat: bool = False
    response: str | None = None

    @staticmethod
    def failed(record: Record) -> Row:
        """The row of a bad record.

        Args:
            record: with its error.
        """
        texts = (record.prompt, record.doc, record.pre)
        return Row(
            str(record.id),
            *texts,
            error=record.error,
            chat=record.chat,
            response=record.response,
        )


def prepare(lens: LoraLens, record: Record, readout: Readout | Make | None) -> Job | Record:
    """The record as a job, or the record with its error. Tokenises; no forward pass.

    Args:
        lens: the adapter over the model.
        record: as it was read.
        readout: for all records, or what makes one of each record's response; None for the margin
            between the record's own answers.
    """
    if record.error is not None:
        return record
    try:
        prompts = tokenised(lens, record)
        make = readout if is_make(readout) else None
        if make is not None:
            own = make(record.response or "")
        elif isinstance(readout, Readout):
            own = readout
        else:
            own = margin_between(lens.model, record.doc or "", record.pre or "", prompts)
        own.over(lens.model, prompts)
    except (PromptError, TokenError) as error:
        return record.bad(error)
    return Job(record, prompts.to(torch.device("cpu")), own, make)


def tokenised(lens: LoraLens, record: Record) -> Prompts:
    """The prompt of a good record. No forward pass.

    Args:
        lens: the adapter over the model.
        record: with its text or its messages.

    Raises:
        PromptError: it does not fit the model.
    """
    return lens.prompts(record.prompt or "" if record.messages is None else record.messages)


def with_text(lens: LoraLens, record: Record) -> Record:
    """The record, a conversation with the text that the chat template makes of it.

    Args:
        lens: whose tokenizer has the template.
        record: as it was read.
    """
    if record.error is not None or record.messages is None:
        return record
    try:
        return dataclasses.replace(record, prompt=tokenised(lens, record).texts[0])
    except PromptError as error:
        return record.bad(error)


def make_batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Batches of one kind of readout and of similar length each, the longest first.

    So a batch that does not fit into memory fails at the start, and the first estimate of the time
    left is not too low.

    Args:
        jobs: in any order.
        size: the largest number of jobs in a batch.
    """
    kinds: dict[type[Readout], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: -job.tokens):
        kinds.setdefault(type(job.readout), []).append(job)
    some = [same[i : i + size] for same in kinds.values() for i in range(0, len(same), size)]
    return sorted(some, key=lambda batch: -batch[0].tokens)


@alone
def measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    """The jobs' rows.

    Cost: one batched forward pass for each of the two ends, and what the analyses cost; ten more
    where rounding may hide the sign of a margin, as it may in half precision.

    Args:
        lens: the adapter over the model.
        jobs: one batch of `make_batches`.
        analyses: names from `ANALYSES`.
    """
    try:
        return _measure(lens, jobs, analyses)
    except (NumericsError, PromptError, TokenError) as error:
        if len(jobs) == 1:
            return [Row.failed(jobs[0].record.bad(error))]
    return [row for job in jobs for row in measure(lens, [job], analyses)]


def _measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    prompts, readout = _joined(lens, jobs), _together(lens, jobs)
    asked = ask(lens, prompts, readout)
    reading = asked.reading
    ends = torch.stack([lens.gates(0.0), lens.gates(1.0)])
    base, adapted = _numbers(gated_readout(lens, reading, ends, progress=False)).T
    values = {name: _values(lens, jobs, name) for name in analyses}
    flips = _flips(asked, base, adapted)
    return [
        Row(
            id=str(job.record.id),
            prompt=job.record.prompt,
            chat=job.record.chat,
            doc=job.record.doc,
            pre=job.record.pre,
            response=job.record.response,
            tokens=job.tokens,
            readout=job.readout.label,
            units=job.readout.units,
            base=float(base[i]),
            adapted=float(adapted[i]),
            flips=flips[i],
            values={name: found[i] for name, found in values.items()},
        )
        for i, job in enumerate(jobs)
    ]


def _values(lens: LoraLens, jobs: Sequence[Job], name: str) -> np.ndarray:
    found = [
        VALUES[name](lens, _joined(lens, some), _together(lens, some))
        for some in ([[job] for job in jobs] if ANALYSES[name].alone else [jobs])
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
    """One readout for the whole batch; a margin or response has its own answers per prompt."""
    make = jobs[0].make
    if make is not None:
        return make([job.record.response or "" for job in jobs])
    if jobs[0].record.doc is None:
        return jobs[0].readout
    docs, pres = [j.record.doc or "" for j in jobs], [j.record.pre or "" for j in jobs]
    return margin_between(lens.model, docs, pres, _joined(lens, jobs))


def _joined(lens: LoraLens, jobs: Sequence[Job]) -> Prompts:
    return lens.prompts(joined([job.prompt for job in jobs]))


def _flips(asked: Asked, base: Vector, adapted: Vector) -> Sequence[bool | None]:
    """Whether each margin changes sign beyond rounding; None for other readouts."""
    if not isinstance(asked.readout, Margin | AnswerMargin):
        return [None] * len(base)
    ends = torch.from_numpy(np.stack([base, adapted]))
    floor = ends.new_zeros(len(base))
    unit = max(torch.finfo(asked.lens.dtype).eps, 2 * asked.lens.plan.activation_rounding)
    if float(ends.abs().min()) <= _ROUNDINGS * unit:
        floor = asked.noise_floor.cpu().double()
    return changes_sign(ends[0], ends[1], floor).tolist()


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()
