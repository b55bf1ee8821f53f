"""Coupling: the second derivative of g between sites, layers, kinds of module or named groups.

    H_GM = Σ_{l∈G, m∈M} ∂²g/∂ε_l ∂ε_m,    g(1) − g(0) = Σ a_l + ½ Σ_G Σ_M H_GM + O(Δ³)

The diagonal is self-curvature, what a group's own strength does to its effect; off the diagonal is
coupling, what one group's presence does to another's effect (note, §6, item 4).

1. Each group is a direction: 1 on its sites.
2. H v of each, batched (`engine/gate_graph.py`), is summed over the groups at once, so
   that only [group, group] is kept.
3. The two triangles come from different passes; what they differ by is the result's own check.
4. With a_l at the same gates t·1, to second order what one site does is (`Coupling.estimate`)

       added to the base model             a_l −      t (H1)_l + ½ H_ll
       taken out of the adapted model      a_l + (1 − t) (H1)_l − ½ H_ll
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.analyses.patch_sites import How, require_how
from lens_lora.arguments import number
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.gate_graph import hessian_products, in_groups
from lens_lora.errors import ArgumentError
from lens_lora.float64 import in_float64
from lens_lora.hooked.alone import alone
from lens_lora.hooked.sites import Group, Groups, group_sites, indicator
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.readouts.rows import Reading
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Entries, Ranked, header

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Coupling", "coupling", "coupling_of"]


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Coupling(Ranked):
    """The matrix H between groups of sites, in the readout's units.

    Attributes:
        matrix: [batch, group, group], H_GM as computed: symmetric up to rounding (`asymmetry`).
        groups: {name: indices into sites}; single sites carry their own name.
        at: the gate value at which the second derivative was taken.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    matrix: Float[Tensor, "batch group group"]
    groups: Groups
    at: float

    @property
    def self_curvature(self) -> Float[Tensor, "batch group"]:
        """½ H_GG: a group's own part of the second-order shift."""
        return self.matrix.diagonal(dim1=1, dim2=2) / 2

    @property
    def coupling(self) -> Float[Tensor, "batch group group"]:
        """½ H_GM off the diagonal, zero on it; G, M and M, G are each half of the pair's part."""
        return self.matrix / 2 - torch.diag_embed(self.self_curvature)

    @property
    def is_partition(self) -> bool:
        """Whether every site is of exactly one group."""
        members = sorted(index for group in self.groups.values() for index in group)
        return members == list(range(len(self.sites)))

    @property
    def row_sums(self) -> Float[Tensor, "batch group"]:
        """Σ_M H_GM = Σ_{l∈G} (H·1)_l.

        Raises:
            ArgumentError: the groups overlap or leave sites out.
        """
        self._require_partition()
        return self.matrix.sum(2)

    @property
    def total(self) -> Float[Tensor, "batch"]:
        """½ 1ᵀH1, the second-order part of the shift.

        Raises:
            ArgumentError: the groups overlap or leave sites out.
        """
        return self.row_sums.sum(1) / 2

    @property
    def asymmetry(self) -> Float[Tensor, "batch"]:
        """max |H − Hᵀ| / max |H|: the rounding in this matrix; zero where H is."""
        largest = self.matrix.abs().amax((1, 2))
        off = (self.matrix - self.matrix.transpose(1, 2)).abs().amax((1, 2))
        return torch.where(largest > 0, off / largest, torch.zeros_like(off))

    def shares(self) -> pd.DataFrame:
        """Self-curvature against coupling, one row a prompt: signed sums, and sums of sizes.

        `self` and `coupling` add up to ½ΣH; `self_share` is Σ|½H_GG| / Σ|½H_GM|, which does not
        let terms of opposite sign cancel.
        """
        own, between = in_float64(self.self_curvature), in_float64(self.coupling).flatten(1)
        sizes = own.abs().sum(1), between.abs().sum(1)
        return pd.DataFrame(
            {
                "self": own.sum(1).tolist(),
                "coupling": between.sum(1).tolist(),
                "abs_self": sizes[0].tolist(),
                "abs_coupling": sizes[1].tolist(),
                "self_share": (sizes[0] / (sizes[0] + sizes[1])).tolist(),
                "shift": self.shift.cpu().double().tolist(),
                "asymmetry": self.asymmetry.cpu().double().tolist(),
            }
        ).rename_axis(index="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """½(H_GM + H_MG) of each pair of different groups: the pair's part of the shift.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        half, shift = self.mean_over(prompt, self.coupling)
        a, b = torch.triu_indices(*half.shape, offset=1)
        names = list(self.groups)
        labels = {
            "group_a": [names[i] for i in a.tolist()],
            "group_b": [names[i] for i in b.tolist()],
        }
        return Entries(labels, (half + half.T)[a, b], shift, "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and ordered pair of groups: H_GM."""
        batch, count = self.matrix.shape[:2]
        names = np.array(list(self.groups), dtype=object)
        return pd.DataFrame(
            {
                "prompt": np.repeat(np.arange(batch), count * count),
                "group_a": np.tile(np.repeat(names, count), batch),
                "group_b": np.tile(names, batch * count),
                "value": self.matrix.cpu().double().flatten().numpy(),
            }
        )

    def plot(self, prompt: int | None = None) -> Figure:
        """Heatmap of ½H, whose cells add up to the second-order shift where groups partition.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, prompt)

    def estimate(self, first: Attribution, how: How) -> Attribution:
        """Effects of single sites to second order, from this matrix and first order at its gates.

        Each question is best asked at its own end: 'add_one' at 0, 'leave_one_out' at 1, where no
        coupling enters. From elsewhere, and for adapters that move much, the estimate can be far
        worse than first order; the effects themselves, `ll.patch_sites`, cost less than H.

        Args:
            first: `ll.first_order` of the same prompts and readout, at the same gate value.
            how: 'add_one' or 'leave_one_out'.

        Returns:
            Attribution with the key 'second_order/add_one@0', and so on.

        Raises:
            ArgumentError: a matrix of groups of sites; a first order of something else.
        """
        require_how(how)
        self._require_of_sites(first)
        own = self.self_curvature
        if how == "add_one":
            values = first.per_site - self.at * self.row_sums + own
        else:
            values = first.per_site + (1 - self.at) * self.row_sums - own
        return dataclasses.replace(first, values=values, by=(), method=f"second_order/{how}")

    def _require_of_sites(self, first: Attribution) -> None:
        if list(self.groups.values()) != [(i,) for i in range(len(self.sites))]:
            raise ArgumentError(
                f"this matrix is of {len(self.groups)} groups; effects of single sites are "
                "estimated from coupling(group='site')."
            )
        facts = {
            "method": (first.method, "first_order"),
            "gate value": (first.at, self.at),
            "sites": ([s.name for s in first.sites], [s.name for s in self.sites]),
            "prompts": (first.str_tokens, self.str_tokens),
            "readout": (first.readout, self.readout),
        }
        for what, (theirs, own) in facts.items():
            if theirs != own:
                shown = f": {theirs} and {own}" if isinstance(theirs, str | float) else ""
                raise ArgumentError(
                    f"first order has other {what} than the matrix{shown}; compute both with the "
                    f"same lens, prompts and readout: first_order(…, at={self.at:g})."
                )

    def _require_partition(self) -> None:
        if not self.is_partition:
            count = sum(map(len, self.groups.values()))
            raise ArgumentError(
                f"these {len(self.groups)} groups hold {count} sites of {len(self.sites)}, some "
                "twice or not at all, so their rows do not add up to H·1; use group='site', "
                "'layer' or 'kind', or name every site once. `matrix` is right as it is."
            )


@alone
def coupling(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    group: Group = "site",
    at: float = 0.0,
    progress: bool = True,
) -> Coupling:
    """H between groups of sites: how much the groups' effects depend on one another.

    At ε = 0 this is what first order leaves, to second order. At the full strength of a trained
    adapter higher orders are as large: read it as where the curvature is, not as a correction.

    Cost: a forward and a backward pass, two backward passes for each group, batched, and two
    forward passes. Memory: of the graph of a few prompts at a time and one batch, and the matrix
    [batch, group, group].

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        group: 'site', 'layer', 'kind', or {name: site names or globs}; named groups may overlap.
        at: the gate value of every site at which the second derivative is taken.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        SiteError: a glob that matches no site.
        NumericsError: a derivative that is not finite, naming the site.
    """
    return coupling_of(ask(lens, prompts, readout), group=group, at=at, progress=progress)


def coupling_of(
    asked: Asked, *, group: Group = "site", at: float = 0.0, progress: bool = True
) -> Coupling:
    """`coupling` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        group, at, progress: as for `coupling`.

    Raises:
        SiteError: a glob that matches no site.
        NumericsError: a derivative that is not finite, naming the site.
    """
    lens, at = asked.lens, number("at", at)
    gates = lens.gates(at)
    groups = group_sites(lens.sites, group)
    rows = indicator(groups, len(lens.sites)).to(gates)

    def of_some(some: Reading) -> Float[Tensor, "batch group group"]:
        products = hessian_products(lens, some, gates, rows, progress=progress, what="coupling")
        return torch.cat([product @ rows.T for product in products], 1)

    matrix = in_groups(asked.reading, of_some).transpose(1, 2).contiguous()
    return Coupling(matrix=matrix, groups=groups, at=at, **header(asked))
