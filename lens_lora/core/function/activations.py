"""Interventions that replace δ_l = B_l u_l, u_l = A_l z_l, at some sites: u_l ← u_l + P(ū_l − u_l).

1. `replaced_readout` is g with the δ of some sites replaced. For a whole site P = 1. For a single
   rank j, P = e_j e_jᵀ in the coordinates of the SVD of ΔW (`LoraLens.in_gauge`), so that σ_j v_jᵀx
   is replaced. Everything after it is live: other sites read the changed residual stream.
2. What replaces u, ū, is one of these:

       zero       ū = 0 at every token
       mean       ū = the mean of u over the tokens of the texts, without each text's first token;
                  tokens with the same tokens before them count once
       resample   ū at a row's token = u at the token of a text that is as far from the text's end

   The texts are run once, at the gates of the model that is intervened on. A text's first token is
   a sink: its ‖z‖ is up to hundreds of times that of others, and its δ does not depend on what
   follows. So it is in no mean, is not taken for another text, and keeps its own δ. Prompt i gets
   text i mod N, which must have at least as many tokens as the prompt's rows, so that a row's
   second token never gets a text's first.

Cost: one forward pass of the prompts or of the texts, without the unembedding; one forward pass for
each intervention, or about half of that where they branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.core.function.forward import run_without_logits
from lens_lora.core.function.many_gates import Bar, gated_readout
from lens_lora.core.function.memory import ROW_TOKENS, row_groups
from lens_lora.core.model import LoraLens
from lens_lora.core.model.basis import NormUpdate
from lens_lora.core.model.injections import Inject, ScaleInject
from lens_lora.core.model.plan import Injection
from lens_lora.core.readout import Prompts, Reading
from lens_lora.errors import (
    ArgumentError,
    PromptError,
    UnsupportedAdapterError,
    setting,
    which_prompt,
)

# --- What stands in for δ


Coordinates = Float[Tensor, "_row _pos *_head _rank"]


@dataclasses.dataclass(frozen=True)
class StandIn:
    """The replacement of u at every injection, and the tokens at which it is made.

    Attributes:
        u: ū of each injection, [row, pos, …, rank], or [1, 1, …, rank] for all rows and tokens.
        at: [row, pos], the tokens at which δ is replaced.
        at_slots: [row, slot], the same for the positions that reach the unembedding.
    """

    u: tuple[Coordinates, ...]
    at: Bool[Tensor, "row pos"]
    at_slots: Bool[Tensor, "row slot"]


def mean_over(
    lens: LoraLens,
    texts: Prompts,
    counted: Bool[Tensor, "text pos"],
    gates: Float[Tensor, " site"],
    reading: Reading,
) -> StandIn:
    """Replace each site's u by its mean over the counted tokens of the texts."""
    if not bool(counted.any()):
        raise PromptError(
            "texts: none has a token after its first, which is left out of the mean as a sink; "
            "give longer texts."
        )
    sums: dict[int, Tensor] = {}
    first = 0
    for rows in row_groups(lens, texts, ROW_TOKENS):
        batch = texts.chosen(rows)
        end = first + batch.batch
        mask = counted[first:end, : batch.tokens.shape[1]]
        first = end

        def add(index: int, u: Tensor, mask: Tensor = mask) -> None:
            sums[index] = sums.get(index, 0) + u[mask.to(u.device)].sum(0)

        _run(lens, batch, gates, add)
    count = int(counted.sum())
    means = [sums[index][None, None] / count for index in range(len(lens.injections))]
    return _over_rows(tuple(means), reading.rows)


def resampled(
    lens: LoraLens, texts: Prompts, gates: Float[Tensor, " site"], reading: Reading
) -> StandIn:
    """Replace u of each row by that of a text, where row and text are aligned at their ends.

    Raises:
        PromptError: a text with fewer tokens than its row, or with the same ones; a row of one
            token.
    """
    rows = reading.rows
    text_of = (reading.owner % texts.batch).to(texts.tokens.device)
    _require_room(rows, texts, text_of)
    used, index_of = torch.unique(text_of, return_inverse=True)
    once = Prompts(texts.tokens[used], texts.lengths[used])
    width = int(once.lengths.max())
    batches: dict[int, list[Tensor]] = {}

    def keep(index: int, u: Tensor) -> None:
        padded = u.new_zeros(len(u), width, *u.shape[2:])
        padded[:, : u.shape[1]] = u
        batches.setdefault(index, []).append(padded)

    for group in row_groups(lens, once, ROW_TOKENS):
        _run(lens, once.chosen(group), gates, keep)
    # Row and text are aligned at their ends: token p of the row takes u of token p + later.
    row_lengths = rows.lengths.to(text_of.device)
    later = (texts.lengths[text_of] - row_lengths)[:, None]
    places = torch.arange(rows.tokens.shape[1], device=text_of.device)
    everywhere = (places + later).clamp(max=width - 1)
    at_slots = rows.read_positions.to(text_of.device) + later
    coordinates: list[Tensor] = []
    for index, injection in enumerate(lens.injections):
        is_unembedding = lens.sites[injection.site].kind == "unembed"
        at = at_slots if is_unembedding else everywhere
        coordinates.append(_picked(torch.cat(batches[index]), index_of, at))
    return _over_rows(tuple(coordinates), rows)


