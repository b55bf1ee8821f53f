"""Real interventions on activations, which are set to those of the other model at a hook point.

    base to adapted   g(1) − g(1 | h ← h of base)       what is lost when h is set back
    adapted to base   g(0 | h ← h of adapted) − g(0)    what h alone brings to the base model

1. The activation h comes from the other model, the donor, which runs once. The recipient runs once
   for each patch, as rows of a batch. A patch is at one hook point, or at one head of q, k, v or z
   there, and at one position, several, or all of them (`function/interventions.py`).
2. In an adapted recipient the updates stay live: a patch at or before a site's input changes its δ,
   and a patch at its output replaces W z + δ, as in a model with merged weights.
3. Points without an effect are tried with noise. If noise has no effect either, the model ignores
   what a hook does there, and the call raises an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core.analyses.own_analyses import analysis
from lens_lora.core.function import interventions, recording
from lens_lora.core.function.function import Function
from lens_lora.core.model import Names
from lens_lora.core.readout import Prompts, Reading
from lens_lora.core.readout.positions import ChosenPositions, Positions
from lens_lora.core.results.base import Entries, Ranked
from lens_lora.core.results.effects import patching_result
from lens_lora.core.results.tables import long_table, tokens_at
from lens_lora.errors import ArgumentError, ModelStateError, first_few

Direction = Literal["base_to_adapted", "adapted_to_base"]
# The gates of the donor, and the gates of the recipient.
_DONOR_AND_RECIPIENT = {"base_to_adapted": (0.0, 1.0), "adapted_to_base": (1.0, 0.0)}
_IN_BLOCK = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<hook>.+)")
# If an effect is below a thousandth of the shift, or below 64 roundings of the readout, it may be
# none at all, and the point is tried with noise.
_SMALL = 1e-3
_ROUNDINGS = 64


@final
class ActivationEffects(Ranked):
    """The effect on a readout of replacing one activation by the other model's, in its units.

    `plot` is hook point × position, or layer × hook point, or layer × head.

    Attributes:
        values: [batch, name], or [batch, name, position] if each position was patched alone, with
            NaN where a prompt has no such position. They are positive if the adapted model's
            activation raises the readout.
        names: hook points; or, if each head was patched alone, 'blocks.3.attn.hook_z[5]', where k
            and v have the heads of keys and values.
        direction: 'base_to_adapted' for g(1) − g(patched), or 'adapted_to_base' for g(patched) −
            g(0).
        positions: the positions that were patched: 'all', 'each', or indices, together.
        noise_floor: [batch], σ of an effect from rounding alone; None if it was not measured.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch name *position"]
    names: Annotated[tuple[str, ...], "name"]
    direction: str
    positions: str
    noise_floor: Float[Tensor, " batch"] | None = None

    @property
    def share(self) -> Float[Tensor, "batch name *position"]:
        """The effects as shares of the shift, 1 if the activation carries all of it."""
        return self.share_of(self.values)

    @property
    def by_position(self) -> bool:
        """Whether each position was patched alone."""
        return self.values.ndim == 3

    @property
    def places(self) -> tuple[tuple[int | None, str], ...]:
        """Each name as layer and rest, such as (3, 'hook_resid_pre'); None outside the blocks."""
        places: list[tuple[int | None, str]] = []
        for name in self.names:
            match = _IN_BLOCK.fullmatch(name)
            if match is None:
                places.append((None, name))
            else:
                places.append((int(match["layer"]), match["hook"]))
        return tuple(places)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, hook point (or head) and position that exists: effect and share."""
        axes: list[dict[str, Any]] = [{"prompt": range(len(self.values))}, self._labels]
        if self.by_position:
            axes.append({"position": range(self.values.shape[2])})
        frame = long_table({"value": self.values, "share": self.share}, *axes)
        frame = frame.dropna(subset="value", ignore_index=True)
        if self.by_position:
            frame.insert(5, "token", tokens_at(self.str_tokens, frame["prompt"], frame["position"]))
        return frame

    @property
    def _labels(self) -> dict[str, Any]:
        layers = [layer for layer, _ in self.places]
        hooks = [hook for _, hook in self.places]
        return {"point": self.names, "layer": pd.array(layers, dtype="Int64"), "hook": hooks}

    def entries(self, prompt: int | None = None) -> Entries:
        """The effect of each hook point, or of each of its positions."""
        values, shift = self.of_prompt(prompt)
        if not self.by_position:
            return Entries({"point": self.names}, values, shift, "value")
        count, width = values.shape
        tokens = self.str_tokens[self.only_prompt(prompt)]
        padded_tokens = [*tokens, *[""] * (width - len(tokens))]
        labels = {
            "point": [name for name, _ in itertools.product(self.names, range(width))],
            "position": [*range(width)] * count,
            "token": padded_tokens * count,
        }
        return Entries(labels, values.flatten(), shift, "value")

    def of_prompt(
        self, prompt: int | None
    ) -> tuple[Float[Tensor, " name *position"], Float[Tensor, ""]]:
        """The effects and the shift of one prompt, or their means over prompts, in float64.

        Args:
            prompt: an index; without it, the mean over prompts. By position there is no mean, and
                the only prompt is taken.

        Raises:
            ArgumentError: no such prompt; or by position several prompts, and none is named.
        """
        if self.by_position:
            prompt = self.only_prompt(prompt, "positions")
        return self.mean_over(prompt, self.values)

    def to_patching_result(self) -> Any:
        """The effects as TransformerLens's `PatchingResult`, with its standard errors and p-values.

        Its `values` are the patched readout, [name, batch] or [name, pos, batch] (NaN where a
        prompt has no such position), and its `baseline` is the readout before. So its `effect()` is
        `values` here from adapted to base, and minus `values` from base to adapted, and its
        `normalized(…)` by the readout at the other end is `share`.

        Raises:
            LensLoraError: the installed transformer-lens has no such class (4.3 has).
        """
        # TransformerLens calls a hook point "name".
        index = pd.DataFrame(self._labels).rename(columns={"point": "name"})
        axes: list[str] = []
        if self.by_position:
            positions = pd.DataFrame({"pos": range(self.values.shape[2])})
            index = index.merge(positions, how="cross")
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
    """Replace one activation by the other model's, at each hook point: the shift that it carries.

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
            index, a slice, or indices, replaced together, which count within each prompt, negative
            ones from its own end; 'prompt', or 'response' for the tokens after the prompt, those of
            a response or of an answer, which are in None and 'each' as well.
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
    chosen = _chosen_positions(positions)
    by_head = heads is not None and bool(word("heads", heads, ["each"]))
    lens = g.lens
    rows = g.reading.rows
    masks = _masks(chosen, g.prompts, g.reading)

    named = lens.points(names).computed()
    recorded = recording.record(lens, rows, donor_scale, named.wanted, named.in_full)
    points = named.fired(recorded.firings)
    if chosen.which is not None:
        points = recording.positioned(lens, rows, recorded, points, named.in_full, donor_scale)
    if by_head:
        places = _places_of_heads(recording.head_parts(lens, recorded, points))
    else:
        places = [_Place(point, point, None) for point in points]
    donor = interventions.Donor(recorded, donor_scale)
    patched = _patched(g, scale, donor, places, masks)

    base, adapted = g.ends[..., None, None]
    values = adapted - patched if direction == "base_to_adapted" else patched - base
    _require_heard(g, scale, [place.point for place in places], values)
    return ActivationEffects(
        values=_by_position(values, chosen, g.reading),
        names=tuple(place.label for place in places),
        direction=direction,
        positions=str(chosen),
        noise_floor=g.noise((1.0, -1.0), at=scale),
        **g.header(),
    )


