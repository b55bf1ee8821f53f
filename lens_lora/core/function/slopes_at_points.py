"""∂g/∂ε_l at many points, as many of them in one batch as the bound of the lens has room for.

1. A point is one forward and one backward pass (`reverse.py`). Every row runs once for each point
   of a batch, with the gates of that point.
2. Prompts that are too many for one graph go in groups.
3. By output token, ∂ℓ_t/∂ε_l comes from a covector for each token (`gate_graph.py`).
4. A weighted sum over points, Σ_k w_k ∂g/∂ε_l at ε_k, is what an integral along a path needs. Only
   the slopes of one batch are held, and g at the points comes with them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import gate_graph, memory, reverse
from lens_lora.core.function.corners import Points
from lens_lora.core.function.many_gates import Bar
from lens_lora.core.model import LoraLens
from lens_lora.core.readout import Reading
from lens_lora.errors import ArgumentError


def slopes_at_points(
    lens: LoraLens, reading: Reading, points: Points, axes: tuple[str, ...], *, progress: bool
) -> Float[Tensor, "point batch site *by"]:
    """∂g/∂ε_l at each point, split along the axes; by token on the last axis where asked for."""
    if "token" in axes:
        at_each: list[Tensor] = []
        for point in points:
            slopes = gate_graph.token_slopes(lens, reading, point, axes[:-1], progress=progress)
            at_each.append(slopes)
        return torch.stack(at_each)
    groups: list[Tensor] = []
    for group in memory.graph_groups(lens, reading):
        points_at_once = memory.slopes_at_once(lens, group)
        chunks: list[Tensor] = []
        for some_points in points.split(points_at_once):
            slopes, _ = _in_one_batch(lens, group, some_points, axes)
            chunks.append(slopes)
        groups.append(torch.cat(chunks, 1))
    return reverse.join_groups(groups).movedim(1, 0)


def weighted_slopes(
    lens: LoraLens,
    reading: Reading,
    points: Points,
    weights: Float[Tensor, "*sum point"],
    axes: tuple[str, ...],
    *,
    progress: bool,
) -> tuple[Float[Tensor, "*sum batch site *by"], Float[Tensor, "point batch"]]:
    """Σ_k w_k ∂g/∂ε_l at the points ε_k, summed up one batch after another; and g at the points.

    With several rows of weights there is a sum for each.

    Raises:
        ArgumentError: another number of weights than of points, or slopes by token.
    """
    if not isinstance(weights, Tensor):
        raise ArgumentError(
            f"weights are a {type(weights).__name__}", remedy="give a tensor, one for each point."
        )
    if weights.shape[-1:] != points.shape[:1] or "token" in axes:
        raise ArgumentError(
            f"{tuple(weights.shape)} weights of {len(points)} points, by={axes!r}",
            remedy="give each point of at a weight, and no by='token'.",
        )
    weights_of_sums = weights.to(points).reshape(-1, len(points))
    groups = memory.graph_groups(lens, reading)
    sums_of_groups: list[Tensor] = []
    values_of_groups: list[Tensor] = []
    with Bar("slopes", progress).over(len(points) * len(groups)) as bar:
        for group in groups:
            step = memory.slopes_at_once(lens, group)
            sums = weights_of_sums.new_zeros(())
            values: list[Tensor] = []
            batches = zip(points.split(step), weights_of_sums.split(step, 1), strict=True)
            for some_points, their_weights in batches:
                slopes, some_values = _in_one_batch(lens, group, some_points, axes)
                sums = sums + torch.einsum("bk...,sk->bs...", slopes, their_weights)
                values.append(some_values)
                bar.update(len(some_points))
            sums_of_groups.append(sums)
            values_of_groups.append(torch.cat(values, 1))
    by_sum = reverse.join_groups(sums_of_groups).movedim(1, 0)
    by_point = torch.cat(values_of_groups).T
    return by_sum.reshape(*weights.shape[:-1], *by_sum.shape[1:]), by_point


def _in_one_batch(
    lens: LoraLens, reading: Reading, points: Points, axes: tuple[str, ...]
) -> tuple[Float[Tensor, "batch point site *by"], Float[Tensor, "batch point"]]:
    """Run every row once for each point, in one forward and one backward pass; slopes, and g."""
    repeated = reading
    gates = points[0]
    if len(points) > 1:
        repeated = reading.repeat(len(points))
        # The copies of a row follow one another, so every row has the points in the same order.
        gates = points.repeat(len(reading.owner), 1)
    slopes = reverse.SlopeSums(lens, repeated.rows, axes)
    values = reverse.site_gradients(lens, repeated, gates, slopes.visit)
    batch_and_point = (reading.batch, len(points))
    slopes_by_point = slopes.by_prompt(repeated).unflatten(0, batch_and_point)
    return slopes_by_point, values.unflatten(0, batch_and_point)
