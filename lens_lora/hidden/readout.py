"""A readout inside the model: the projection of a hook point on a direction.

    g(ε) = mean over tokens of  h_name(ε) · d  (+ b)

with h the activation at the hook point, d a direction in its space, and b the bias of an
autoencoder's encoder. It is a readout like any other, so every analysis that takes a readout
answers "which module moved this?" of a persona, a refusal, a probe or a feature.

1. Sites that write after the point cannot move it. One pass of a few tokens finds the sites that
   write before it. For those in the point's own block, one pass each shows whether the point
   depends on them, because attention and MLP may be parallel. g is a function of the modules that
   can move the point.
2. A pass ends at the point: nothing after it is run (`core/function/forward.py`).
3. A feature of an autoencoder is read as its pre-activation, which is linear in h. With
   `activated=True` it is read by the autoencoder's own `encode`, including its threshold. If a
   feature is off, nothing moves its activation to first order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora import guesses
from lens_lora.core import (
    AtPoint,
    ChosenPositions,
    LogitFunction,
    LoraLens,
    Positions,
    Prompts,
    Reading,
    Readout,
)
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.directions import Directions, directions_of, setting_of
from lens_lora.hidden.projection import positions_counted

# The length of the pass that shows which sites write before the point.
_TRIED_TOKENS = 4


@guesses.fitting_class
@dataclasses.dataclass(frozen=True, eq=False)
class Projection(Readout):
    """The projection of the activation at a hook point on a direction, averaged over tokens.

        >>> refusal = ll.contrast(lens, refused, answered, point)       # doctest: +SKIP
        >>> ll.first_order(lens, prompts, ll.Projection(refusal, point))  # doctest: +SKIP

    Sites that write after the point cannot move it, and are not listed in results. A pass ends at
    the point. First order is by reverse mode.

    Attributes:
        direction: one direction: a tensor [d], `{label: [d]}`, a Contrast, or an autoencoder with
            the index of a feature, (sae, 123).
        name: the hook point, such as 'blocks.12.hook_resid_post'.
        positions: the tokens that the mean is over: None for all tokens except the first, which is
            a sink; 'prompt', 'response', an index, a slice, or indices.
        activated: whether to read an autoencoder's own activation in place of the pre-activation.
    """

    direction: Any
    name: str
    positions: Positions = None
    activated: bool = False

    def __post_init__(self) -> None:
        """Refuse several directions, and positions that give more than one number."""
        if not isinstance(self.activated, bool):
            raise ArgumentError(f"activated={self.activated!r}: expected True or False.")
        if ChosenPositions.of(self.positions).which == "each":
            raise ArgumentError(
                "positions='each' gives a number for every token, and a readout is one number",
                remedy="name tokens, or split the result: first_order(…, by='position').",
            )
        directions = self._directions
        if len(directions.rows) != 1:
            raise ArgumentError(
                f"Projection takes one direction, and these are {len(directions.rows)}",
                remedy="make a Projection of each, or pick one: (autoencoder, index).",
            )
        if self.activated and directions.encode is None:
            raise ArgumentError(
                "activated=True is the activation of an autoencoder with a method encode",
                remedy="pass (autoencoder, index), or leave activated out.",
            )

    @property
    def units(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unit of the projection."""
        return "activation" if self.activated else self._directions.units

    @property
    def label(self) -> str:
        """The readout in words: what it reads, where, and over which tokens.

        Such as 'the projection on the direction at blocks.12.hook_resid_post'.
        """
        (name,) = self._directions.names
        # A contrast calls its directions by the points at which they were found.
        direction = "the contrast" if name == self.name else name
        tokens = ""
        if self.positions is not None:
            tokens = f", positions {ChosenPositions.of(self.positions)}"
        read = "activation of" if self.activated else "projection on"
        return f"the {read} {direction} at {self.name}{tokens}"

    @property
    def _directions(self) -> Directions:
        return directions_of(self.direction, self.name)

    def reaching(self, f: LogitFunction) -> LogitFunction:
        """The function f of only those modules that can move the point.

        Raises:
            SiteError: no such hook point.
            ModelStateError: nothing passes the point, several tensors do, or no site is before it.
        """
        lens: LoraLens = f.lens
        lens.known_point(self.name)
        before = modules_before(lens, f.prompts, self.name)
        if not before:
            raise ModelStateError(
                f"{self.name}: every adapted module writes after this hook point, or in parallel "
                "to it, so the adapter does not move it",
                remedy="name a later point.",
            )
        if len(before) == len(lens.adapter.modules):
            return f
        return f.over(lens.with_adapter(lens.adapter.only(*before)))

    def reading(self, model: Any, prompts: Prompts) -> Reading:
        """The rows of the prompts, each read at the point."""
        del model
        return self._reading(prompts, frozenset())

    def reading_beside(self, f: LogitFunction) -> Reading:
        """The same rows, with the names of the sites of f that cannot move the point.

        These are parts of a fused module, another part of which can.
        """
        lens: LoraLens = f.lens
        moving = set(sites_that_move(lens, f.prompts, self.name))
        unmoved = [site.name for index, site in enumerate(lens.sites) if index not in moving]
        return self._reading(f.prompts, frozenset(unmoved))

    def _reading(self, prompts: Prompts, unmoved: frozenset[str]) -> Reading:
        counted = positions_counted(prompts, self.positions)
        return Reading.one_row_each(prompts, AtPoint(self.name, self._value(), counted, unmoved))

    def _value(self) -> Callable[[Float[Tensor, "row pos d"]], Float[Tensor, "row pos"]]:
        """The number of each token."""
        directions = self._directions
        if self.activated:
            encode = directions.encode
            assert encode is not None, "checked when the readout was made"

            def activation(h: Tensor) -> Tensor:
                return encode(h.to(directions.rows))[..., 0].to(h)

            return activation
        direction = directions.rows[0]
        offset = _offset(self.direction, directions)
        width = len(direction)

        def projection(h: Tensor) -> Tensor:
            if h.shape[-1] != width:
                raise ArgumentError(
                    f"{self.name} holds {h.shape[-1]} numbers per token, and the direction has "
                    f"{width}",
                    remedy="pass a direction of this hook point's space.",
                )
            return h @ direction.to(h) + offset

        return projection