class _Place(NamedTuple):
    """Where activations are replaced.

    Attributes:
        label: its name in the result, such as 'blocks.3.attn.hook_z[5]'.
        point: the hook point.
        features: the mask of the features of one head; None for all features.
    """

    label: str
    point: str
    features: Tensor | None


def _places_of_heads(heads_of: Mapping[str, Sequence[Tensor]]) -> list[_Place]:
    """A place for each head of each point, in order.

    Args:
        heads_of: the features of each head, by hook point.
    """
    places: list[_Place] = []
    for point, heads in heads_of.items():
        for head, features in enumerate(heads):
            places.append(_Place(f"{point}[{head}]", point, features))
    return places


def _patched(
    g: Function,
    scale: float,
    donor: interventions.Donor,
    places: Sequence[_Place],
    masks: Sequence[Bool[Tensor, "row pos 1"] | None],
) -> Float[Tensor, "batch place mask"]:
    """The recipient's readout, with each place patched under each mask by the donor's activations.

    Args:
        g: the function.
        scale: the gates of the recipient.
        donor: the run that the activations come from.
        places: where activations are replaced.
        masks: the positions that are replaced together; None for all of them.
    """
    patches: list[interventions.Patch] = []
    for place, mask in itertools.product(places, masks):
        patches.append(interventions.Patch(place.point, _both(place.features, mask)))
    by_patch = interventions.patched_readout(
        g.lens, g.reading, donor, patches, scale=scale, progress=g.progress
    )
    return by_patch.unflatten(1, (len(places), len(masks)))


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The entries that are in both masks, where None stands for all entries."""
    if one is None:
        return other
    return one if other is None else one & other


def _require_heard(
    g: Function, scale: float, points: Sequence[str], values: Float[Tensor, "batch place position"]
) -> None:
    """Refuse points at which the model ignores what a hook does.

    Args:
        g: the function.
        scale: the gates of the recipient.
        points: the hook point of each place.
        values: the effects.

    Raises:
        ModelStateError: there is such a point.
    """
    ends = g.ends
    rounding = _ROUNDINGS * g.lens.eps * float(ends.abs().max())
    largest_shift = float((ends[1] - ends[0]).abs().max())
    least = max(_SMALL * largest_shift, rounding)
    has_effect = (values.abs().amax((0, 2)) > least).tolist()
    heard = set(itertools.compress(points, has_effect))
    doubtful = [point for point in dict.fromkeys(points) if point not in heard]
    if not doubtful:
        return
    silent = interventions.unheard(g.lens, g.rows.row(0), scale, doubtful)
    if silent:
        raise ModelStateError(
            f"{first_few(silent)}: the hook point fires, but the model ignores what a hook "
            "makes of its value, so a patch there says nothing; leave it out."
        )


# --- Positions


def _by_position(
    values: Float[Tensor, "batch place position"], positions: ChosenPositions, reading: Reading
) -> Float[Tensor, "batch place *position"]:
    """The effects of each position, or of all positions that were replaced together.

    An effect is NaN where no row of a prompt has the position.
    """
    if positions.which != "each":
        return values[..., 0]
    is_real = reading.rows.real.float()
    some_row_has_it = reading.by_prompt(is_real).to(values.device) > 0
    return values.masked_fill(~some_row_has_it[:, None], float("nan"))


def _chosen_positions(positions: object) -> ChosenPositions:
    """Check a caller's positions, of which there must be at least one."""
    if isinstance(positions, Sequence) and not positions:
        raise ArgumentError(f"positions={positions!r}: there is no position in this choice.")
    return ChosenPositions.of(positions)


