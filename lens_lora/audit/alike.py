"""Compute logits of texts that begin alike, running their common beginning only once.

1. Texts whose first eight tokens or more are the same form a group (`alike`). The group's opening
   is the longest beginning that all its texts share and in which none of them is read.
2. The opening is run as one row, with a cache. Its keys and values are copied for each text, and a
   second pass runs the rest of the texts, padded on the right.

The numbers equal those of passes without a cache, up to rounding. Some models have a faulty cache,
so callers must know beforehand that it chooses the right tokens, as `answers_in_step` tells. That
does not make its logits right. So one text of the first group is also run whole, and if its logits
differ by more than rounding, nothing is shared.

Cost: for n texts of l tokens with an opening of p tokens, p + n (l − p) tokens instead of n l, and
two passes over one text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
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
# Rounding moves logits by less than the square root of the dtype's eps, as a share of the largest.
# In half precision that would be up to 9 %, so no more than 2 % is allowed.
_LARGEST_ROUNDING = 0.02


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
        has_cache: whether the model's cache chooses the right tokens; if not, nothing is shared.
    """
    is_shared = has_cache and not lens.is_hooked()
    groups = _groups(texts, is_shared=is_shared)
    if is_shared and not _has_logits_of_whole_texts(lens, texts, groups):
        groups = _groups(texts, is_shared=False)
        is_shared = False
    for group in groups:
        of_group = texts.chosen(group)
        # Texts that share nothing form one group, which may happen to begin alike.
        has_opening = is_shared and len(group) > 1
        opening, rest = _after(of_group, _length_of_opening(of_group) if has_opening else 0)
        for index, batch in batches_of(lens, rest, most):
            yield Alike([group[i] for i in index], opening, batch)


def _after(texts: Prompts, length: int) -> tuple[Int[Tensor, " token"], Prompts]:
    """Divide texts after so many tokens, which are the same in all of them."""
    if not length:
        return texts.tokens[0, :0], texts
    rest = dataclasses.replace(
        texts, tokens=texts.tokens[:, length:], lengths=texts.lengths - length
    )
    return texts.tokens[0, :length], rest


def _has_logits_of_whole_texts(
    lens: LoraLens, texts: Prompts, groups: Sequence[Sequence[int]]
) -> bool:
    """Whether one text after its shared opening has the logits of the whole text, up to rounding.

    True as well if no texts share an opening.
    """
    for group in groups:
        of_group = texts.chosen(group)
        length = _length_of_opening(of_group) if len(group) > 1 else 0
        if length:
            one = of_group.chosen([0])
            opening, rest = _after(one, length)
            gated = (lens, lens.gates(1.0))
            whole = logits_of(gated, one)
            difference = logits_after(gated, Alike([group[0]], opening, rest)) - whole
            room = min(torch.finfo(whole.dtype).eps ** 0.5, _LARGEST_ROUNDING) * whole.abs().max()
            return bool(difference.abs().max() <= room)
    return True


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