def _picked(u: Tensor, text_of: Int[Tensor, " row"], places: Int[Tensor, "row pos"]) -> Coordinates:
    """Take u of each row's text, at these places of the text."""
    return u[text_of.to(u.device)[:, None], places.to(u.device)]


def _over_rows(u: tuple[Tensor, ...], rows: Prompts) -> StandIn:
    """Replace u at every token of the rows but the first.

    Raises:
        PromptError: a row of one token.
    """
    is_later = rows.after_first
    without = (~is_later.any(1)).nonzero().flatten()
    if len(without):
        prompt = which_prompt(int(without[0]), rows.batch)
        raise PromptError(
            f"{prompt} has one token, the first, which keeps its own δ as a sink; there is nothing "
            "to replace. Give a longer prompt, or use replace='zero'."
        )
    return StandIn(u, is_later, is_later.gather(1, rows.read_positions.to(is_later.device)))


def _require_room(rows: Prompts, texts: Prompts, text_of: Int[Tensor, " row"]) -> None:
    """Check that the text of each row is at least as long as the row, and not the same."""
    for row, text in enumerate(text_of.tolist()):
        needed = int(rows.lengths[row])
        length = int(texts.lengths[text])
        if length < needed:
            raise PromptError(
                f"text {text} of {texts.batch} (from 0) has {length} tokens, and what it stands in "
                f"for has {needed}, its response included; give texts at least as long."
            )
        if length == needed and torch.equal(
            rows.tokens[row, :needed], texts.tokens[text, :needed].to(rows.tokens.device)
        ):
            raise PromptError(
                f"text {text} of {texts.batch} (from 0) has the same tokens as what it stands in "
                "for, so nothing would be replaced; give other texts, or the same in another order."
            )


_Keeper = Callable[[int, Tensor], None]


def _run(lens: LoraLens, texts: Prompts, gates: Float[Tensor, " site"], keep: _Keeper) -> None:
    """Run the texts at these gates, and hand each injection's u to `keep`."""
    for site, delta in zip(lens.sites, lens.maps, strict=True):
        if delta.experts:
            raise UnsupportedAdapterError(
                f"{site.name} ({site.module}): another token's experts are not this one's, so "
                "nothing can stand in for what they write. Use replace='zero', or leave the "
                "experts out with adapter.without_modules(…)."
            )
    scaled = ScaleInject(lens.plan, gates)

    def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = lens.injections[index]
        u = injection.map.coordinates(z)
        if injection.partner is not None:
            u = u * gates[injection.partner].to(u)
        keep(index, u)
        return scaled(index, out, z)

    with torch.no_grad(), lens.injected(inject):
        run_without_logits(lens, texts)


# --- δ replaced


# The state of a site in a run: it writes nothing, or it writes its own δ, or it is the site that
# the run intervenes on. If the run intervenes on its rank j, the state is ABOUT + j.
OFF = 0.0
ON = 1.0
ABOUT = 2.0


@dataclasses.dataclass(frozen=True)
class Points:
    """The interventions: what each run does at every site.

    Attributes:
        states: `ABOUT` for the sites that a run intervenes on, or `ABOUT` + j for the rank j of
            one; `OFF` or `ON` for all other sites.
        of_ranks: whether the runs intervene on single ranks.
        alone: whether that rank is the only one of its site that writes.
        replaced: whether the δ of the site or rank is replaced.
    """

    states: Float[Tensor, "point site"]
    of_ranks: bool
    alone: bool
    replaced: bool

    @property
    def writes(self) -> Bool[Tensor, "point site"]:
        """Whether a site writes anything."""
        return self.states > OFF

    @property
    def ranks(self) -> Int[Tensor, " point"]:
        """The rank that each run intervenes on; 0 for whole sites."""
        return (self.states.amax(1) - ABOUT).long()

    def are_about(self, site: int) -> Bool[Tensor, " point"]:
        """Whether each run intervenes on this site."""
        return self.states[:, site] >= ABOUT


