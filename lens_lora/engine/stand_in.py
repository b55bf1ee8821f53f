"""What stands in for a site's δ: its mean over texts, or that of another text. In rank space, ū.

    mean       ū_l = mean of u_l over all tokens of the texts but each text's first,  μ_l = B_l ū_l
    resample   ū_l at a row's token = u_l at the text's token that is as far from its end

1. The texts are run once, at the gates of the model that the intervention is made on.
2. The first token is a sink, its ‖z‖ up to hundreds of times the others' (and its δ the same
   whatever follows): it is in no mean, gives nothing to another text, and keeps its own δ.
3. Text i mod N stands in for prompt i. It has at least as many tokens as the prompt's rows, so
   that a row's second token never gets a text's first.

Cost: one forward pass of the texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.engine.batching import ROW_TOKENS
from lens_lora.engine.read import run_without_logits
from lens_lora.errors import PromptError
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, which_prompt
from lens_lora.readouts.rows import Reading

__all__ = ["StandIn", "mean_over", "resampled"]

Coordinates = Float[Tensor, "_row _pos *_head _rank"]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """ū of every injection, and where it stands in.

    Attributes:
        u: of each injection, [row, pos, …, rank], or [1, 1, …, rank] for all rows and tokens.
        at: [row, pos], the tokens at which δ is replaced.
        at_slots: [row, slot], the same at the positions that reach the unembedding.
    """

    u: tuple[Coordinates, ...]
    at: Bool[Tensor, "row pos"]
    at_slots: Bool[Tensor, "row slot"]


class _Record:
    """Runs at some gates, and hands each injection's u to `keep`."""

    def __init__(
        self, lens: LoraLens, gates: Float[Tensor, "site"], keep: Callable[[int, Tensor], None]
    ) -> None:
        self._scaled, self._keep = ScaleInject(lens.plan, gates), keep
        self._injections, self._gates = lens.plan.injections, gates

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._injections[index]
        u = injection.map.coordinates(z)
        if injection.partner is not None:
            u = u * self._gates[injection.partner].to(u)
        self._keep(index, u)
        return self._scaled(index, out, z)


def mean_over(
    lens: LoraLens, texts: Prompts, gates: Float[Tensor, "site"], reading: Reading
) -> StandIn:
    """The mean of each site's u over the texts' tokens, without first ones.

    Args:
        lens: the adapter over the model.
        texts: over which the mean is taken.
        gates: at which they are run.
        reading: of the rows in which it stands in.

    Raises:
        PromptError: no text has a second token, or a row has none.
    """
    counted = texts.after_first
    if not bool(counted.any()):
        raise PromptError(
            "texts: none has a token after its first, which is left out of the mean as a sink; "
            "give longer texts."
        )
    sums: dict[int, Tensor] = {}
    for some in _a_few_at_a_time(texts):
        mask = some.after_first

        def add(index: int, u: Tensor, mask: Tensor = mask) -> None:
            own = u[mask.to(u.device)].sum(0)
            sums[index] = sums[index] + own if index in sums else own

        _run(lens, some, gates, add)
    count = int(counted.sum())
    u = tuple(sums[index][None, None] / count for index in range(len(lens.plan.injections)))
    return _over_rows(u, reading.prompts)


def resampled(
    lens: LoraLens, texts: Prompts, gates: Float[Tensor, "site"], reading: Reading
) -> StandIn:
    """Another text's u for each row, the ends of both aligned.

    Args:
        lens: the adapter over the model.
        texts: text i mod N stands in for prompt i.
        gates: at which they are run.
        reading: of the rows in which they stand in.

    Raises:
        PromptError: a text with fewer tokens than a row that it stands in for, or with the same
            ones; a row of one token.
    """
    rows = reading.prompts
    of = (reading.owner % texts.batch).to(texts.tokens.device)
    _require_room(rows, texts, of)
    used, row_of = torch.unique(of, return_inverse=True)
    found: dict[int, list[Tensor]] = {}
    width = int(texts.lengths[used].max())
    for some in _a_few_at_a_time(_chosen(texts, used)):

        def keep(index: int, u: Tensor) -> None:
            padded = u.new_zeros(len(u), width, *u.shape[2:])
            padded[:, : u.shape[1]] = u
            found.setdefault(index, []).append(padded)

        _run(lens, some, gates, keep)
    later = (texts.lengths[of] - rows.lengths.to(of.device))[:, None]
    places = torch.arange(rows.tokens.shape[1], device=of.device)
    everywhere = (places + later).clamp(max=width - 1)
    at_slots = rows.read_positions.to(of.device) + later
    kinds = [lens.sites[injection.site].kind for injection in lens.plan.injections]
    u = tuple(
        _picked(torch.cat(found[i]), row_of, at_slots if kind == "unembed" else everywhere)
        for i, kind in enumerate(kinds)
    )
    return _over_rows(u, rows)


def _picked(u: Tensor, row_of: Int[Tensor, "row"], places: Int[Tensor, "row pos"]) -> Coordinates:
    return u[row_of.to(u.device)[:, None], places.to(u.device)]


def _over_rows(u: tuple[Tensor, ...], rows: Prompts) -> StandIn:
    at = rows.after_first
    without = (~at.any(1)).nonzero().flatten()
    if len(without):
        which = which_prompt(int(without[0]), rows.batch)
        raise PromptError(
            f"{which} has one token, the first, which keeps its own δ as a sink; there is nothing "
            "to replace. Give a longer prompt, or use replace='zero'."
        )
    return StandIn(u, at, at.gather(1, rows.read_positions.to(at.device)))


def _require_room(rows: Prompts, texts: Prompts, of: Int[Tensor, "row"]) -> None:
    for row, text in enumerate(of.tolist()):
        needed, there = int(rows.lengths[row]), int(texts.lengths[text])
        if there < needed:
            raise PromptError(
                f"text {text} of {texts.batch} (from 0) has {there} tokens, and what it stands in "
                f"for has {needed}, its response included; give texts at least as long."
            )
        if there == needed and torch.equal(
            rows.tokens[row, :needed], texts.tokens[text, :needed].to(rows.tokens.device)
        ):
            raise PromptError(
                f"text {text} of {texts.batch} (from 0) has the same tokens as what it stands in "
                "for, so nothing would be replaced; give other texts, or the same in another order."
            )


def _chosen(texts: Prompts, used: Int[Tensor, "text"]) -> Prompts:
    return Prompts(texts.tokens[used], texts.lengths[used])


def _a_few_at_a_time(texts: Prompts) -> Iterator[Prompts]:
    step = max(1, ROW_TOKENS // texts.tokens.shape[1])
    for first in range(0, texts.batch, step):
        yield texts.rows(first, min(first + step, texts.batch))


def _run(
    lens: LoraLens,
    texts: Prompts,
    gates: Float[Tensor, "site"],
    keep: Callable[[int, Tensor], None],
) -> None:
    with torch.no_grad(), lens.injected(_Record(lens, gates, keep)):
        run_without_logits(lens, texts)
