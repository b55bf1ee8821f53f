"""Compute logits of texts that begin alike, running their common beginning only once.

1. Texts whose first eight tokens or more are the same form a group (`alike`). The group's opening
   is the longest beginning that all its texts share and in which none of them is read.
2. The opening is run as one row, with a cache. Its keys and values are copied for each text, and a
   second pass runs the rest of the texts, padded on the right.

The numbers equal those of passes without a cache, up to rounding. Some models have a faulty cache,
so callers must know beforehand that the model's cache is right, as `answers_in_step` tells.

Cost: for n texts of l tokens with an opening of p tokens, p + n (l − p) tokens instead of n l.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import home_of
from lens_lora.core import LoraLens, Prompts
from lens_lora.errors import require_finite
from lens_lora.texts.batches import Gated, batches_of, logits_of

# The length in tokens below which an opening is not worth a pass of its own.
_LEAST_OPENING = 8


class Alike(NamedTuple):
    """A batch of texts that begin alike.

    Attributes:
        places: the index of each of the batch's texts among all texts.
        opening: the tokens with which all of them begin; empty if nothing is shared.
        rest: what follows the opening, with the same reads as the texts.
    """

    places: list[int]
    opening: Int[Tensor, " token"]
    rest: Prompts


def alike(lens: LoraLens, texts: Prompts, most: int, *, has_cache: bool) -> Iterator[Alike]:
    """Yield batches of texts that begin alike and have similar lengths.

    Args:
        lens: the adapter over the model.
        texts: all texts, each of which is read at some of its tokens.
        most: the most tokens of a batch, not counting the opening.
        has_cache: whether the model's cache is known to be right; if not, nothing is shared.
    """
    for group in _groups(texts, is_shared=has_cache and not lens.is_hooked()):
        of_group = texts.chosen(group)
        opening = of_group.tokens[0, : _length_of_opening(of_group) if len(group) > 1 else 0]
        rest = of_group
        if len(opening):
            rest = dataclasses.replace(
                of_group,
                tokens=of_group.tokens[:, len(opening) :],
                lengths=of_group.lengths - len(opening),
            )
        for index, batch in batches_of(lens, rest, most):
            yield Alike([group[i] for i in index], opening, batch)


def _groups(texts: Prompts, *, is_shared: bool) -> list[list[int]]:
    """Group texts with the same first tokens, if these are not read; all others form one group."""
    by_opening: dict[tuple[int, ...], list[int]] = {}
    for i, unread in enumerate(_unread(texts).tolist()):
        opening: tuple[int, ...] = ()
        if is_shared and unread >= _LEAST_OPENING:
            opening = tuple(texts.tokens[i, :_LEAST_OPENING].tolist())
        by_opening.setdefault(opening, []).append(i)
    alone = [group[0] for opening, group in by_opening.items() if opening and len(group) == 1]
    groups = [group for opening, group in by_opening.items() if opening and len(group) > 1]
    others = sorted([*by_opening.get((), []), *alone])
    return [others, *groups] if others else groups


def _unread(texts: Prompts) -> Int[Tensor, " text"]:
    """Count the tokens of each text before the first one that is read."""
    reads = torch.ones_like(texts.lengths) if texts.reads is None else texts.reads
    return texts.lengths - reads


def _length_of_opening(texts: Prompts) -> int:
    """Count the tokens that all texts begin with and do not read; 0 if there are too few."""
    unread = texts.tokens[:, : int(_unread(texts).min())]
    is_same = (unread == unread[:1]).all(0)
    length = int(is_same.long().cumprod(0).sum())
    return length if length >= _LEAST_OPENING else 0


def logits_after(gated: Gated, texts: Alike) -> Float[Tensor, "row slot vocab"]:
    """Compute the logits of one model at the tokens at which the texts are read.

    Args:
        gated: a lens and its gates.
        texts: a batch from `alike`.

    Raises:
        NumericsError: a logit is not finite.
    """
    if not len(texts.opening):
        return logits_of(gated, texts.rest)
    lens, gates = gated
    rest = texts.rest
    device = home_of(lens.model)
    with torch.no_grad(), lens.adapted(gates):
        with lens.unembedding_only(lambda stream: stream[:, -1:]):
            _, cache = lens.host.run_cached(texts.opening[None].to(device), None)
        copies = torch.zeros(rest.batch, dtype=torch.long, device=device)
        cache = lens.host.rows_of_cache(cache, copies)
        with lens.unembedding_only(rest.at_slots):
            logits, _ = lens.host.run_cached(rest.tokens.to(device), cache)
    require_finite(logits.amax(), "a logit")
    return logits