def require_ranks(lens: LoraLens, sites: Sequence[int]) -> None:
    """Refuse norms, which have no ranks."""
    for index in sites:
        if isinstance(lens.updates[index].update, NormUpdate):
            raise ArgumentError(
                f"{lens.sites[index].name} is a norm that was trained, whose update has no ranks; "
                f"choose other sites (sites=…), or {setting('of', 'site')}."
            )


def replaced_readout(
    lens: LoraLens,
    reading: Reading,
    points: Points,
    stand_in: StandIn | None,
    *,
    bar: Bar,
) -> Float[Tensor, "batch point"]:
    """Evaluate g of every prompt in every run. At most one forward pass a run, batched.

    Args:
        lens: the adapter over the model; for ranks, in the coordinates of the SVD.
        reading: what is run and read.
        points: the interventions.
        stand_in: what δ is replaced by; None for zero.
        bar: the progress bar.

    Raises:
        NumericsError: a readout that is not finite.
    """

    def inject(states: Float[Tensor, "row site"], rows: Int[Tensor, " row"]) -> Inject:
        return _ReplaceInject(lens, dataclasses.replace(points, states=states), rows, stand_in)

    return gated_readout(lens, reading, points.states, inject=inject, bar=bar)


class _ReplaceInject:
    """Writes δ as the intervention of each row says: as it is, one rank of it, or replaced.

    `rows` says of which row of the reading each row of the batch is a copy.
    """

    def __init__(
        self, lens: LoraLens, points: Points, rows: Int[Tensor, " row"], stand_in: StandIn | None
    ) -> None:
        self._lens = lens
        self._points = points
        self._rows = rows
        self._stand_in = stand_in
        self._gates = points.writes.to(lens.gate_dtype)
        self._ranks = points.ranks

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """Write B u at one injection, with u replaced in the rows that intervene on its site."""
        injection = self._lens.injections[index]
        gate = injection.gate(self._gates)
        if not bool((gate != 0).any()):
            return None
        u = self._moved(index, injection, injection.map.coordinates(z))
        return injection.map.added(out, u, gate)

    def _moved(self, index: int, injection: Injection, u: Tensor) -> Tensor:
        """Compute u + P(ū − u) in the rows that intervene on this site, or P u for a rank alone."""
        is_about = self._points.are_about(injection.site).to(u.device)
        if not bool(is_about.any()):
            return u
        start = u
        if self._points.alone:
            start = torch.where(_as_wide_as(u, is_about), self._part(u), u)
        if not self._points.replaced:
            return start
        gap, is_replaced = self._gap(index, injection, u, is_about)
        return start + torch.where(_as_wide_as(u, is_replaced), self._part(gap), 0.0)

    def _gap(
        self, index: int, injection: Injection, u: Tensor, is_about: Bool[Tensor, " row"]
    ) -> tuple[Tensor, Bool[Tensor, "row _pos"]]:
        """Compute ū − u, and the tokens of each row at which it is added."""
        if self._stand_in is None:
            # Two partners add half of their common δ each; without the rank both halves are gone.
            gap = -u if injection.partner is None else -2 * u
            return gap, is_about[:, None]
        other = self._stand_in.u[index]
        if len(other) > 1:
            other = other[self._rows.to(other.device), : u.shape[1]]
        is_unembedding = self._lens.sites[injection.site].kind == "unembed"
        tokens = self._stand_in.at_slots if is_unembedding else self._stand_in.at
        of_rows = tokens.to(u.device)[self._rows.to(u.device), : u.shape[1]]
        return other - u, is_about[:, None] & of_rows

    def _part(self, u: Tensor) -> Tensor:
        """Compute P u, with the rank of each row."""
        if not self._points.of_ranks:
            return u
        ranks = torch.arange(u.shape[-1], device=u.device)
        is_rank = self._ranks.to(u.device)[:, None] == ranks
        return u * is_rank.view(len(is_rank), *[1] * (u.ndim - 2), -1)


def _as_wide_as(u: Tensor, values: Tensor) -> Tensor:
    """Values by row, or by row and token, with axes of size 1 up to the number of axes of u."""
    return values.view(*values.shape, *[1] * (u.ndim - values.ndim))
