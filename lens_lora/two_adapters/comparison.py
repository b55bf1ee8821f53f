"""The result of a comparison of two adapters, and what is worked out from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import OfSites, Pictured, Site, Sites
from lens_lora.correlation import correlation
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.two_adapters.shift_products import cosine_of

_QUANTILES = [0.025, 0.5, 0.975]
# Two adapters are said to begin alike if what they read overlaps by at least this much, …
_READ_ALIKE = 0.5
# … and what they write, and what random directions read, by at most this share of that.
_OTHERS_APART = 0.5


@final
class AdapterComparison(OfSites, Pictured):
    """Two adapters compared with one another, and with random directions.

    `plot` is the cosine of ΔW, layer × kind of module.

    Attributes:
        names: the two adapters' names.
        only: sites that the first adapter alone adapts, and those that the second alone does.
        norms: [adapter, site], ‖ΔW‖_F of the shared sites.
        rest: [adapter], √Σ‖ΔW‖² over the sites that the adapter alone adapts.
        inner: [site], ⟨ΔW, ΔW′⟩.
        read, write: [site, angle], cosines of the principal angles between what both read and what
            both write, the largest first; NaN beyond a site's own angles.
        null_inner: [draw, site]; null_read, null_write: [draw, site], overlaps.
        function: [kind, pair, batch], vᵀFv′, vᵀFv and v′ᵀFv′ of the first-order shifts, then of
            the exact ones. A token that an earlier prompt has after the same tokens is left out.
            The batch is empty where there are no prompts.
        null_function: [kind, draw, pair, batch], the same with random directions in place of the
            second adapter.
        effects: [adapter, batch, shared site], first order; null_effects: [draw, batch, site].
        readout: the readout of the effects; '' without one.
        draws, seed: how many random directions, and their seed.
        sites, meta: the sites that both adapt, and the first adapter's `meta`; see `OfSites`.
    """

    names: tuple[str, str]
    only: tuple[tuple[Site, ...], tuple[Site, ...]]
    norms: Float[Tensor, "2 site"]
    rest: Float[Tensor, " 2"]
    inner: Float[Tensor, " site"]
    read: Float[Tensor, "site angle"]
    write: Float[Tensor, "site angle"]
    null_inner: Float[Tensor, "draw site"]
    null_read: Float[Tensor, "draw site"]
    null_write: Float[Tensor, "draw site"]
    function: Float[Tensor, "kind=2 pair=3 batch"]
    null_function: Float[Tensor, "kind=2 function_draw pair=3 batch"]
    effects: Float[Tensor, "2 read_prompt site"]
    null_effects: Float[Tensor, "effect_draw read_prompt site"]
    readout: str
    draws: Annotated[int, "draw"]
    seed: int

    @property
    def cosines(self) -> Float[Tensor, " site"]:
        """The cosine of ΔW and ΔW′ at each shared site."""
        return self.inner / self.norms.prod(0)

    @property
    def cosine(self) -> float:
        """The cosine over all sites: Σ⟨ΔW, ΔW′⟩ / √(Σ‖ΔW‖² Σ‖ΔW′‖²).

        A site of one adapter alone counts in that adapter's norm.
        """
        return float(self.inner.sum() / self._sizes.prod())

    @property
    def read_overlap(self) -> Float[Tensor, " site"]:
        """Mean squared cosine of the principal angles of what is read: 1 for one space."""
        return self.read.square().nanmean(1)

    @property
    def write_overlap(self) -> Float[Tensor, " site"]:
        """Mean squared cosine of the principal angles of what is written: 1 for one space."""
        return self.write.square().nanmean(1)

    @property
    def begin_alike(self) -> bool:
        """Whether what both read overlaps and what they write does not, as if they began alike.

        Adapters of one seed share A, which training moves little: their reading overlaps whatever
        they were taught, and says nothing of what they do.
        """
        read = float(self.read_overlap.nanmean())
        write = float(self.write_overlap.nanmean())
        by_chance = float(self.null_read.nanmean()) if self.draws else 0.0
        are_others_apart = max(write, by_chance) <= _OTHERS_APART * read
        return read >= _READ_ALIKE and are_others_apart

    @property
    def note(self) -> str:
        """A caution where what is read overlaps and what is written does not; else ''."""
        if not self.begin_alike:
            return ""
        read = float(self.read_overlap.nanmean())
        write = float(self.write_overlap.nanmean())
        return (
            f"The spaces that they read overlap by {read:.2f}, as of adapters that were "
            "initialised from one seed: both began with the same A, which training moves little. "
            "So neither this overlap nor the cosine of ΔW says what they were taught. The spaces "
            f"that they write overlap by {write:.2f}."
        )

    def angles(self, site: str) -> pd.DataFrame:
        """Principal angles of one site, in degrees: what both read, and what both write.

        Args:
            site: its name.

        Raises:
            ArgumentError: no shared site of this name.
        """
        try:
            index = Sites(self.sites).one(site)
        except SiteError as error:
            raise ArgumentError(
                f"{site!r} is no site that both adapters adapt; see .sites."
            ) from error
        degrees = {
            "read": torch.rad2deg(self.read[index].acos()).tolist(),
            "write": torch.rad2deg(self.write[index].acos()).tolist(),
        }
        return pd.DataFrame(degrees).dropna(how="all")

    def summary(self) -> pd.DataFrame:
        """One row per number, with its quantiles for the second adapter in random directions."""
        null_cosines = self.null_inner.nansum(1) / self._sizes.prod()
        read = float(self.read_overlap.nanmean())
        write = float(self.write_overlap.nanmean())
        table = {
            "cosine of ΔW": _with_quantiles(self.cosine, null_cosines.tolist()),
            "overlap of what is read": _with_quantiles(read, self.null_read.nanmean(1).tolist()),
            "overlap of what is written": _with_quantiles(
                write, self.null_write.nanmean(1).tolist()
            ),
        }
        if self.function.shape[-1]:
            cosines = cosine_of(self.function).tolist()
            nulls = cosine_of(self.null_function).tolist()
            for kind, name in enumerate(("first order", "exact")):
                table[f"cosine under F, {name}"] = _with_quantiles(cosines[kind], nulls[kind])
        if self.readout:
            first, second = self.effects
            for name, ranked in (("pearson", False), ("spearman", True)):
                correlation_of_both = _mean_correlation(first, second, ranked=ranked)
                of_nulls = [
                    _mean_correlation(first, null, ranked=ranked) for null in self.null_effects
                ]
                table[f"effects by site, {name}"] = _with_quantiles(correlation_of_both, of_nulls)

        columns = ["value", *(f"null {q:.1%}" for q in _QUANTILES)]
        return pd.DataFrame.from_dict(table, orient="index", columns=columns).rename_axis("number")

    def to_frame(self) -> pd.DataFrame:
        """One row per site; a site of one adapter alone names that adapter, and has no numbers."""
        numbers = {
            "cosine": self.cosines,
            "null_std": self._null_std,
            "read_overlap": self.read_overlap,
            "write_overlap": self.write_overlap,
            "null_read": self.null_read.mean(0),
            "null_write": self.null_write.mean(0),
            "norm": self.norms[0],
            "other_norm": self.norms[1],
        }
        shared = _labelled(self.sites, "both")
        for name, values in numbers.items():
            shared[name] = values.tolist()
        frames = [shared]
        for sites, name in zip(self.only, self.names, strict=True):
            if sites:
                frames.append(_labelled(sites, name))
        return pd.concat(frames, ignore_index=True)

    def by_prompt(self) -> pd.DataFrame:
        """One row per prompt: both cosines under F.

        NaN for a prompt with which an earlier one begins, as all its tokens were counted there.
        """
        count = self.function.shape[-1]
        rows = [cosine_of(self.function, prompt).tolist() for prompt in range(count)]
        return pd.DataFrame(rows, columns=pd.Index(["first order", "exact"]))

    @property
    def _sizes(self) -> Float[Tensor, " 2"]:
        """‖ΔW‖ of each adapter, over all of its sites."""
        return (self.norms.square().sum(1) + self.rest.square()).sqrt()

    @property
    def _null_std(self) -> Float[Tensor, " site"]:
        if len(self.null_inner) < 2:
            return torch.full_like(self.inner, torch.nan)
        return self.null_inner.std(0) / self.norms.prod(0)


def _with_quantiles(number: float, nulls: Sequence[float]) -> list[float]:
    """A number, and its quantiles for the second adapter in random directions."""
    return [number, *pd.Series(nulls, dtype=float).quantile(_QUANTILES)]


def _mean_correlation(
    effects: Float[Tensor, "batch site"], others: Float[Tensor, "batch site"], *, ranked: bool
) -> float:
    """The correlation over sites of two adapters' effects, mean over prompts."""
    by_prompt: list[float] = []
    for of_prompt, other_of_prompt in zip(effects, others, strict=True):
        a = of_prompt.double().numpy()
        b = other_of_prompt.double().numpy()
        by_prompt.append(correlation(a, b, ranked=ranked))
    return float(np.nanmean(by_prompt))


def _labelled(sites: Sequence[Site], name: str) -> pd.DataFrame:
    """The names, layers and kinds of the sites, and whose they are."""
    return pd.DataFrame({**Sites(sites).columns(), "adapters": [name] * len(sites)})
