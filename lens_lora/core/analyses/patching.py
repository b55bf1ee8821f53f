"""Real interventions: run, and not predicted. On sites (`patch_sites`), and on activations.

    add one           g(e_G) − g(0)                  what group G does alone, on the base model
    leave one out     g(1) − g(1 − e_G)              what is lost without it, in the adapted model
    base to adapted   g(1) − g(1 | h ← h of base)    what is lost when h is set back
    adapted to base   g(0 | h ← h of adapted) − g(0) what h alone brings to the base model

1. Each group of sites G is a corner of the cube: gates e_G, or 1 − e_G. g is run at every corner,
   and at both ends; corners that share their first layers share the work. The effects of all groups
   do not sum to the shift in general: what sites do together is in neither.
2. Zero is one thing to put in the place of δ_G; the mean of δ over texts, or another text's δ, keep
   what does not depend on the input, or what a text in general brings. Then the effect is

       g(δ_G its own) − g(δ_G replaced),   on the base with G on, or on the adapted model

   with the texts run on the base, or on the adapted model (`function/activations.py`). The same for
   one rank of a site, σ_j u_j v_jᵀx of the SVD of its ΔW (`model/gauge.py`).
3. An activation h comes from the other model, the donor, which runs once. The recipient runs once
   for each patch, as rows of a batch: at one hook point, or one head of q, k, v or z there, and one
   position, several of them, or all (`function/interventions.py`). In an adapted recipient the
   updates stay live: a patch at or before a site's input changes its δ, and a patch at its output
   replaces W z + δ, as in a model of the merged weights.
4. Points without an effect are tried with noise: where that has none either, the model ignores the
   value that a hook leaves there, and the call raises an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import one_entry, whole, word
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.function import activations, interventions
from lens_lora.core.function.activations import mean_over, replaced_readout
from lens_lora.core.function.function import Function
from lens_lora.core.function.interventions import unheard
from lens_lora.core.model import (
    Group,
    Groups,
    LoraLens,
    Names,
    chosen_sites,
    group_sites,
    indicator,
)
from lens_lora.core.readout import Prompts, PromptsLike, Reading
from lens_lora.core.readout.beginnings import distinct_tokens
from lens_lora.core.results.base import Entries, Ranked, long_table, only_prompt, tokens_at
from lens_lora.core.results.effects import Effects, patching_result
from lens_lora.errors import ArgumentError, ModelStateError, SiteError, first_few

How = Literal["add_one", "leave_one_out"]
Of = Literal["site", "rank"]
Replace = Literal["zero", "mean", "resample"]


@analysis
def patch_sites(
    g: Function,
    how: How = "add_one",
    *,
    sites: str | Sequence[str] | None = None,
    group: Group = "site",
    of: Of = "site",
    replace: Replace = "zero",
    texts: PromptsLike | None = None,
) -> Effects:
    """What each site, group of sites or single rank does to the readout, exactly.

    Cost: two forward passes, four for the noise floor, and one per group, batched; about half of
    that where the model's batch may grow from block to block (all but Bloom and OPT on a Bridge).
    Where δ is not replaced by zero, one forward pass of the texts too, and with 'add_one' two per
    group, with its own δ and without.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        how: 'add_one', on the base model, g(e_G) − g(0), or 'leave_one_out', in the adapted model,
            g(1) − g(1 − e_G).
        sites: names or globs; only these are switched. Without it, all.
        group: 'site', 'layer', 'kind', or {name: site names or globs}.
        of: 'rank' for each rank of each site, in the coordinates of the SVD of its ΔW, which are
            unique up to equal singular values; then `group` is 'site'.
        replace: the stand-in for δ. 'mean', its mean over all tokens of `texts` but each text's
            first, those with the same tokens before them once; 'resample', its value on another
            text: text i mod N for prompt i, with both ends aligned (a row ends with its response).
            The first token, a sink, keeps its own δ in both.
        texts: the texts of 'mean' and 'resample', in any form that prompts take. For 'resample'
            each must be as long as the rows that it stands in for.
        progress: show a bar.

    Returns:
        Effects with values [batch, group], in the readout's units.

    Raises:
        SiteError: a name or glob that matches no site, or a named group without a chosen site.
        TokenError, PromptError: a readout or prompt that does not fit the model; texts that are too
            short, or the same as what they stand in for; a prompt of the first token only.
        NumericsError: a non-finite readout.
        ArgumentError: another `how`, `group`, `of` or `replace`, texts where none are needed or
            none where they are, or ranks of groups or of norms.
    """
    word("how", how, get_args(How))
    word("of", of, get_args(Of))
    lens = g.lens
    replacing = None if texts is None else lens.prompts(texts)
    _require_texts(replace, replacing)
    groups = _chosen(lens, sites, group)
    if of == "site" and replacing is None:
        return Effects.from_function(g, _switched(g, groups, how), groups, how)
    ranks = None
    if of == "rank":
        groups, ranks = _single_ranks(lens, groups, group)
        with_ranks = sorted({index for (index,) in groups.values()})
        activations.require_ranks(lens, with_ranks)
        lens = activations.in_gauge(lens, "svd")
    stand_in = None
    if replacing is not None:
        stand_in = _stand_in(lens, g.reading, how, replace, replacing)
    values = _replaced(g, lens, groups, ranks, how, stand_in)
    count = 0 if replacing is None else replacing.batch
    return Effects.from_function(g, values, groups, how, of=of, replace=replace, texts=count)


def _switched(g: Function, groups: Groups, how: How) -> Float[Tensor, "batch group"]:
    """Effects of gates of zero or one on groups of sites: corners of the cube against an end."""
    members = indicator(groups, len(g.lens.sites))
    if how == "add_one":
        added = g.corners(members)
        base, _ = g.ends
        return (added - base).T
    without = g.corners(1 - members)
    _, adapted = g.ends
    return (adapted - without).T


def _require_texts(replace: str, texts: Prompts | None) -> None:
    word("replace", replace, get_args(Replace))
    if replace == "zero" and texts is not None:
        raise ArgumentError(
            "texts are for replace='mean' or 'resample', and this is replace='zero', which needs "
            "none."
        )
    if replace != "zero" and texts is None:
        raise ArgumentError(
            f"replace={replace!r} takes δ from other texts, and none were given; pass texts=[…]."
        )


def _chosen(lens: LoraLens, sites: str | Sequence[str] | None, group: Group) -> Groups:
    """The groups, of the chosen sites alone."""
    groups = group_sites(lens.sites, group)
    if sites is None:
        return groups
    chosen = chosen_sites(lens.sites, sites)
    kept = {name: tuple(i for i in members if i in chosen) for name, members in groups.items()}
    empty = [name for name, members in kept.items() if not members]
    if empty and isinstance(group, Mapping):
        raise SiteError(f"group {empty[0]!r} holds none of the sites chosen by {sites}.")
    return {name: members for name, members in kept.items() if members}


# --- δ replaced by something else than zero, and single ranks.


def _single_ranks(lens: LoraLens, groups: Groups, group: Group) -> tuple[Groups, list[int]]:
    """A group for each rank of each site, and which rank it is."""
    if group != "site":
        raise ArgumentError(
            f"of='rank' takes each rank of each site by itself, and group is {group!r}; leave out "
            "group, or choose with sites=…"
        )
    names = {
        (index, rank): f"{name}[{rank}]"
        for name, (index,) in groups.items()
        for rank in range(lens.sites[index].rank)
    }
    return {name: (index,) for (index, _), name in names.items()}, [rank for _, rank in names]


def _stand_in(
    lens: LoraLens, reading: Reading, how: How, replace: Replace, texts: Prompts
) -> activations.StandIn:
    """What stands in for δ: from the texts, run on the model that the intervention is made on."""
    gates = lens.gates(float(how == "leave_one_out"))
    if replace == "mean":
        return mean_over(lens, texts, distinct_tokens(texts), gates, reading)
    return activations.resampled(lens, texts, gates, reading)


def _replaced(
    g: Function,
    lens: LoraLens,
    groups: Groups,
    ranks: list[int] | None,
    how: How,
    stand_in: activations.StandIn | None,
) -> Float[Tensor, "batch group"]:
    """g with each group's own δ, less g with what stands in for it.

    The lens is that of g, with its rank spaces turned where single ranks are replaced.
    """
    adds = how == "add_one"
    is_by_rank = ranks is not None

    def run(points: activations.Points, what: str) -> Float[Tensor, "batch group"]:
        return replaced_readout(lens, g.reading, points, stand_in, progress=g.progress, what=what)

    members = indicator(groups, len(lens.sites)).to(lens.device, lens.gate_dtype)
    about = 2.0 + torch.tensor(ranks or [0] * len(groups))[:, None]
    states = torch.where(members > 0, about.to(members), 0.0 if adds else 1.0)
    points = activations.Points(states, is_by_rank, alone=adds and is_by_rank, replaced=True)
    if not adds:
        _, adapted = g.ends
        return adapted[:, None] - run(points, "replaced")
    if is_by_rank:
        added = run(dataclasses.replace(points, replaced=False), "add one")
    else:
        added = g.corners(members).T
    if stand_in is None:
        base, _ = g.ends
        return added - base[:, None]
    return added - run(points, "replaced")


# --- Activations, at any hook point.


Positions = Literal["each"] | int | slice | Sequence[int] | None
Direction = Literal["base_to_adapted", "adapted_to_base"]
_Positions = Literal["each"] | slice | list[int] | None
_DONOR_AND_RECIPIENT = {"base_to_adapted": (0.0, 1.0), "adapted_to_base": (1.0, 0.0)}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# An effect below a thousandth of the shift, or below 64 roundings of the readout, may be none at
# all: then the point is tried with noise.
_SMALL, _ROUNDINGS = 1e-3, 64


@final
class ActivationEffects(Ranked):
    """What replacing one activation by the other model's does to a readout, in its units.

    `plot` is hook point × position, or layer × hook point, or layer × head.

    Attributes:
        values: [batch, name], or [batch, name, position] where each position was patched alone;
            NaN where a prompt has no such position. Positive where the adapted model's activation
            raises the readout.
        names: hook points; where each head was patched alone 'blocks.3.attn.hook_z[5]', with the
            heads of keys and values at k and v.
        direction: 'base_to_adapted', g(1) − g(patched), or 'adapted_to_base', g(patched) − g(0).
        positions: the positions patched: 'all', 'each', or indices, together.
        noise_floor: [batch], σ of an effect from rounding alone; None where it was not measured.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch name *position"]
    names: Annotated[tuple[str, ...], "name"]
    direction: str
    positions: str
    noise_floor: Float[Tensor, " batch"] | None = None

    @property
    def share(self) -> Float[Tensor, "batch name *position"]:
        """The effects as shares of the shift: 1 where the activation carries all of it."""
        return self.share_of(self.values)

    @property
    def by_position(self) -> bool:
        """Whether each position was patched alone."""
        return self.values.ndim == 3

    @property
    def places(self) -> tuple[tuple[int | None, str], ...]:
        """Each name's layer and the rest of it: (3, 'hook_resid_pre'); None outside the blocks."""
        matches = {name: _IN_BLOCK.fullmatch(name) for name in self.names}
        return tuple(
            (int(match[1]), match[2]) if match else (None, name) for name, match in matches.items()
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, hook point (or head of it) and existing position: effect, share."""
        axes = [{"prompt": range(len(self.values))}, self._labels]
        if self.by_position:
            axes.append({"position": range(self.values.shape[2])})
        frame = long_table({"effect": self.values, "share": self.share}, *axes)
        frame = frame.dropna(subset="effect", ignore_index=True)
        if self.by_position:
            frame.insert(5, "token", tokens_at(self.str_tokens, frame["prompt"], frame["position"]))
        return frame

    @property
    def _labels(self) -> dict[str, Any]:
        layers, hooks = zip(*self.places, strict=True)
        return {"name": self.names, "layer": pd.array(layers, dtype="Int64"), "hook": hooks}

    def entries(self, prompt: int | None = None) -> Entries:
        """Each hook point's effect, or that of each of its positions."""
        values, shift = self.of_prompt(prompt)
        if not self.by_position:
            return Entries({"name": self.names}, values, shift, "effect")
        count, width = values.shape
        tokens = self.str_tokens[only_prompt(prompt, len(self.base))]
        labels = {
            "name": [name for name in self.names for _ in range(width)],
            "position": [*range(width)] * count,
            "token": [*tokens, *[""] * (width - len(tokens))] * count,
        }
        return Entries(labels, values.flatten(), shift, "effect")

    def of_prompt(
        self, prompt: int | None
    ) -> tuple[Float[Tensor, " name *position"], Float[Tensor, ""]]:
        """One prompt's effects and shift in float64, or the mean over prompts.

        Args:
            prompt: an index; without it the mean over prompts, or by position the only prompt.

        Raises:
            ArgumentError: no such prompt; by position, several prompts and none named.
        """
        if self.by_position:
            prompt = only_prompt(prompt, len(self.base), "positions")
        return self.mean_over(prompt, self.values)

    def to_patching_result(self) -> Any:
        """TransformerLens's `PatchingResult`: its standard errors, intervals and p-values.

        Its `values` are the patched readout, [name, batch] or [name, pos, batch] (NaN where a
        prompt has no such position), and its `baseline` the readout before: `effect()` is `values`
        here from adapted to base, and their negative from base to adapted. `normalized(…)` of the
        readout at the other end is `share`.

        Raises:
            LensLoraError: the installed transformer-lens has no such class (4.3 has).
        """
        index, axes = pd.DataFrame(self._labels), list[str]()
        if self.by_position:
            index = index.merge(pd.DataFrame({"pos": range(self.values.shape[2])}), how="cross")
            axes = ["name", "pos"]
        return patching_result(self, self.direction == "adapted_to_base", index, axes)


@analysis
def patch_activations(
    g: Function,
    names: Names,
    *,
    direction: Direction = "base_to_adapted",
    positions: Positions = None,
    heads: Literal["each"] | None = None,
) -> ActivationEffects:
    """What one activation carries of the shift: replaced by the other model's, at each hook point.

    Cost: three forward passes, four for the noise floor, and one per name (and position, and head,
    with 'each'), batched; rows begin at the block in which they patch, where the model's batch may
    grow (not Bloom and OPT on a Bridge). One short pass more for positions, and one for each name
    without an effect.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        names: a hook point, several, globs, or a predicate. A name in full must fire and hold
            activations by prompt (and by position, with positions); globs and predicates choose
            among the points that do.
        direction: 'base_to_adapted', g(1) − g(patched), or 'adapted_to_base', g(patched) − g(0).
        positions: None for the whole sequence at once; 'each' for one number per position; an
            index, a slice, or indices, replaced together. They count within each prompt, negative
            ones from its own end; an answer's tokens, after the prompt, are in None and 'each'.
        heads: 'each' for one number per head, at hook points of q, k, v and z. The other heads keep
            what they have; with grouped queries k and v have as many heads as there are groups.
        progress: show a bar.

    Returns:
        ActivationEffects with values [batch, name], or [batch, name, position] with 'each' position
        (NaN where a prompt has no such position), in the readout's units; with heads a name for
        each head.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point whose value the model ignores; one named in full that never fires,
            does not hold activations by prompt (and by position, with positions), or lies between a
            site's input and output, where the adapted model's value does not exist; no point that a
            glob matches; with heads, one that is none of q, k, v and z, or whose heads are laid out
            otherwise.
        ArgumentError: a position outside a prompt, another direction, other heads.
        NumericsError: a non-finite readout.
    """
    donor_scale, scale = _DONOR_AND_RECIPIENT[word("direction", direction, _DONOR_AND_RECIPIENT)]
    chosen = _checked(positions)
    lens = g.lens
    reading = g.reading
    masks = _masks(chosen, g.prompts, reading)
    named = lens.points(names).computed()
    donor = interventions.record(lens, reading.prompts, donor_scale, named.wanted, named.in_full)
    points = named.fired(donor.firings)
    if chosen is not None:
        points = interventions.positioned(
            lens, reading.prompts, donor, points, named.in_full, donor_scale
        )
    rows: list[tuple[str, str, Tensor | None]] = [(name, name, None) for name in points]
    if heads is not None and word("heads", heads, ["each"]):
        parts = interventions.head_parts(lens, donor, points).items()
        rows = [(f"{n}[{i}]", n, part) for n, split in parts for i, part in enumerate(split)]
    patches = [
        interventions.Patch(name, mask if part is None else part if mask is None else mask & part)
        for _, name, part in rows
        for mask in masks
    ]
    base, adapted = g.ends[..., None, None]
    patched = interventions.patched_readout(
        lens, reading, donor, patches, donor_scale=donor_scale, scale=scale, progress=g.progress
    ).unflatten(1, (len(rows), -1))
    values = adapted - patched if direction == "base_to_adapted" else patched - base
    _require_heard(g, scale, [name for _, name, _ in rows], values)
    if chosen == "each":
        # Positions that some row of a prompt has.
        exists = reading.by_prompt(reading.prompts.real.float()).to(values.device) > 0
        values = values.masked_fill(~exists[:, None], float("nan"))
    return ActivationEffects(
        values=values if chosen == "each" else values[..., 0],
        names=tuple(label for label, _, _ in rows),
        direction=direction,
        positions=_label(chosen),
        noise_floor=g.noise((1.0, -1.0), at=scale),
        **g.header(),
    )


def _require_heard(
    g: Function, scale: float, points: Sequence[str], values: Float[Tensor, "batch name position"]
) -> None:
    """Refuse points without an effect at which nothing at all would have one."""
    lens = g.lens
    ends = g.ends
    rounding = _ROUNDINGS * lens.eps * float(ends.abs().max())
    least = max(_SMALL * float((ends[1] - ends[0]).abs().max()), rounding)
    is_heard = (values.abs().amax((0, 2)) > least).tolist()
    heard = {name for name, is_it in zip(points, is_heard, strict=True) if is_it}
    doubtful = [name for name in dict.fromkeys(points) if name not in heard]
    silent = unheard(lens, g.rows.row(0), scale, doubtful) if doubtful else []
    if silent:
        raise ModelStateError(
            f"{first_few(silent)}: the hook point fires, but the model ignores what a hook "
            "makes of its value, so a patch there says nothing; leave it out."
        )


def _checked(positions: object) -> _Positions:
    """A single index as a list of it."""
    plain = one_entry(positions)
    if plain is None or isinstance(plain, slice):
        return plain
    if isinstance(plain, str):
        word("positions", plain, ["each"])
        return "each"
    indices = plain if isinstance(plain, Iterable) else [plain]
    return [whole("positions", index) for index in indices]


def _masks(
    positions: _Positions, prompts: Prompts, reading: Reading
) -> list[Bool[Tensor, "row pos 1"] | None]:
    """The masks to patch under, one for each number of the result."""
    if positions is None:
        return [None]
    real = reading.prompts.real.cpu()
    if positions == "each":
        slots = torch.arange(real.shape[1])
        return [(real & (slots == slot))[..., None] for slot in slots]
    mask = torch.zeros_like(real)
    lengths = prompts.lengths.tolist()
    for row, owner in enumerate(reading.owner.tolist()):
        mask[row, _indices(positions, lengths[owner], owner)] = True
    return [mask[..., None]]


def _indices(positions: slice | list[int], length: int, prompt: int) -> list[int]:
    indices = range(length)[positions] if isinstance(positions, slice) else positions
    outside = [index for index in indices if not -length <= index < length]
    if outside or not indices:
        lacking = f"no position {outside[0]}" if outside else "no position in this choice"
        raise ArgumentError(
            f"positions={_label(positions)}: prompt {prompt} has {length} tokens and {lacking}."
        )
    return [index % length for index in indices]


def _label(positions: _Positions) -> str:
    """'all', 'each', '-1', '2:5', '0, 3'."""
    if positions is None or isinstance(positions, str):
        return positions or "all"
    if isinstance(positions, slice):
        bounds = [positions.start, positions.stop, positions.step]
        bounds = bounds if positions.step is not None else bounds[:2]
        return ":".join("" if bound is None else str(bound) for bound in bounds)
    return ", ".join(map(str, positions))