def _offset(source: Any, directions: Directions) -> float:
    """The constant that an autoencoder's pre-activation adds to h · d.

    It is the encoder's bias, minus b_dec · d if the autoencoder subtracts b_dec from its input.

    Raises:
        ArgumentError: the autoencoder's own `encode` gives an active feature another value.
    """
    if directions.kind != "encoder":
        return 0.0
    autoencoder = source[0] if isinstance(source, tuple) else source
    _, index = directions.labels[0]
    direction = directions.rows[0]
    offset = 0.0
    bias = getattr(autoencoder, "b_enc", None)
    if isinstance(bias, Tensor):
        offset = float(bias.detach().flatten()[index])
    subtracted = getattr(autoencoder, "b_dec", None)
    subtracts = setting_of(getattr(autoencoder, "cfg", None), "apply_b_dec_to_input")
    if isinstance(subtracted, Tensor) and subtracts:
        offset -= float(subtracted.detach().to(direction) @ direction)
    _require_own_activation(directions, offset)
    return offset


# Pre-activations at which a feature is compared with the autoencoder's own `encode`.
_ACTIVE = (10.0, 100.0)
# The largest relative difference between the two; autoencoders may compute in bfloat16.
_TOLERANCE = 1e-3


def _require_own_activation(directions: Directions, offset: float) -> None:
    """Refuse an autoencoder in which the activation of an active feature is not h · d + b."""
    if directions.encode is None or directions.by_head:
        return
    direction = directions.rows[0]
    for size in _ACTIVE:
        h = direction * (size - offset) / (direction @ direction)
        with torch.no_grad():
            own = float(directions.encode(h[None, None])[0, 0, 0])
        if own != 0 and abs(own - size) > _TOLERANCE * size:
            raise ArgumentError(
                f"feature {directions.labels[0][1]} of this autoencoder is {own:.4g} where h · d "
                f"plus its bias is {size:.4g}, so its pre-activation is computed in another way",
                remedy="use activated=True, which runs the autoencoder itself.",
            )


def modules_before(lens: LoraLens, prompts: Prompts, name: str) -> list[str]:
    """The adapter's modules that have a site which can move the point.

    Cost and errors are those of `sites_that_move`.

    Args:
        lens: the adapter over the model.
        prompts: the rows; the beginning of the first one is run.
        name: the hook point.
    """
    moving = sites_that_move(lens, prompts, name)
    keys = {lens.updates[site].site.key for site in moving}
    return [key for key in lens.adapter.modules if key in keys]


