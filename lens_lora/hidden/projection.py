"""Activations at one hook point, and their projections onto directions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import is_whole, one_entry
from lens_lora.core import (
    ChosenPositions,
    Function,
    LoraLens,
    Positions,
    Prompts,
    Scale,
    ScaleInject,
    rounding_hooks,
    tangent_of,
)
from lens_lora.errors import ModelStateError, PromptError, require_finite
from lens_lora.formats.directions import Directions

_Activation = Float[Tensor, "batch pos *d"]
_Projected = Float[Tensor, "batch feature *pos"]


class FeatureProjection:
    """A function from activations h to d·h, [batch, feature] or [batch, feature, position].

    For several positions it is the mean of d·h; for 'each', every position has its own number.
    """

    def __init__(self, prompts: Prompts, features: Directions, positions: Positions) -> None:
        self._real = prompts.real
        self._features = features
        is_by_position = one_entry(positions) == "each"
        self._counted = None if is_by_position else positions_counted(prompts, positions)

    def __call__(self, h: _Activation) -> _Projected:
        """Project h in float32 or better; by position, padding is NaN."""
        directions = self._features.rows
        wide = torch.promote_types(h.dtype, directions.dtype)
        wide = torch.promote_types(wide, torch.float32)
        directions = directions.to(h.device, wide)
        flat = h.flatten(2).to(wide)
        if self._counted is None:
            return self._by_position(flat @ directions.T)
        # The mean of projections is the projection of the mean.
        return self._mean(flat[self._counted.to(h.device)]) @ directions.T

    def encoded(self, h: _Activation) -> _Projected:
        """The autoencoder's activations, in its own dtype and computed on its own device."""
        encode = self._features.encode
        assert encode is not None, "directions have no autoencoder"
        if not self._features.by_head:
            h = h.flatten(2)
        if self._counted is None:
            return self._by_position(encode(h.to(self._features.rows)).to(h.device))
        tokens = h[self._counted.to(h.device)]
        return self._mean(encode(tokens.to(self._features.rows)).to(h.device))

    def _by_position(self, values: Float[Tensor, "batch pos feature"]) -> Tensor:
        """Make positions the last axis, with NaN at padding."""
        padding = ~self._real.to(values.device)[:, None]
        return values.transpose(1, 2).masked_fill(padding, float("nan"))

    def _mean(self, tokens: Float[Tensor, "token d"]) -> Float[Tensor, "batch d"]:
        """The mean over each prompt's counted tokens, which follow one another."""
        assert self._counted is not None, "a mean is over counted positions"
        counts = self._counted.sum(1)
        prompt_of_token = counts.new_tensor(range(len(counts))).repeat_interleave(counts)
        sums = tokens.new_zeros(len(counts), tokens.shape[1])
        sums = sums.index_add(0, prompt_of_token.to(tokens.device), tokens)
        return sums / counts[:, None].to(tokens)


def positions_counted(prompts: Prompts, positions: Positions) -> Bool[Tensor, "row pos"]:
    """The tokens of each row that a mean over these positions is taken over.

    Without positions these are all tokens except the first, which is a sink.

    Args:
        prompts: the rows.
        positions: positions in any form that `core/readout/positions.py` describes.

    Raises:
        PromptError: a prompt has none of these tokens.
    """
    positions_of_row = ChosenPositions.of(positions)
    counted = torch.zeros(prompts.tokens.shape, dtype=torch.bool)
    starts = prompts.asked_lengths
    for row, length in enumerate(prompts.lengths.tolist()):
        chosen = positions_of_row.mask(length, starts[row])
        if positions is None:
            chosen[0] = False
        if not chosen.any():
            raise PromptError(
                f"positions={positions_of_row}: prompt {row} has {length} tokens and none of these",
                remedy="name tokens that every prompt has; without positions= the first token "
                "is left out, because it is a sink.",
            )
        counted[row, :length] = torch.from_numpy(chosen)
    return counted


