"""The strength ε that a caller gives is turned into gates, one for each site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real as RealNumber

import torch
from jaxtyping import Float, Real
from torch import Tensor

from lens_lora.arguments import number, one_entry
from lens_lora.compat import is_wrapped
from lens_lora.core.model.sites import Site, match_sites
from lens_lora.errors import ArgumentError, SiteError

_Number = float | Real[Tensor, ""]
Scale = _Number | Real[Tensor, "*batch site"] | Mapping[str, _Number]


def gates_of(
    scale: Scale, sites: Sequence[Site], dtype: torch.dtype
) -> Float[Tensor, "*batch site"]:
    """Turn a strength into gates, through which derivatives pass to the tensors that were given.

    Args:
        scale: one number for all sites, one for each, or {site name or glob: number}, others 0.
        sites: all sites.
        dtype: the dtype of the gates.

    Raises:
        SiteError: a name that matches no site, or a tensor without one gate per site.
        ArgumentError: what is no number, tensor or mapping; NaN, infinity, a truth value; a tensor
            that holds no gate.
    """
    if isinstance(scale, Mapping):
        by_site = match_sites(sites, scale)
        gates = torch.stack([_number(by_site.get(i, 0.0), dtype) for i in range(len(sites))])
    elif not isinstance(scale, Tensor) or not scale.ndim:
        gates = _number(scale, dtype).repeat(len(sites))
    elif scale.shape[-1] != len(sites):
        raise SiteError(f"{scale.shape[-1]} gates for {len(sites)} sites: pass one per site.")
    elif not scale.numel():
        raise ArgumentError(
            f"gates of no point, of shape {tuple(scale.shape)}; give at least one gate per site."
        )
    else:
        gates = _real(scale).to(dtype)
    # Within a `torch.func` transform the values are not known.
    if not is_wrapped(gates) and not bool(torch.isfinite(gates.detach()).all()):
        # With NaN a HookedTransformer would drop the attention and return finite logits.
        raise ArgumentError("a gate is NaN or infinite; expected finite numbers.")
    return gates


def gates_of_rows(gates: Float[Tensor, "*given site"], rows: int) -> Float[Tensor, "*row site"]:
    """The gates of all rows, [site], or of each of so many rows, [row, site].

    Args:
        gates: the gates that a caller gave.
        rows: how many rows there are.

    Raises:
        SiteError: gates of another number of rows.
    """
    if gates.ndim == 1:
        return gates
    by_row = gates.flatten(0, -2)
    if len(by_row) == 1:
        return by_row[0]
    require_gates_of_rows(len(by_row), rows)
    return by_row


def require_gates_of_rows(given: int, rows: int) -> None:
    """Refuse gates of another number of rows than there are.

    Args:
        given: the number of rows for which gates were given.
        rows: how many there are.

    Raises:
        SiteError: the two differ.
    """
    if given != rows:
        raise SiteError(
            f"gates of {given} rows, and there are {rows}",
            remedy="pass one gate per site, or for each row one gate per site.",
        )


def _number(value: object, dtype: torch.dtype) -> Float[Tensor, ""]:
    """One number as a tensor; a tensor keeps its graph."""
    if isinstance(value, Tensor) and not value.ndim:
        return _real(value).to(dtype)
    plain = one_entry(value)
    if isinstance(plain, RealNumber):
        return torch.tensor(number("scale", plain), dtype=dtype, device="cpu")
    raise ArgumentError(
        f"a scale of type {type(value).__name__}: expected a number, a tensor with one gate per "
        "site, or {site name or glob: number}."
    )


def _real(gates: Tensor) -> Tensor:
    if gates.is_complex() or gates.dtype == torch.bool:
        raise ArgumentError(f"gates of {gates.dtype}: expected real numbers.")
    return gates