def _masks(
    positions: ChosenPositions, prompts: Prompts, reading: Reading
) -> list[Bool[Tensor, "row pos 1"] | None]:
    """The masks of the patches, one for each number of the result; None for the whole sequence.

    Raises:
        ArgumentError: a position outside a prompt.
    """
    if positions.which is None:
        return [None]
    real = reading.rows.real.cpu()
    if positions.which == "each":
        slots = torch.arange(real.shape[1])
        return [(real & (slots == slot))[..., None] for slot in slots]
    mask = torch.zeros_like(real)
    starts = prompts.asked_lengths
    # Indices count within the prompt; 'response' names what comes after it in the row.
    is_by_name = isinstance(positions.which, str)
    of_prompts = prompts.lengths.tolist()
    of_rows = reading.rows.lengths.tolist()
    for row, prompt in enumerate(reading.owner.tolist()):
        length = of_rows[row] if is_by_name else of_prompts[prompt]
        _require_within(positions, length, starts[prompt], prompt)
        mask[row, :length] = torch.from_numpy(positions.mask(length, starts[prompt]))
    return [mask[..., None]]


def _require_within(positions: ChosenPositions, length: int, start: int, prompt: int) -> None:
    """Check that a row of this length, whose response begins at `start`, has the positions."""
    if isinstance(positions.which, tuple):
        lacking = [index for index in positions.which if not -length <= index < length]
        if not lacking:
            return
        fact = f"no position {lacking[0]}"
    elif positions.mask(length, start).any():
        return
    else:
        fact = "no position in this choice"
    raise ArgumentError(f"positions={positions}: prompt {prompt} has {length} tokens and {fact}.")
