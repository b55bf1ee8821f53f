"""Points of the cube [0, 1]^S: gates as a user gives them, and the corners g(e_l) and g(1 − e_l).

A point is one gate ε_l for every site l, [site]. A corner is a point whose gates are zeros and
ones: some sites as in the adapted model, all others as in the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core.model import LoraLens, Scale
from lens_lora.errors import ArgumentError

Gates = Scale
Points = Float[Tensor, "point site"]
Corners = Literal["add_one", "leave_one_out"]
# The sites of each corner: a name or a glob, or several of them.
SitesOfCorners = Sequence[str | Sequence[str]] | Mapping[str, str | Sequence[str]]


def points_of(lens: LoraLens, gates: Gates) -> tuple[Points, torch.Size]:
    """The gates as [point, site], and the axes that the points had."""
    tensor = lens.gates(gates)
    return tensor.reshape(-1, tensor.shape[-1]), tensor.shape[:-1]


def one_point(lens: LoraLens, at: Gates) -> Float[Tensor, " site"]:
    """The gates of a single point.

    Raises:
        ArgumentError: several points.
    """
    gates = lens.gates(at)
    if gates.ndim > 1:
        raise ArgumentError(
            f"at holds several points, {tuple(gates.shape[:-1])}",
            remedy="give one, and make a call for each.",
        )
    return gates


def is_differentiated(gates: Tensor) -> bool:
    """Whether a derivative is to pass through these gates, in either mode."""
    is_in_graph = gates.requires_grad and torch.is_grad_enabled()
    return is_in_graph or fwad.unpack_dual(gates).tangent is not None


def strengths(lens: LoraLens, scales: Sequence[float]) -> Points:
    """The points ε·1 at which every site has the same gate ε."""
    return torch.stack([lens.gates(scale) for scale in scales])


def corner_gates(
    lens: LoraLens,
    which: Corners | Gates | None,
    on: SitesOfCorners | None,
    off: SitesOfCorners | None,
) -> Points:
    """The gates of each corner; exactly one of the three says which corners.

    Args:
        lens: the adapter over the model.
        which: 'add_one' or 'leave_one_out', for each site in turn; or the gates themselves.
        on: the sites that are on, for each corner.
        off: the sites that are off, for each corner.

    Raises:
        ArgumentError: none of the three, or more than one of them.
        SiteError: a name or a glob that matches no site.
    """
    _require_one({"which": which, "on": on, "off": off})
    if on is not None:
        return _ones_at(lens, "on", on)
    if off is not None:
        return 1 - _ones_at(lens, "off", off)
    if isinstance(which, str):
        return _each_site(lens, which)
    assert which is not None, "exactly one of the three is given"
    points, _ = points_of(lens, which)
    return points


def _require_one(arguments: Mapping[str, object]) -> None:
    names = [name for name, value in arguments.items() if value is not None]
    if len(names) != 1:
        raise ArgumentError(
            f"corners takes one of which=, on= and off=, and {' and '.join(names) or 'none'} came",
            remedy="for each site in turn: g.corners('leave_one_out').",
        )


def _each_site(lens: LoraLens, which: str) -> Points:
    """The corners e_l for every site l, or 1 − e_l."""
    word("which", which, ("add_one", "leave_one_out"))
    each_site = torch.eye(len(lens.sites), dtype=lens.gate_dtype)
    if which == "leave_one_out":
        each_site = 1 - each_site
    return lens.gates(each_site)


def _ones_at(lens: LoraLens, name: str, corners: SitesOfCorners) -> Points:
    """1 at the sites of each corner, 0 elsewhere."""
    if isinstance(corners, str) or not isinstance(corners, Sequence | Mapping) or not corners:
        raise ArgumentError(
            f"{name}={corners!r}: expected a list with the sites of each corner",
            remedy=f"write {name}=['*.attn.*', ('blocks.0.attn.q', 'blocks.0.attn.k')], say.",
        )
    listed = corners.values() if isinstance(corners, Mapping) else corners
    groups = {str(i): lens.sites.chosen(names) for i, names in enumerate(listed)}
    ones = lens.sites.indicator(groups)
    return lens.gates(ones.to(lens.gate_dtype))
