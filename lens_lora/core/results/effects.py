"""The exact effects of real interventions on groups of sites, with their labels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Annotated, Any, final

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lens_lora.core.model.sites import Groups, Sites
from lens_lora.core.results.attribution import Attribution, Axis
from lens_lora.core.results.base import Entries, Evaluated, Measured, Ranked
from lens_lora.core.results.tables import long_table
from lens_lora.errors import ArgumentError, LensLoraError, MissingPartError


@final
class Effects(Ranked):
    """The exact effect on a readout of intervening on each group of sites, in its units.

    `plot` is a heatmap layer × kind of single sites, or bars of groups.

    Attributes:
        values: [batch, group], positive if the group raises the readout.
        groups: {name: indices into sites}; a single site has its own name.
        how: 'add_one' for g(e_G) − g(0), or 'leave_one_out' for g(1) − g(1 − e_G).
        of: 'site' for whole sites. 'rank' if each group is one rank of a site, such as
            'blocks.0.attn.q[2]', in the coordinates of the SVD of ΔW. 'edge' if a single reader
            sees what the site writes, as in 'blocks.0.attn.o → blocks.1.mlp'.
        replace: what δ_G was replaced by: 'zero', 'mean' or 'resample'.
        texts: the number of texts from which the replacement came.
        noise_floor: [batch], σ of an effect from rounding alone; None if it was not measured.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch group"]
    groups: Annotated[Groups, "group: site"]
    how: str
    of: str = "site"
    replace: str = "zero"
    texts: int = 0
    noise_floor: Float[Tensor, " batch"] | None = None

    @classmethod
    def from_function(
        cls,
        g: Evaluated,
        values: Float[Tensor, "batch group"],
        groups: Groups,
        how: str,
        *,
        of: str = "site",
        replace: str = "zero",
        texts: int = 0,
    ) -> Effects:
        """Put labels to effects, and add the exact shift and their noise floor.

        An effect is a difference of two values of g near one end, both of which are rounded.

        Cost: two forward passes for the exact ends and four for the noise, unless g knows them.

        Args:
            g: the function whose values were compared.
            values: the effects, in the readout's units.
            groups: indices of sites, by name.
            how: 'add_one', near the base, or 'leave_one_out', near the adapted model.
            of, replace, texts: see the class.
        """
        noise_floor = g.noise((1.0, -1.0), at=float(how == "leave_one_out"))
        return cls(values, groups, how, of, replace, texts, noise_floor=noise_floor, **g.header())

    @property
    def key(self) -> str:
        """Its stable name, such as 'add_one', 'leave_one_out' or 'leave_one_out/mean'."""
        return self.how if self.replace == "zero" else f"{self.how}/{self.replace}"

    @property
    def share(self) -> Float[Tensor, "batch group"]:
        """The effects as shares of the shift."""
        return self.share_of(self.values)

    @property
    def interaction(self) -> Float[Tensor, " batch"]:
        """The part of the shift that no group does on its own, g(1) − g(0) − Σ effects.

        Raises:
            MissingPartError: the groups overlap, leave sites out or are ranks, or δ was replaced by
                something other than zero, so that their sum means nothing.
        """
        if self.of != "site" or self.replace != "zero":
            fact = f"the sum of effects of {self.of}s replaced by {self.replace} is no shift"
            raise MissingPartError(f"{fact}; use of='site', replace='zero'.")
        if not Sites(self.sites).is_partition(self.groups):
            raise MissingPartError(
                "the groups do not hold every site exactly once, so their sum cannot be compared "
                "with the shift; use group='site', 'layer' or 'kind' over all sites."
            )
        return self.shift - self.values.sum(1)

    @property
    def is_by_site(self) -> bool:
        """Whether the groups are single sites, and all of them."""
        return self.of == "site" and _is_by_site(self.groups, len(self.sites))

    def summed(self, attribution: Attribution) -> Float[Tensor, "batch group"]:
        """Sum an attribution of the same sites over each group.

        Args:
            attribution: an attribution from the same lens.

        Raises:
            ArgumentError: it is of other sites, or the groups are single ranks.
        """
        if self.of != "site":
            use = "use of='site', with ll.patch_sites"
            raise ArgumentError(f"effects of single {self.of}s are of no whole sites; {use}.")
        names = [site.name for site in self.sites]
        if [site.name for site in attribution.sites] != names:
            counts = f"{len(attribution.sites)} sites, the effects of {len(names)}"
            raise ArgumentError(f"the attribution is of {counts}; compute both with the same lens.")
        members = Sites(self.sites).indicator(self.groups).to(attribution.per_site)
        return attribution.per_site @ members.T

    def attribution(self) -> Attribution:
        """The effects of single sites as an attribution, which has a heatmap, a table and a file.

        The effects of single ranks become an attribution that is split by rank.

        Raises:
            ArgumentError: the effects are of groups of several sites.
        """
        if self.of == "edge" or any(len(members) > 1 for members in self.groups.values()):
            use = "use group='site', with ll.patch_sites"
            raise ArgumentError(f"effects of groups, or of edges, are of no single sites; {use}.")
        # Each rank is a group of its own, so a site may be there several times.
        chosen = dict.fromkeys(index for (index,) in self.groups.values())
        sites = tuple(self.sites[index] for index in chosen)
        header: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(Measured)
        }
        header["sites"] = sites
        values = self.values
        by: tuple[Axis, ...] = ()
        gauge = ""
        if self.of == "rank":
            by_site = values.T.split([site.rank for site in sites])
            values = pad_sequence(list(by_site), batch_first=True).permute(2, 0, 1)
            by = ("rank",)
            gauge = "svd"
        return Attribution(
            values=values,
            by=by,
            heads=(0,) * len(sites),
            method=self.key,
            at=float(self.how == "leave_one_out"),
            gauge=gauge,
            **header,
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group: its labels, effect, and share of the shift.

        A group of a single site has the labels of the site; any other has its number of sites.
        """
        numbers = {"value": self.values, "share": self.share}
        prompts = {"prompt": range(len(self.values))}
        groups = Sites(self.sites).columns_of_groups(self.groups)
        return long_table(numbers, prompts, groups)

    def entries(self, prompt: int | None = None) -> Entries:
        """The effect of each group."""
        values, shift = self.mean_over(prompt, self.values)
        labels = Sites(self.sites).columns_of_groups(self.groups, sizes=False)
        return Entries(labels, values, shift, "value")

    def to_patching_result(self) -> Any:
        """The effects as TransformerLens's `PatchingResult`, with its standard errors and p-values.

        Its `values` are the readout with each group switched, [group, batch], and its `baseline` is
        the readout before. So its `effect()` is `values` here for add one, and minus `values` for
        leave one out, and its `normalized(…)` by the readout at the other end is `share`.

        Raises:
            LensLoraError: the installed transformer-lens has no such class (4.3 has).
            ArgumentError: add one with δ replaced, where each group has its own baseline.
        """
        adds = self.how == "add_one"
        if adds and self.replace != "zero":
            raise ArgumentError(
                f"effects of add_one with replace={self.replace!r} have a baseline for each group, "
                "and a PatchingResult has one for all; use replace='zero' or 'leave_one_out'."
            )
        columns: dict[str, list[Any]] = {"group": list(self.groups)}
        if all(len(members) == 1 for members in self.groups.values()):
            sites = [self.sites[index] for (index,) in self.groups.values()]
            columns["layer"] = [site.layer for site in sites]
            columns["kind"] = [site.kind for site in sites]
        return patching_result(self, adds, pd.DataFrame(columns))


def patching_result(effects: Any, adds: bool, index: pd.DataFrame, axes: Sequence[str] = ()) -> Any:
    """Effects as TransformerLens's own class: patched readouts, and the run that was patched.

    Effects that add to the base are patched − g(0); all others are g(1) − patched.

    Args:
        effects: a result with `values`, `base`, `adapted` and `readout`.
        adds: whether the effects add to the base.
        index: a row of labels for each entry of one prompt.
        axes: the names of the axes of the entries.

    Raises:
        LensLoraError: the installed transformer-lens has no such class.
    """
    cls = getattr(importlib.import_module("transformer_lens.patching"), "PatchingResult", None)
    if cls is None:
        raise LensLoraError("transformer-lens before 4.3 has no PatchingResult; use to_frame().")
    cells = effects.values.movedim(0, -1)
    if adds:
        baseline = effects.base
        patched = baseline + cells
    else:
        baseline = effects.adapted
        patched = baseline - cells
    return cls(
        values=patched,
        index_df=index,
        reduced=False,
        baseline=baseline,
        axis_names=list(axes),
        metric_names=[effects.readout],
    )


def _is_by_site(groups: Groups, count: int) -> bool:
    """Whether the groups are single sites, and all of them."""
    return list(groups.values()) == [(index,) for index in range(count)]
