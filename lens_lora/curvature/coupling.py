"""H_lm = ∂²g/∂ε_l∂ε_m between sites, layers, kinds of module or named groups.

H_GM =
Σ_{l∈G, m∈M} H_lm: the diagonal is what a group's own strength does to its effect; off the diagonal
is coupling, what one group's presence does to another's effect (note, §6, item 4).

1. H between groups, from a product for each
   site or group, batched (`core/function/derivatives.py`) and summed over groups at once.
2. The two triangles of H come from different passes; their difference is the result's own check.
"""

from __future__ import annotations

from typing import Annotated, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.compat import in_float64
from lens_lora.core import (
    Entries,
    Function,
    Group,
    Groups,
    Ranked,
    analysis,
    group_sites,
    indicator,
    long_table,
)
from lens_lora.core.results import base as results_base
from lens_lora.core.results.base import per_prompt
from lens_lora.errors import ArgumentError


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
        return results_base.is_partition(self.groups, len(self.sites))

    @property
    def row_sums(self) -> Float[Tensor, "batch group"]:
        """Σ_M H_GM = Σ_{l∈G} (H·1)_l.

        Raises:
            ArgumentError: the groups overlap or leave sites out.
        """
        if not self.is_partition:
            count = sum(map(len, self.groups.values()))
            raise ArgumentError(
                f"these {len(self.groups)} groups hold {count} sites of {len(self.sites)}, some "
                "twice or not at all, so their rows do not add up to H·1; use group='site', "
                "'layer' or 'kind', or name every site once. `matrix` itself is right."
            )
        return self.matrix.sum(2)

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """½ 1ᵀH1, the second-order part of the shift.

        Raises:
            ArgumentError: the groups overlap or leave sites out.
        """
        return self.row_sums.sum(1) / 2

    @property
    def asymmetry(self) -> Float[Tensor, " batch"]:
        """max |H − Hᵀ| / max |H|: the rounding in this matrix; zero where H is."""
        largest = self.matrix.abs().amax((1, 2))
        off = (self.matrix - self.matrix.transpose(1, 2)).abs().amax((1, 2))
        return torch.where(largest > 0, off / largest, torch.zeros_like(off))

    def shares(self) -> pd.DataFrame:
        """Self-curvature against coupling, one row a prompt: signed sums, and sums of sizes.

        `self` and `coupling` add up to ½ΣH; `self_share` is Σ|½H_GG| / Σ|½H_GM|, which does not
        let terms of opposite sign cancel.
        """
        within, between = in_float64(self.self_curvature), in_float64(self.coupling).flatten(1)
        size_within, size_between = within.abs().sum(1), between.abs().sum(1)
        numbers = {
            "self": within.sum(1),
            "coupling": between.sum(1),
            "abs_self": size_within,
            "abs_coupling": size_between,
            "self_share": size_within / (size_within + size_between),
            "shift": self.shift,
            "asymmetry": self.asymmetry,
        }
        return pd.DataFrame(per_prompt(numbers)).rename_axis(index="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """½(H_GM + H_MG) of each pair of different groups: the pair's part of the shift."""
        half, names = in_float64(self.coupling), list(self.groups)
        a, b = torch.triu_indices(*half.shape[1:], offset=1)
        pairs = {"group_a": a.tolist(), "group_b": b.tolist()}
        labels = {side: [names[i] for i in members] for side, members in pairs.items()}
        return Entries(labels, *self.mean_over(prompt, (half + half.mT)[:, a, b]), "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and ordered pair of groups: H_GM."""
        names, prompts = list(self.groups), range(len(self.matrix))
        axes = {"prompt": prompts}, {"group_a": names}, {"group_b": names}
        return long_table({"value": self.matrix}, *axes)


@analysis
def coupling(g: Function, *, group: Group = "site", at: float = 0.0) -> Coupling:
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
    at = number("at", at)
    sites = g.lens.sites
    groups = group_sites(sites, group)
    members = g.lens.gates(indicator(groups, len(sites)))
    products = g.curvature(members, at)
    matrix = torch.einsum("mbs,gs->bgm", products, members)
    return Coupling(matrix=matrix, groups=groups, at=at, **g.header())
