"""Records → jobs → batches → rows: what is run, and what is kept of it.

1. Every record is tokenised and its readout bound on its own, so that a bad one is found, with its
   line, before anything is run.
2. Prompts of similar length share a batch; margins of single tokens (logits) and of answers of
   several tokens (nats) do not. Right padding is exact, so a prompt's numbers do not depend on its
   batch beyond rounding. A batch with a non-finite number is run again prompt by prompt, and only
   that record fails.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from lens_lora.core import (
    Evaluations,
    LoraLens,
    Margin,
    Prompts,
    Readout,
    alone,
    changes_sign,
    evaluations,
    patch_sites,
)
from lens_lora.core.function.rounding import unit
from lens_lora.errors import (
    NumericsError,
    PromptError,
    TokenError,
)
from lens_lora.path.path_attribution import path_attribution
from lens_lora.responses.answers import AnswerMargin, margin_between
from lens_lora.sweeps.records import ANALYSES, Record
from lens_lora.sweeps.rows import Row, row_of

# --- How each column is computed


SiteValues = Float[Tensor, "batch site"]  # in the readout's units


def _values_of(name: str, g: Evaluations) -> SiteValues:
    """What an analysis gives each site."""
    analysis = ANALYSES[name]
    options: Mapping[str, Any] = analysis.options
    if name == "path":
        return path_attribution.of(g, **options).values
    if name in ("add_one", "leave_one_out"):
        return patch_sites.of(g, **options).values
    if name == "second_order":  # ½(H·1)_l
        return g.curvature(1.0, at=analysis.at) / 2
    return g.slopes(analysis.at)


VALUES = {name: functools.partial(_values_of, name) for name in ANALYSES}


# --- Records → jobs


Make = Callable[[Any], Readout]


def is_make(readout: object) -> TypeGuard[Make]:
    """Whether this makes a readout of responses, as the class `KL` does."""
    return callable(readout) and not isinstance(readout, Readout)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A good record, ready to run.

    Attributes:
        record: the record that was read.
        prompt: its prompt, tokenised, on the CPU.
        readout: its own margin or response, or the readout given for all records.
        make: makes a readout of one response a prompt, where each record has a response.
    """

    record: Record
    prompt: Prompts
    readout: Readout
    make: Make | None = None

    @property
    def tokens(self) -> int:
        """The length of its prompt."""
        return int(self.prompt.lengths[0])


def prepare(lens: LoraLens, record: Record, readout: Readout | Make | None) -> Job | Record:
    """The record as a job, or the record with its error. Tokenises; no forward pass."""
    if record.error is not None:
        return record
    try:
        prompts = tokenised(lens, record)
        make = readout if is_make(readout) else None
        if make is not None:
            readout = make(record.response or "")
        if not isinstance(readout, Readout):
            readout = margin_between(lens.model, record.doc or "", record.pre or "", prompts)
        readout.reading(lens.model, prompts)
    except (PromptError, TokenError) as error:
        return record.bad(error)
    return Job(record, prompts.to(torch.device("cpu")), readout, make)


def tokenised(lens: LoraLens, record: Record) -> Prompts:
    """The prompt of a good record. No forward pass."""
    return lens.prompts(record.prompt or "" if record.messages is None else record.messages)


def with_text(lens: LoraLens, record: Record) -> Record:
    """The record, a conversation with the text that the chat template makes of it."""
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
    """
    kinds: dict[type[Readout], list[Job]] = {}
    for job in sorted(jobs, key=lambda job: -job.tokens):
        kinds.setdefault(type(job.readout), []).append(job)
    batches: list[list[Job]] = []
    for alike in kinds.values():
        batches += [alike[start : start + size] for start in range(0, len(alike), size)]
    return sorted(batches, key=lambda batch: -batch[0].tokens)


# --- Jobs → rows


Vector = NDArray[np.float64]
_ROUNDINGS = 2**16  # of one logit: no margin above so many is within three noise floors


@alone
def measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    """The jobs' rows.

    Cost: one batched forward pass for each of the two ends, and what the analyses cost; ten more
    where rounding may hide the sign of a margin, as it may in half precision.
    """
    try:
        return _measure(lens, jobs, analyses)
    except (NumericsError, PromptError, TokenError) as error:
        if len(jobs) == 1:
            return [row_of(jobs[0].record.bad(error))]
    return [row for job in jobs for row in measure(lens, [job], analyses)]


def _measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    g = _function(lens, jobs)
    base, adapted = _numbers(g.ends)
    values = {name: _values(g, jobs, name) for name in analyses}
    flips = _flips(g, base, adapted)
    rows: list[Row] = []
    for i, job in enumerate(jobs):
        row = row_of(
            job.record,
            tokens=job.tokens,
            readout=job.readout.label,
            units=job.readout.units,
            base=float(base[i]),
            adapted=float(adapted[i]),
            shift=float(adapted[i] - base[i]),
            flips=flips[i],
            **{name: by_prompt[i] for name, by_prompt in values.items()},
        )
        rows.append(row)
    return rows


def _values(g: Evaluations, jobs: Sequence[Job], name: str) -> Vector:
    """An analysis of the jobs of g, together or one by one."""
    batches = [g]
    if ANALYSES[name].alone and len(jobs) > 1:
        batches = [_function(g.lens, [job]) for job in jobs]
    values = torch.cat([VALUES[name](batch) for batch in batches])
    if not bool(values.isfinite().all()):
        raise NumericsError(f"{name} is not finite.")
    return _numbers(values)


def _function(lens: LoraLens, jobs: Sequence[Job]) -> Evaluations:
    """The readout of these jobs, as a function of the gates that remembers."""
    prompts, readout = _question(lens, jobs)
    return evaluations(lens, prompts, readout, progress=False)


def _question(lens: LoraLens, jobs: Sequence[Job]) -> tuple[Prompts, Readout]:
    """The prompts of a batch and one readout for all; margins and responses are each prompt's."""
    prompts = lens.prompts(Prompts.joined([job.prompt for job in jobs]))
    make = jobs[0].make
    if make is not None:
        return prompts, make([job.record.response or "" for job in jobs])
    if jobs[0].record.doc is None:
        return prompts, jobs[0].readout
    docs = [job.record.doc or "" for job in jobs]
    pres = [job.record.pre or "" for job in jobs]
    return prompts, margin_between(lens.model, docs, pres, prompts)


def _flips(g: Evaluations, base: Vector, adapted: Vector) -> Sequence[bool | None]:
    """Whether each margin changes sign beyond rounding; None for other readouts."""
    if not isinstance(g.readout, Margin | AnswerMargin):
        return [None] * len(base)
    ends = torch.from_numpy(np.stack([base, adapted]))
    floor = ends.new_zeros(len(base))
    if float(ends.abs().min()) <= 2 * _ROUNDINGS * unit(g.lens):
        floor = g.floor.cpu().double()
    return changes_sign(ends[0], ends[1], floor).tolist()


def _numbers(values: Tensor) -> Vector:
    return values.detach().cpu().double().numpy()
