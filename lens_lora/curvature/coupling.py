"""The matrix H_lm = ∂²g/∂ε_l∂ε_m between sites, layers, kinds of module or named groups.

    H_GM = Σ_{l∈G, m∈M} H_lm                                              (note, §6, item 4)

The diagonal is the self-curvature: how a group's own strength changes its effect. Off the diagonal
is the coupling: how one group's strength changes another group's effect.

1. One Hessian product H v for each group, with v the indicator of its sites, summed over the sites
   of every group.
2. The two triangles of H come from different passes, so their difference is the result's own check.
"""

from __future__ import annotations

from typing import Annotated, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.compat import in_float64
from lens_lora.core import Entries, Function, Group, Groups, Ranked, Sites, analysis, tables
from lens_lora.errors import MissingPartError


@final
class Coupling(Ranked):
    """The matrix H between groups of sites, in the readout's units.

    `plot` is a heatmap of ½H, whose cells add up to the second-order shift of a partition.

    Attributes:
        matrix: [batch, group, group], H_GM as computed: symmetric up to rounding (`asymmetry`).
        groups: {name: indices into sites}; single sites carry their own name.
        at: the gate value at which the second derivative was taken.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    matrix: Float[Tensor, "batch group group"]
    groups: Annotated[Groups, "group: site"]
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
        """Whether every site is in exactly one group."""
        return Sites(self.sites).is_partition(self.groups)

    @property
    def row_sums(self) -> Float[Tensor, "batch group"]:
        """Σ_M H_GM = Σ_{l∈G} (H·1)_l.

        Raises:
            MissingPartError: the groups overlap or leave sites out.
        """
        if not self.is_partition:
            count = sum(len(members) for members in self.groups.values())
            raise MissingPartError(
                f"these {len(self.groups)} groups hold {count} sites of {len(self.sites)}, some "
                "twice or not at all, so their rows do not add up to H·1",
                remedy="use group='site', 'layer' or 'kind', or name every site once. `matrix` "
                "itself is right.",
            )
        return self.matrix.sum(2)

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """½ 1ᵀH1, the second-order part of the shift.

        Raises:
            MissingPartError: the groups overlap or leave sites out.
        """
        return self.row_sums.sum(1) / 2

    @property
    def asymmetry(self) -> Float[Tensor, " batch"]:
        """The rounding in this matrix, max |H − Hᵀ| / max |H|; zero if H is zero."""
        largest = self.matrix.abs().amax((1, 2))
        difference = (self.matrix - self.matrix.mT).abs().amax((1, 2))
        return torch.where(largest > 0, difference / largest, 0.0)

    def shares(self) -> pd.DataFrame:
        """Self-curvature beside coupling, one row per prompt: signed sums, and sums of sizes.

        `self` and `coupling` add up to ½ΣH; `self_share` is Σ|½H_GG| / Σ|½H_GM|, which does not
        let terms of opposite sign cancel.
        """
        within = in_float64(self.self_curvature)
        between = in_float64(self.coupling).flatten(1)
        size_within = within.abs().sum(1)
        size_between = between.abs().sum(1)
        numbers = {
            "self": within.sum(1),
            "coupling": between.sum(1),
            "abs_self": size_within,
            "abs_coupling": size_between,
            "self_share": size_within / (size_within + size_between),
            "shift": self.shift,
            "asymmetry": self.asymmetry,
        }
        return pd.DataFrame(tables.flat(numbers)).rename_axis(index="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """½(H_GM + H_MG) of each pair of different groups: the pair's part of the shift."""
        names = list(self.groups)
        half = in_float64(self.coupling)
        a, b = torch.triu_indices(*half.shape[1:], offset=1)
        labels = {
            "group_a": [names[index] for index in a.tolist()],
            "group_b": [names[index] for index in b.tolist()],
        }
        of_pairs = (half + half.mT)[:, a, b]
        values, shift = self.mean_over(prompt, of_pairs)
        return Entries(labels, values, shift, "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and ordered pair of groups: H_GM."""
        names = list(self.groups)
        prompts = {"prompt": range(len(self.matrix))}
        return tables.long_table(
            {"value": self.matrix}, prompts, {"group_a": names}, {"group_b": names}
        )


@analysis
def coupling(g: Function, *, group: Group = "site", at: float = 0.0) -> Coupling:
    """H between groups of sites: how much the groups' effects depend on one another.

    Near ε = 0, H gives the leading part of what first order misses. At the full strength of a
    trained adapter higher orders are as large: H shows where the curvature is, and is not a
    correction.

    Cost: a forward and a backward pass, two backward passes for each group, batched, and two
    forward passes. Memory: the graph of a few prompts at a time and one batch, and the matrix
    [batch, group, group].

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits.
        group: 'site', 'layer', 'kind', or {name: site names or globs}; named groups may overlap.
        at: the gate value of every site at which the second derivative is taken.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        SiteError: a glob that matches no site.
        NumericsError: a derivative is not finite; the error names the site.
    """
    at = number("at", at)
    sites = g.lens.sites
    groups = sites.grouped(group)
    members = g.lens.gates(sites.indicator(groups))
    products = g.curvature(members, at)
    matrix = torch.einsum("mbs,gs->bgm", products, members)
    return Coupling(matrix=matrix, groups=groups, at=at, **g.header())