def sites_that_move(lens: LoraLens, prompts: Prompts, name: str) -> list[int]:
    """The sites that can move the activation at a hook point.

    They write before it, and it depends on their outputs: in the point's own block a site may write
    before it into another branch, such as k before q, or attention in parallel to an MLP. A site of
    an earlier block reaches every later point through the residual stream.

    Cost: one pass of a few tokens, and one for each site that writes before the point in its block.

    Args:
        lens: the adapter over the model.
        prompts: the rows; the beginning of the first one is run, and lengthened if it is short.
        name: the hook point.

    Raises:
        ModelStateError: nothing passes the point, or several tensors do in one pass.
    """
    few = _few_tokens(lens, prompts)
    plain = _pass_by_point(lens, few, name)
    own_block = name.split(".")[1] if name.startswith("blocks.") else ""
    moving: list[int] = []
    for site in plain.sites_before:
        if str(lens.sites[site].layer) != own_block:
            moving.append(site)
            continue
        noisy = _pass_by_point(lens, few, name, noisy_site=site)
        if not torch.equal(noisy.activation, plain.activation):
            moving.append(site)
    return moving


def _few_tokens(lens: LoraLens, prompts: Prompts) -> Prompts:
    """The beginning of the first prompt; a short one is lengthened by tokens of other ids.

    A single token attends only to itself, and equal tokens have equal values. So on such a prompt
    changes of q and k may have no effect, although they have one on other prompts.
    """
    beginning = prompts.row(0).tokens[:, :_TRIED_TOKENS]
    missing = _TRIED_TOKENS - beginning.shape[1]
    steps = torch.arange(1, missing + 1, device=beginning.device)
    following = (beginning[:, -1:] + steps) % int(lens.model.cfg.d_vocab)
    tokens = torch.cat([beginning, following], 1)
    return Prompts(tokens, torch.full_like(prompts.lengths[:1], _TRIED_TOKENS))


@dataclasses.dataclass(frozen=True, eq=False)
class _PassByPoint:
    """A hook point in one forward pass of the base.

    Attributes:
        activation: the activation at the point.
        sites_before: the sites that write before it, in order.
    """

    activation: Float[Tensor, "row token *d"]
    sites_before: list[int]


def _pass_by_point(
    lens: LoraLens, few: Prompts, name: str, noisy_site: int | None = None
) -> _PassByPoint:
    """Run the base once, and watch a hook point and the sites that write before it.

    Args:
        lens: the adapter over the model.
        few: the rows.
        name: the hook point.
        noisy_site: a site to whose output noise of its own size is added.

    Raises:
        ModelStateError: nothing passes the point, or several tensors do in one pass, or what passes
            it is not by row and token.
    """
    injections = lens.injections
    written: list[int] = []
    written_before: list[int] = []
    activations: list[Any] = []

    def note_site(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        del z
        site = injections[index].site
        written.append(site)
        return _plus_noise(out) if site == noisy_site else None

    def note_activation(activation: Any, hook: Any) -> None:
        del hook
        activations.append(activation)
        written_before.extend(written)

    with torch.no_grad(), lens.injected(note_site), lens.hooked([(name, note_activation)]):
        lens.run(few)
    _require_one_by_token(activations, name)
    # A site that adds at several places has written several times.
    sites_before = list(dict.fromkeys(written_before))
    return _PassByPoint(activations[0].clone(), sites_before)


def _require_one_by_token(activations: Sequence[Any], name: str) -> None:
    """Refuse a point unless one tensor [row, token, …] passes it in a forward pass.

    Args:
        activations: what passed the point in one pass.
        name: the hook point.
    """
    if not activations:
        fact = "no activation passes it"
    elif len(activations) > 1:
        fact = f"it fires {len(activations)} times a pass"
    elif not isinstance(activations[0], Tensor):
        fact = f"a {type(activations[0]).__name__} passes it"
    elif activations[0].ndim < 3:
        fact = f"what passes it has the shape {list(activations[0].shape)}, not [row, token, …]"
    else:
        return
    raise ModelStateError(
        f"{name}: {fact}, and a projection reads one activation of every token",
        remedy="name another hook point, such as 'blocks.0.hook_resid_post'.",
    )


def _plus_noise(out: Tensor) -> Tensor:
    """The tensor and normal noise of its own size, different at every token and every entry."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out.shape, generator=generator, dtype=torch.float32, device="cpu")
    size = out.detach().float().square().mean().sqrt() + 1
    return out + (noise.to(out.device) * size).to(out.dtype)
