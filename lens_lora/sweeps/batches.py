"""How the prompts of a sweep are run: records become jobs, jobs batches, and batches rows.

1. Each record is tokenised by itself, and the tokens of its readout are looked up, so that a bad
   one is found, with its line, before anything is run. A good one is a job.
2. Prompts of similar length share a batch; margins of single tokens (logits) and of answers of
   several tokens (nats) do not. Right padding is exact, so a prompt's numbers do not depend on its
   batch beyond rounding.
3. A batch with a number that is not finite is run again prompt by prompt, and only that record
   fails.
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
    patch_sites,
)
from lens_lora.errors import (
    NumericsError,
    PromptError,
    TokenError,
)
from lens_lora.path.path_attribution import path_attribution
from lens_lora.responses.answers import AnswerMargin, margin_between
from lens_lora.sweeps.analyses import ANALYSES
from lens_lora.sweeps.records import Record
from lens_lora.sweeps.rows import Row, row_of

# --- How each column is computed


# In the readout's units.
SiteValues = Float[Tensor, "batch site"]


def _values_of(name: str, g: Evaluations) -> SiteValues:
    """The number that an analysis gives each site on each prompt."""
    analysis = ANALYSES[name]
    options: Mapping[str, Any] = analysis.options
    if name == "path":
        return path_attribution.of(g, **options).values
    if name in ("add_one", "leave_one_out"):
        return patch_sites.of(g, **options).values
    if name == "second_order":
        return g.curvature(1.0, at=analysis.at) / 2  # ½(H·1)_l
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
        prompt: its tokens, on the CPU.
        readout: the margin of the record's own answers, the readout of its own response, or the
            one that was given for all records.
        make: where each record has a response, what makes a readout of a batch's responses.
    """

    record: Record
    prompt: Prompts
    readout: Readout
    make: Make | None = None

    @property
    def tokens(self) -> int:
        """The length of the prompt."""
        return int(self.prompt.lengths[0])


def prepare(lens: LoraLens, record: Record, readout: Readout | Make | None) -> Job | Record:
    """The record as a job, or the record with its error. No forward pass.

    Args:
        lens: the adapter over the model.
        record: a record that was read.
        readout: the one for all records, what makes one of responses, or None for the margin of
            each record's own answers.
    """
    if record.error is not None:
        return record
    make = readout if is_make(readout) else None
    try:
        prompt = tokenised(lens, record)
        if isinstance(readout, Readout):
            read = readout
        elif make is not None:
            read = make(record.response or "")
        else:
            read = margin_between(lens.model, record.doc or "", record.pre or "", prompt)
        read.reading(lens.model, prompt)
    except (PromptError, TokenError) as error:
        return record.bad(error)
    return Job(record, prompt.to(torch.device("cpu")), read, make)


def tokenised(lens: LoraLens, record: Record) -> Prompts:
    """The tokens of a good record's prompt. No forward pass."""
    if record.messages is not None:
        return lens.prompts(record.messages)
    return lens.prompts(record.prompt or "")


def with_text(lens: LoraLens, record: Record) -> Record:
    """The record; a conversation has in addition the text that the chat template makes of it."""
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
    longest_first = sorted(jobs, key=lambda job: job.tokens, reverse=True)
    by_kind: dict[type[Readout], list[Job]] = {}
    for job in longest_first:
        by_kind.setdefault(type(job.readout), []).append(job)
    batches: list[list[Job]] = []
    for alike in by_kind.values():
        for start in range(0, len(alike), size):
            batches.append(alike[start : start + size])
    return sorted(batches, key=lambda batch: batch[0].tokens, reverse=True)


# --- Jobs → rows


Vector = NDArray[np.float64]
# A margin larger than this many roundings of one logit is never within three noise floors of zero.
_ROUNDINGS = 2**16


@alone
def measure(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    """The rows of a batch; where it fails, its jobs are run one by one.

    Cost: what the analyses cost, one batched forward pass for each of the two ends that none of
    them runs, and eight more where rounding may hide the sign of a margin, as it may in half
    precision.
    """
    try:
        return _measured(lens, jobs, analyses)
    except (NumericsError, PromptError, TokenError) as error:
        if len(jobs) == 1:
            return [row_of(jobs[0].record.bad(error))]
    rows: list[Row] = []
    for job in jobs:
        rows += measure(lens, [job], analyses)
    return rows


def _measured(lens: LoraLens, jobs: Sequence[Job], analyses: Sequence[str]) -> list[Row]:
    g = _function(lens, jobs)
    values = {name: _values(g, jobs, name) for name in analyses}
    # After the analyses, whose passes have run most of the ends already.
    base, adapted = _as_numpy(g.ends)
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
    """The values of one analysis, for all jobs together or for one after another."""
    batches = [g]
    if ANALYSES[name].alone and len(jobs) > 1:
        batches = [_function(g.lens, [job]) for job in jobs]
    values = torch.cat([VALUES[name](batch) for batch in batches])
    if not bool(values.isfinite().all()):
        raise NumericsError(f"{name} is not finite.")
    return _as_numpy(values)


def _function(lens: LoraLens, jobs: Sequence[Job]) -> Evaluations:
    """The function g of these jobs, which remembers its values and slopes at strengths."""
    prompts = lens.prompts(Prompts.joined([job.prompt for job in jobs]))
    return Evaluations(lens.function(prompts, _readout(lens, jobs, prompts), progress=False))


def _readout(lens: LoraLens, jobs: Sequence[Job], prompts: Prompts) -> Readout:
    """The readout of a batch: the one for all records, or that of each prompt's own texts."""
    make = jobs[0].make
    if make is not None:
        return make([job.record.response or "" for job in jobs])
    if jobs[0].record.doc is None:
        return jobs[0].readout
    docs = [job.record.doc or "" for job in jobs]
    pres = [job.record.pre or "" for job in jobs]
    return margin_between(lens.model, docs, pres, prompts)


def _flips(g: Evaluations, base: Vector, adapted: Vector) -> Sequence[bool | None]:
    """Whether each margin changes sign beyond rounding; None for other readouts."""
    if not isinstance(g.readout, Margin | AnswerMargin):
        return [None] * len(base)
    ends = torch.from_numpy(np.stack([base, adapted]))
    may_be_rounding = float(ends.abs().min()) <= 2 * _ROUNDINGS * g.lens.unit_roundoff
    floor = g.floor.cpu().double() if may_be_rounding else ends.new_zeros(len(base))
    return changes_sign(ends[0], ends[1], floor).tolist()


def _as_numpy(values: Tensor) -> Vector:
    return values.detach().cpu().double().numpy()
