"""How large an adapter's updates are, and in how many directions: the spectrum of each ΔW.

With a lens a row is a site (a fused projection is several) and has ‖ΔW‖ / ‖W‖. Both are in the
Hugging Face basis, so the hooked model must be unprocessed.

No forward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any, final

import pandas as pd
import torch

from lens_lora.adapters.adapter import Adapter
from lens_lora.analyses.spectrum import TRAINED, Spectrum, module_spectrum, site_spectra
from lens_lora.families import FAMILIES
from lens_lora.hooked.hosts import host_of
from lens_lora.lens import LoraLens
from lens_lora.results.measured import Result

__all__ = ["AdapterSummary", "lacking", "summarise"]

_OUTSIDE = {"embed": "embeddings", "pos_embed": "embeddings", "unembed": "head"}


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AdapterSummary(Result):
    """What an adapter is: one row per module, or with a lens per site.

    Attributes:
        name: the adapter's.
        base_model: the base that it names.
        model: name and class of the lens' model; None without a lens.
        module_count: modules that the adapter adapts.
        rows: in the adapter's order, or with a lens in that of a forward pass.
        missing: modules that the lens does not cover (their rows have no site).
        unchanged: modules of which the adapter holds what the lens' model has (no site either).
    """

    name: str
    base_model: str | None
    model: str | None
    module_count: int
    rows: tuple[Spectrum, ...]
    missing: tuple[str, ...]
    unchanged: tuple[str, ...] = ()

    @property
    def targets(self) -> dict[str, int]:
        """'self_attn.q_proj' → in how many layers it is adapted."""
        return dict(Counter(target for _, target, *_ in self._modules()))

    @property
    def ranks(self) -> dict[int, int]:
        """Rank → how many modules have factors of it."""
        return dict(sorted(Counter(rank for *_, rank, _ in self._modules(True)).items()))

    @property
    def scales(self) -> dict[float, int]:
        """s → how many modules have factors of it."""
        return dict(sorted(Counter(scale for *_, scale in self._modules(True)).items()))

    @property
    def parts(self) -> dict[str, int]:
        """'DoRA', 'lora_bias', 'embeddings', 'head', … → how many modules have or are it."""
        found = Counter[str]()
        for path, _, parts, *_ in self._modules():
            found.update((*parts, *filter(None, [_outside_blocks(path)])))
        return dict(found)

    @property
    def norm(self) -> float:
        """√Σ‖ΔW‖_F² over everything; NaN where a spectrum is unknown."""
        return math.sqrt(sum(row.norm**2 for row in self.rows))

    @property
    def relative_norm(self) -> float:
        """√Σ‖ΔW‖_F² / √Σ‖W‖_F² over the sites; NaN without a lens.

        A weight that several adapters of a sum change counts once.
        """
        over = [row for row in self.rows if row.site is not None]
        weights = {str(row.site).partition("@")[0]: row.weight_norm for row in over}
        weight = math.hypot(*weights.values())
        return math.hypot(*(row.norm for row in over)) / weight if weight else math.nan

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Modules that were trained themselves: their weight, not factors beside it."""
        return tuple(dict.fromkeys(r.module for r in self.rows if set(r.parts) & set(TRAINED)))

    @property
    def bias_norm(self) -> float:
        """√Σ‖Δb‖² over everything, beside `norm`; NaN where a bias was trained."""
        return math.sqrt(sum(row.bias_norm**2 for row in self.rows))

    def top(self, k: int | None = None) -> tuple[Spectrum, ...]:
        """The k rows of largest ‖ΔW‖_F, unknown ones last.

        Args:
            k: how many; None for all.
        """
        known = sorted(self.rows, key=lambda r: math.inf if math.isnan(r.norm) else -r.norm)
        return tuple(known[:k])

    def to_frame(self) -> pd.DataFrame:
        """One row per module or site."""
        fields = ("module", "site", "target", "rank", "scale")
        numbers = ("norm", "relative_norm", "spectral_norm", "stable_rank", "bias_norm")
        rows = [
            {name: getattr(row, name) for name in fields + numbers}
            | {"parts": ", ".join(row.parts), "singular_values": row.singular_values.tolist()}
            for row in self.rows
        ]
        return pd.DataFrame(rows)

    def _modules(
        self, with_factors: bool = False
    ) -> list[tuple[str, str, tuple[str, ...], int, float]]:
        """(path, target, parts, rank, scale) of each module once, however many sites it has."""
        rows = [row for row in self.rows if row.has_factors or not with_factors]
        return sorted({(r.module, r.target, r.parts, r.rank, r.scale) for r in rows})


def summarise(adapter: Adapter, lens: LoraLens | None = None) -> AdapterSummary:
    """Spectrum and size of every update. No forward pass.

    Args:
        adapter: whose updates are measured.
        lens: of this adapter, or of the part of it that the model has, over an unprocessed model;
            adds sites, ‖ΔW‖ / ‖W‖, and the numbers of DoRA and trained modules.

    Raises:
        ModelStateError: the lens' model was processed.
    """
    covered = () if lens is None else site_spectra(lens)
    of_sites = {row.module for row in covered}
    rest = {key: update for key, update in adapter.modules.items() if key not in of_sites}
    same = () if lens is None else tuple(key for key in rest if key in lens.adapter.modules)
    others = tuple(
        _of_nothing(module_spectrum(key, update)) if key in same else module_spectrum(key, update)
        for key, update in rest.items()
    )
    about = {} if lens is None else lens.describe()
    return AdapterSummary(
        name=adapter.name,
        base_model=adapter.base_model,
        model=f"{about['model']} ({about['model_class']})" if about else None,
        module_count=len(adapter),
        rows=covered + others,
        missing=() if lens is None else tuple(key for key in rest if key not in same),
        unchanged=same,
    )


def _of_nothing(row: Spectrum) -> Spectrum:
    nothing = torch.zeros(1, dtype=torch.float64)
    return dataclasses.replace(row, singular_values=nothing, bias_norm=0.0)


def lacking(adapter: Adapter, model: Any) -> tuple[str, ...]:
    """The adapter's modules that a hooked model lacks, by name alone.

    Args:
        adapter: whose modules are looked up.
        model: a HookedTransformer or a TransformerBridge.

    Raises:
        ModelStateError: no hooked model, or one of a family that is not supported.
    """
    host = host_of(model)
    places = {key: host.family.place(key.partition("@")[0]) for key in adapter.modules}
    return tuple(k for k, at in places.items() if at is None or (at.layer or 0) >= host.n_layers)


def _outside_blocks(key: str) -> str | None:
    """'embeddings' or 'head' for a module that some family has outside its layers."""
    for family in FAMILIES:
        place = family.place(key.partition("@")[0])
        if place is not None and place.layer is None:
            return _OUTSIDE.get(place.kinds[0])
    return None
