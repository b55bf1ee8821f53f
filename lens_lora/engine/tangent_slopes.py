"""Forward mode: ∂g/∂ε_l of every site, position, head and rank, a tangent for each.

The same numbers as `engine/reverse.py`, by the other route, and its check: each part's tangent goes
through the readout (`engine/forward.py`). Where v's constant part is added at o, its parts by
position are compared with the whole site, which takes a tangent more for each such site.

Cost: at most one dual forward pass a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.dual_pass import tangent_of
from lens_lora.engine.forward import Part, part_tangents
from lens_lora.engine.read import ends_plainly, token_covectors
from lens_lora.engine.reverse import part_slots, require_split
from lens_lora.hooked.sites import Groups
from lens_lora.lens import LoraLens
from lens_lora.readouts.picks import LogProbs
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = ["TokenTangents", "all_parts", "group_parts", "group_slopes", "tangent_slopes"]


def tangent_slopes(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...] = (),
    *,
    tokens: TokenTangents | None = None,
    progress: bool = True,
) -> Float[Tensor, "batch site *by"]:
    """∂g/∂ε_l at these gates, as `site_slopes` gives it. At most a dual forward pass a part.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: at which the derivative is taken.
        axes: position, head and rank, as far as they are asked for.
        tokens: what reads each token of a response, on a last axis, in place of g.
        progress: show a bar.

    Raises:
        ArgumentError: less memory than one part takes.
        ModelStateError: an operation without a forward-mode derivative, or a split that does not
            exist.
    """
    prompts = reading.prompts
    shape = (reading.batch, len(lens.sites), *part_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    if tokens is not None:
        values = values[..., None].repeat_interleave(prompts.slots, -1)
    wanted = all_parts(lens, prompts, axes)
    read = of_value(reading) if tokens is None else tokens
    final = tokens is not None and tokens.final

    def tangents(some: Sequence[Part]) -> Float[Tensor, "batch part *token"]:
        return part_tangents(lens, prompts, gates, some, read, final=final, progress=progress)

    slots = [[_last_if_none(getattr(part, axis)) for part in wanted] for axis in axes]
    values[(slice(None), [part.site for part in wanted], *slots)] = tangents(wanted)
    whole = [Part(index) for index in lens.plan.with_constants]
    if "position" in axes and whole:
        of_site = tangents(whole)
        for token in [...] if tokens is None else range(prompts.slots):
            require_split(lens, values[..., token], of_site[..., token])
    return values


def group_slopes(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "site"],
    groups: Groups,
    tokens: TokenTangents,
    *,
    progress: bool = True,
) -> Float[Tensor, "batch group token"]:
    """Σ_{l in G} ∂ℓ_t/∂ε_l of each group of sites and token. At most a dual forward pass a group.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        gates: at which the derivative is taken.
        groups: of sites, each at least one.
        tokens: what reads each token of the prompts' responses.
        progress: show a bar.

    Raises:
        ArgumentError: less memory than one group takes.
        ModelStateError: an operation without a forward-mode derivative.
    """
    parts = group_parts(lens, groups)
    return part_tangents(lens, prompts, gates, parts, tokens, final=tokens.final, progress=progress)


def group_parts(lens: LoraLens, groups: Groups) -> list[Part]:
    """The direction in gate space of each group: all its sites together.

    Args:
        lens: the adapter over the model.
        groups: of sites, each at least one.
    """
    ordered = (sorted(of, key=lambda i: lens.sites[i].layer) for of in groups.values())
    return [Part(first, others=tuple(rest)) for first, *rest in ordered]


def of_value(reading: Reading) -> Callable[[Tensor], Float[Tensor, "batch part"]]:
    """The tangent of g of each part, from the dual logits.

    Args:
        reading: what is read.
    """

    def read(rows: Float[Tensor, "row part *slot vocab"]) -> Float[Tensor, "batch part"]:
        many = reading.repeat(rows.shape[1])
        return tangent_of(many.read(rows.flatten(0, 1))).view(reading.batch, -1)

    return read


class TokenTangents:
    """The tangent of each token's term of g, of each part, from what a dual pass ends with.

    Attributes:
        final: that is the final residual stream x, else the logits.
        value: g at the gates of the pass, where it was found on the way; [batch], or None.

    Args:
        lens: the adapter over the model.
        reading: of one response a prompt.
    """

    def __init__(self, lens: LoraLens, reading: Reading) -> None:
        self._lens, self._reading = lens, reading
        self.final: bool = ends_plainly(lens)
        self.value: Tensor | None = None
        self._covectors: Tensor | None = None

    def __call__(
        self, rows: Float[Tensor, "row part slot wide"]
    ) -> Float[Tensor, "row part token"]:
        """Of what a dual pass ends with."""
        return self._of_final(rows) if self.final else self._of_logits(rows)

    def _of_final(self, rows: Tensor) -> Tensor:
        """c_t · ẋ_t; every part has the same x, and so has every pass."""
        if self._covectors is None:
            x = fwad.unpack_dual(rows).primal[:, 0]
            self._covectors, log_probs = token_covectors(self._lens, self._reading, x)
            self.value = cast(LogProbs, self._reading.read).of(log_probs)
        return (self._covectors[:, None] * tangent_of(rows)).sum(-1)

    def _of_logits(self, rows: Tensor) -> Tensor:
        many = cast(LogProbs, self._reading.read).repeat(rows.shape[1])
        logits, every = rows.flatten(0, 1), torch.arange(len(many.rows), device="cpu")
        by_token = many.by_token(many.terms(logits[many.places(logits.device)], every))
        return tangent_of(by_token).unflatten(0, rows.shape[:2])


def _last_if_none(slot: int | None) -> int:
    return -1 if slot is None else slot


def all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    """Every part of every site.

    Args:
        lens: the adapter over the model.
        prompts: what is run.
        axes: position, head and rank, as far as they are asked for.
    """
    found = []
    for index, site in enumerate(lens.sites):
        heads = lens.heads.of(site.kind)
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            "head": range(_head_slots(lens, index)) if heads else [None],
            "rank": range(site.rank),
        }
        options = [
            ranges[axis] if axis in axes else [None] for axis in ("position", "head", "rank")
        ]
        found += [Part(index, p, h, r) for p in options[0] for h in options[1] for r in options[2]]
    return found


def _head_slots(lens: LoraLens, index: int) -> int:
    """The site's heads, and one slot more where a bias belongs to none of them."""
    by_head = lens.maps[index].a0_by_head
    heads = lens.heads.of(lens.sites[index].kind)
    return heads if by_head is None else len(by_head)
