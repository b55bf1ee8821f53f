"""Two adapters of one base: the geometry of their weight changes, and what both do on prompts.

1. Geometry, site by site (`analyses/adapter_geometry.py`): cosine of ΔW, principal angles of what
   is read and of what is written. Over all sites ⟨ΔW, ΔW′⟩ and both norms are summed, with sites
   that one adapter lacks in the other's norm.
2. Function, on prompts (`analyses/adapter_function.py`): the cosine under F of both first-order
   shifts, and of both exact ones.
3. Effects, with a readout: the correlation over shared sites of both first orders.
4. Null scale: the same numbers with the other adapter in random directions of the same spectrum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from lens_lora.adapters.adapter import Adapter
from lens_lora.adapters.random_directions import draw_seeds
from lens_lora.analyses.adapter_function import cosine_of, on_prompts
from lens_lora.analyses.adapter_geometry import Thin, geometry, thin
from lens_lora.analyses.agreement import pearson
from lens_lora.arguments import whole
from lens_lora.engine.asked import ask, ask_prompts
from lens_lora.errors import AdapterError, ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.measured import Result, site_labels

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["AdapterComparison", "compare_adapters"]

_QUANTILES = (0.025, 0.5, 0.975)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdapterComparison(Result):
    """Two adapters beside one another, and beside random directions.

    Attributes:
        names: of the two adapters.
        sites: that both adapt.
        only: sites that the first, and that the second alone adapts.
        norms: [adapter, site], ‖ΔW‖_F of the shared sites; of all others `rest`.
        rest: [adapter], √Σ‖ΔW‖² over the sites that it alone adapts.
        inner: [site], ⟨ΔW, ΔW′⟩.
        read, write: [site, angle], cosines of the principal angles between what both read and what
            both write, the largest first; NaN beyond a site's own.
        null_inner: [draw, site]; null_read, null_write: [draw, site], overlaps.
        function: [kind, pair, batch], vᵀFv′, vᵀFv and v′ᵀFv′ of first order and exact; no prompts
            without any.
        null_function: [kind, draw, pair, batch], of random directions in the place of the second.
        effects: [adapter, batch, shared site], first order; null_effects: [draw, batch, site].
        readout: of the effects; '' without one.
        draws, seed: of the random directions.
        meta: model, first adapter, dtype and versions.
    """

    names: tuple[str, str]
    sites: tuple[Site, ...]
    only: tuple[tuple[Site, ...], tuple[Site, ...]]
    norms: Float[Tensor, "2 site"]
    rest: Float[Tensor, "2"]
    inner: Float[Tensor, "site"]
    read: Float[Tensor, "site angle"]
    write: Float[Tensor, "site angle"]
    null_inner: Float[Tensor, "draw site"]
    null_read: Float[Tensor, "draw site"]
    null_write: Float[Tensor, "draw site"]
    function: Float[Tensor, "kind pair batch"]
    null_function: Float[Tensor, "kind function_draw pair batch"]
    effects: Float[Tensor, "2 read_prompt site"]
    null_effects: Float[Tensor, "effect_draw null_prompt site"]
    readout: str
    draws: int
    seed: int
    meta: Mapping[str, str]

    @property
    def cosines(self) -> Float[Tensor, "site"]:
        """cos⟨ΔW, ΔW′⟩ of each shared site."""
        return self.inner / self.norms.prod(0)

    @property
    def cosine(self) -> float:
        """Over all sites: Σ⟨ΔW, ΔW′⟩ / √(Σ‖ΔW‖² Σ‖ΔW′‖²); those of one alone are in its norm."""
        return float(self.inner.sum() / self._sizes.prod())

    @property
    def read_overlap(self) -> Float[Tensor, "site"]:
        """Mean squared cosine of the principal angles of what is read: 1 for one space."""
        return self.read.square().nanmean(1)

    @property
    def write_overlap(self) -> Float[Tensor, "site"]:
        """Mean squared cosine of the principal angles of what is written: 1 for one space."""
        return self.write.square().nanmean(1)

    def angles(self, site: str) -> pd.DataFrame:
        """Principal angles of one site, in degrees: what both read, and what both write.

        Args:
            site: its name.

        Raises:
            ArgumentError: no shared site of this name.
        """
        names = [one.name for one in self.sites]
        if site not in names:
            raise ArgumentError(f"{site!r} is no site that both adapters adapt; see .sites.")
        at = names.index(site)
        columns = {"read": self.read[at], "write": self.write[at]}
        degrees = {name: torch.rad2deg(c.acos()).tolist() for name, c in columns.items()}
        return pd.DataFrame(degrees).dropna(how="all")

    def summary(self) -> pd.DataFrame:
        """One row per number: it, and quantiles of it with the second in random directions."""
        rows = [("cosine of ΔW", self.cosine, self._null_cosines)]
        for name, own, null in (
            ("overlap of what is read", self.read_overlap, self.null_read),
            ("overlap of what is written", self.write_overlap, self.null_write),
        ):
            rows.append((name, float(own.nanmean()), null.nanmean(1)))
        for kind, name in enumerate(("first order", "exact")):
            if self.function.shape[-1]:
                null = cosine_of(self.null_function[kind])
                rows.append(
                    (f"cosine under F, {name}", float(cosine_of(self.function[kind])), null)
                )
        for name, ranked in (("pearson", False), ("spearman", True)):
            if self.readout:
                own, *null = self._correlations(ranked)
                rows.append((f"effects by site, {name}", own, torch.tensor(null)))
        quantiles = torch.tensor(_QUANTILES, dtype=torch.float64)
        found = []
        for name, value, null in rows:
            known = null.double()[~null.isnan()]
            across = known.quantile(quantiles).tolist() if len(known) else [float("nan")] * 3
            found.append((name, value, *across))
        columns = pd.Index(["value", *(f"null {q:.1%}" for q in _QUANTILES)])
        frame = pd.DataFrame([row[1:] for row in found], columns=columns)
        return frame.set_axis(pd.Index([row[0] for row in found], name="number"), axis=0)

    def to_frame(self) -> pd.DataFrame:
        """One row per site; sites of one adapter alone say whose they are, and have no numbers."""
        columns = {
            "cosine": self.cosines,
            "null std": self._null_std,
            "read overlap": self.read_overlap,
            "write overlap": self.write_overlap,
            "null read": self.null_read.mean(0),
            "null write": self.null_write.mean(0),
            "norm": self.norms[0],
            "other norm": self.norms[1],
        }
        shared = {**site_labels(self.sites), "in": ["both"] * len(self.sites)}
        frame = pd.DataFrame(shared | {name: v.tolist() for name, v in columns.items()})
        alone_in = [
            pd.DataFrame({**site_labels(sites), "in": [name] * len(sites)})
            for sites, name in zip(self.only, self.names, strict=True)
            if sites
        ]
        return pd.concat([frame, *alone_in], ignore_index=True)

    def by_prompt(self) -> pd.DataFrame:
        """One row per prompt: both cosines under F."""
        batch = self.function.shape[-1]
        rows = [cosine_of(self.function, p).tolist() for p in range(batch)]
        return pd.DataFrame(rows, columns=pd.Index(["first order", "exact"]))

    def plot(self) -> Figure:
        """The cosine of ΔW, layer × kind of module."""
        return drawing.figure(self)

    @property
    def _sizes(self) -> Float[Tensor, "2"]:
        return (self.norms.square().sum(1) + self.rest.square()).sqrt()

    @property
    def _null_std(self) -> Float[Tensor, "site"]:
        if len(self.null_inner) < 2:
            return torch.full_like(self.inner, torch.nan)
        return self.null_inner.std(0) / self.norms.prod(0)

    @property
    def _null_cosines(self) -> Float[Tensor, "draw"]:
        return self.null_inner.nansum(1) / self._sizes.prod()

    def _correlations(self, ranked: bool) -> list[float]:
        """Of the two adapters, and of the first with each null; the mean over prompts."""
        mine = self.effects[0].double().numpy()
        return [
            float(
                np.nanmean([_correlation(a, b, ranked) for a, b in zip(mine, theirs, strict=True)])
            )
            for theirs in (self.effects[1].double().numpy(), *self.null_effects.double().numpy())
        ]


def _correlation(a: np.ndarray, b: np.ndarray, ranked: bool) -> float:
    pair = (rankdata(a), rankdata(b)) if ranked else (a, b)
    return pearson(*pair, float(np.finfo(np.float32).eps)) if len(a) > 1 else float("nan")


@alone
def compare_adapters(
    lens: LoraLens,
    other: Adapter,
    prompts: PromptsLike | None = None,
    readout: Readout | None = None,
    *,
    draws: int = 10,
    seed: int = 0,
    progress: bool = True,
) -> AdapterComparison:
    """Geometry of two adapters' weight changes, and with prompts what both do there.

    Cost: none in forward passes without prompts. With prompts two dual forward passes and three
    forward passes, and half of that for each draw; a readout adds a forward and a backward pass for
    each adapter and draw.

    Args:
        lens: the first adapter over the model.
        other: the second, of the same base.
        prompts: on which both are run; read at every token but the first.
        readout: whose first order by site is correlated; read at each prompt's last token.
        draws: adapters of the second's spectra in random directions; 0 for none.
        seed: of the draws; those that are run on prompts are `null_adapter(other, seed, draw)`.
        progress: show a bar.

    Raises:
        AdapterError: the adapters name different bases; shapes that are not the model's.
        ArgumentError: no adapter; no shared site and no prompts; a readout without prompts, or one
            without a derivative at the base.
        SiteError: the second adapter names a module that the model lacks.
        UnsupportedAdapterError: random directions of DoRA or of trained modules, with prompts; use
            draws=0, or make the change plain first.
        ModelStateError: an operation without a forward-mode derivative.
    """
    draws, seed = whole("draws", draws, 0), whole("seed", seed, 0)
    _require_adapter(lens, other)
    if readout is not None and prompts is None:
        raise ArgumentError("a readout is read on prompts, and there are none; pass prompts=…")
    second = lens.with_adapter(other)
    shared, of_lens = _shared_and_alone(lens.sites, second.sites)
    _, of_other = _shared_and_alone(second.sites, lens.sites)
    if not shared and prompts is None:
        raise ArgumentError(
            f"{lens.adapter.name} and {other.name} adapt no site in common ("
            f"{lens.sites[0].name}, … and {second.sites[0].name}, …), so "
            "their ΔW cannot be compared; give prompts, on which what both do is compared."
        )
    fields = geometry(_thin(lens), _thin(second), draw_seeds(seed, draws))
    nothing = torch.zeros(0, dtype=torch.float64)
    fields |= {
        "function": nothing.view(2, 3, 0),
        "null_function": nothing.view(2, 0, 3, 0),
        "effects": nothing.view(2, 0, len(shared)) if shared else nothing.view(2, 0, 0),
        "null_effects": nothing.view(0, 0, len(shared)),
    }
    if prompts is not None:
        asked = ask_prompts(lens, prompts)
        about = None if readout is None else ask(lens, asked.prompts, readout)
        fields |= on_prompts(asked, about, second, [s.name for s in shared], draws, seed, progress)
    return AdapterComparison(
        names=(lens.adapter.name, other.name),
        sites=shared,
        only=(of_lens, of_other),
        readout="" if readout is None else readout.label,
        draws=draws,
        seed=seed,
        meta=lens.describe(),
        **fields,
    )


def _shared_and_alone(
    sites: Sequence[Site], others: Sequence[Site]
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Those that are among the others too, and the rest."""
    names = {site.name for site in others}
    shared = tuple(site for site in sites if site.name in names)
    return shared, tuple(site for site in sites if site.name not in names)


def _require_adapter(lens: LoraLens, other: Adapter) -> None:
    if not isinstance(other, Adapter):
        raise ArgumentError(
            f"the other adapter is a {type(other).__name__}; pass an ll.Adapter (of a folder: "
            "ll.load_adapter(path))."
        )
    bases = lens.adapter.base_model, other.base_model
    if all(bases) and bases[0] != bases[1]:
        raise AdapterError(
            f"{lens.adapter.name} names the base {bases[0]!r}, {other.name} {bases[1]!r}; changes "
            "of different models have nothing in common to compare."
        )


def _thin(lens: LoraLens) -> dict[str, Thin]:
    pairs = zip(lens.sites, lens.plan.updates, strict=True)
    return {site.name: thin(one.update) for site, one in pairs}