def positions_label(positions: Positions) -> int | str:
    """A single index as it is; else the positions in words, such as 'response' or '1:4'."""
    plain = one_entry(positions)
    if is_whole(plain):
        return int(plain)
    return str(ChosenPositions.of(positions))


def activation_at(
    f: Function, name: str, gates: Scale, *, with_noise: bool = False
) -> Float[Tensor, "batch pos *d"]:
    """The activation at one hook point, from one forward pass without the unembedding.

    Prompts run in groups if all of them together exceed the memory bound of the lens.

    Args:
        f: the function, whose rows are run.
        name: the hook point.
        gates: the gates of the pass.
        with_noise: whether noise of about one rounding is added to the residual stream.

    Raises:
        ModelStateError: the point does not fire, or has no activation by position.
        NumericsError: an activation is not finite.
    """
    write = ScaleInject(f.lens.plan, f.lens.gates(gates))

    def of_group(group: Function) -> _Activation:
        def run(hooks: AbstractContextManager[None]) -> None:
            under = _with_noise(f.lens, hooks) if with_noise else hooks
            group.passes.observe(write, under=under, logits=False)

        return _kept(group, name, torch.clone, run)

    return in_groups(f, f.passes.rows_at_once(logits=False), of_group)


@contextlib.contextmanager
def _with_noise(lens: LoraLens, hooks: AbstractContextManager[None]) -> Generator[None]:
    with lens.hooked(rounding_hooks(lens)), hooks:
        yield


def tangent_at(
    f: Function, name: str, direction: Scale, at: Scale
) -> Float[Tensor, "batch pos *d"]:
    """The tangent of the activation at one hook point, from one dual forward pass.

    Args:
        f, name: as for `activation_at`.
        direction: the direction of the gates along which the tangent is taken.
        at: the gates at which it is taken.

    Raises:
        ModelStateError, NumericsError: as for `activation_at`.
    """

    def of_group(group: Function) -> _Activation:
        def run(hooks: AbstractContextManager[None]) -> None:
            group.passes.observe_tangents(direction, at, under=hooks)

        return _kept(group, name, tangent_of, run)

    return in_groups(f, f.passes.rows_at_once("dual", logits=False), of_group)


def in_groups(f: Function, rows_at_once: int, run: Callable[[Function], Tensor]) -> Tensor:
    """Run the rows in groups of this size, and join the results.

    Args:
        f: the function of all rows.
        rows_at_once: the size of a group.
        run: a function of one group, whose result has the group's rows as its first axis.
    """
    groups: list[Tensor] = []
    for first in range(0, f.rows.batch, rows_at_once):
        end = min(first + rows_at_once, f.rows.batch)
        group = f.of_rows(f.rows.cut(first, end))
        groups.append(run(group))
    return torch.cat(groups)


def _kept(
    f: Function,
    name: str,
    keep: Callable[[Tensor], Tensor],
    run: Callable[[AbstractContextManager[None]], None],
) -> _Activation:
    """Run one pass under a hook, and return what `keep` makes of a point's last firing."""
    firings: list[Tensor] = []

    def hook_fn(tensor: Any, hook: Any) -> None:
        del hook
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            firings.append(keep(tensor))

    run(f.lens.hooked([(name, hook_fn)]))
    return _last(firings, name, f.rows)


def _last(firings: Sequence[Tensor], name: str, prompts: Prompts) -> _Activation:
    """The last of the activations, which must be by prompt and position.

    Raises:
        ModelStateError: there is none, or it is not by position.
        NumericsError: an activation is not finite.
    """
    if not firings:
        raise ModelStateError(
            f"{name}: the hook point exists but no activation passes it in a forward pass; a flag "
            "of the model or its class bypasses it. Name another point."
        )
    activation = firings[-1]
    if activation.ndim < 3 or activation.shape[:2] != prompts.tokens.shape:
        raise ModelStateError(
            f"{name} holds a tensor {tuple(activation.shape)} for {tuple(prompts.tokens.shape)} "
            "tokens, which is no activation by prompt and position."
        )
    require_finite(activation[prompts.real], f"the activation at {name}, or its tangent,")
    return activation
