"""Attributions and effects: what each site, or group, does to a readout, frozen and labelled.

    Attribution         one number per prompt and site (and position, head, rank, output token)
    GroupAttribution    one number per prompt, group of sites and output token
    Effects             one number per prompt and group, from real interventions

A result carries its own check: the exact shift g(1) − g(0) stands beside the values, and what they
leave of it is the property `remainder`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lens_lora.arguments import word
from lens_lora.core.model.sites import Groups, indicator
from lens_lora.core.results import base, drawing
from lens_lora.core.results.base import Entries, Evaluated, Measured, Ranked
from lens_lora.core.results.drawing import TokenView
from lens_lora.core.results.storage import stored
from lens_lora.errors import ArgumentError, LensLoraError

PartAxis = Literal["position", "head", "expert", "rank", "token"]
# What a picture shows: the parts along an axis, or whole sites.
ShownAxis = Literal["site", "position", "head", "expert", "rank", "token"]
# The old names of these two.
Axis = PartAxis
Shown = ShownAxis
_WITH_NONE = ("head", "expert")  # axes whose last slot is for sites that have none
# ‖ΔW‖ / ‖W‖ above which first order is to be distrusted: chosen and confirmed on trained adapters
# of SmolLM2-135M (docs/faithfulness.md).
VIOLENT = 0.038
MOST_POSITIONS = 40  # What a heatmap shows with its tokens still legible.


@final
@stored
@dataclasses.dataclass(frozen=True)
class Quadrature:
    """How a path integral was taken, and whether it met what was asked.

    Attributes:
        nodes: Gauss–Legendre nodes of the last rule.
        tol: the completeness asked for, as a share of the shift.
        error: the largest completeness error reached over prompts, as a share of its shift.
        site_change: the largest change of any site's value from the rule of half the nodes to the
            last, as a share of its prompt's shift: completeness does not bound a site's error.
        met: whether error ≤ tol, and rounding is small enough to tell.
        note: the obstacle to reaching tol, where there is one.
    """

    nodes: int
    tol: float
    error: float
    site_change: float
    met: bool
    note: str = ""


@final
class Attribution(Ranked):
    """What each site contributes to a readout, in the readout's units.

    Attributes:
        values: [batch, site, *by]. Slots that do not exist (padding, ranks beyond a site's own)
            hold zero, tokens beyond a response's own NaN, and tables leave them out. On the head
            axis the last slot is for sites outside attention, on that of experts for all others.
        by: the axes after site, in the order position, head, expert, rank, token.
        heads: how many heads each site has (0 outside attention).
        method: how it was computed: 'first_order', 'path', 'second_order', 'add_one', ….
        at: the gate value at which it was taken; NaN along a path.
        quadrature: how a path integral was taken; None for other methods.
        response: each prompt's y_1 … y_T, where values are by token.
        gauge: the meaning of a rank, where values are by rank: 'trained' or 'svd'.
        mode: 'reverse' or 'forward', the mode in which a derivative was computed.
        relative_norm: ‖ΔW‖ / ‖W‖ of the adapter, over the linear maps that it adapts; NaN where it
            is not known.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`; one site per
            entry of the site axis.
    """

    values: Float[Tensor, "batch site *by"]
    by: tuple[PartAxis, ...]
    heads: Annotated[tuple[int, ...], "site: head"]
    method: str
    at: float
    quadrature: Quadrature | None = None
    response: Annotated[tuple[tuple[str, ...], ...], "batch token?"] = ()
    gauge: str = ""
    mode: str = ""
    relative_norm: float = math.nan

    @classmethod
    def of(
        cls,
        g: Evaluated,
        values: Float[Tensor, "batch site *by"],
        by: tuple[str, ...] = (),
        *,
        method: str,
        at: float,
        **details: Any,
    ) -> Attribution:
        """Values of every site with their labels, and the exact shift beside them.

        Cost: two forward passes for the exact ends, unless g knows them.

        Args:
            g: the function of which they are values.
            values: in the readout's units.
            by: the axes after site.
            method: how they were computed.
            at: the gate value at which they were; NaN along a path.
            details: `quadrature`, `gauge`, `mode`.
        """
        lens = g.lens
        response = g.response_tokens() if "token" in by else ()
        return cls(
            values=within_response(values, response) if response else values,
            by=cast("tuple[PartAxis, ...]", by),
            heads=tuple(lens.heads.of(site.kind) for site in lens.sites),
            method=method,
            at=at,
            response=response,
            relative_norm=lens.plan.relative_norm,
            **details,
            **g.header(),
        )

    @property
    def is_violent(self) -> bool:
        """Whether this is first order of an adapter so large that it is often wrong."""
        return self.method.startswith("first_order") and self.relative_norm > VIOLENT

    @property
    def key(self) -> str:
        """'first_order@0', 'path', 'add_one': its stable name."""
        return base.key_of(self.method, self.at)

    @property
    def per_site(self) -> Float[Tensor, "batch site"]:
        """The values summed over everything but prompt and site."""
        return self.values.flatten(2).nansum(2) if self.by else self.values

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values summed over everything but prompt and output token; NaN beyond a response.

        Raises:
            ArgumentError: the attribution was not split by token.
        """
        if "token" not in self.by:
            raise ArgumentError("this attribution is not by token; ask for by='token'.")
        return self.values.flatten(1, -2).sum(1)

    @property
    def total(self) -> Float[Tensor, " batch"]:
        """Σ_l a_l."""
        return self.per_site.sum(1)

    @property
    def remainder(self) -> Float[Tensor, " batch"]:
        """R_y = g(1) − g(0) − Σ_l a_l (note, §4)."""
        return self.shift - self.total

    @property
    def nodes(self) -> int:
        """Quadrature nodes of a path integral; 1 for a derivative at one point."""
        return 1 if self.quadrature is None else self.quadrature.nodes

    @property
    def completeness_error(self) -> Float[Tensor, " batch"]:
        """|g(1) − g(0) − Σ_l c_l|: zero for an exact path integral."""
        return self.remainder.abs()

    def sum(self, group: Literal["site", "layer", "kind"]) -> pd.DataFrame:
        """Values summed by site, layer or kind of module: one row a group, one column a prompt.

        Args:
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another group.
        """
        labels = base.site_labels(self.sites)[word("group", group, ("site", "layer", "kind"))]
        frame = pd.DataFrame(self.per_site.T.cpu().double().numpy(), index=labels)
        summed = cast(pd.DataFrame, frame.groupby(level=0, sort=False).sum())
        return summed.rename_axis(index=group, columns="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """Each site's value, summed over the other axes."""
        labels = base.site_labels(self.sites)
        return Entries(labels, *self.mean_over(prompt, self.per_site), "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part: labels, token, value, share of the shift.

        By token, `t` counts the tokens of the response from 0, and `y_t` is that token.
        """
        index = self.exists.nonzero()
        columns: dict[str, Any] = {"prompt": index[:, 0].tolist()}
        columns |= base.site_labels([self.sites[i] for i in index[:, 1].tolist()])
        for axis, name in enumerate(self.by, start=2):
            columns["t" if name == "token" else name] = index[:, axis].tolist()
        prompts = columns["prompt"]
        if "token" in self.by:
            columns["y_t"] = base.tokens_at(self.response, prompts, columns["t"])
        if "position" in self.by:
            columns["token"] = base.tokens_at(self.str_tokens, prompts, columns["position"])
        parts = [name for name in _WITH_NONE if name in self.by]
        for name in parts:
            outside = self.values.shape[2 + self.by.index(name)] - 1
            columns[name] = [pd.NA if slot == outside else slot for slot in columns[name]]
        values = self.values.cpu()[tuple(index.T)].double()
        columns["value"] = values.tolist()
        columns["share"] = (values / self.shift.cpu().double()[index[:, 0]]).tolist()
        return pd.DataFrame(columns).astype(dict.fromkeys(parts, "Int64"))

    @property
    def exists(self) -> Bool[Tensor, "batch site *by"]:
        """Slots that a prompt or site really has."""
        lengths = {"position": self.str_tokens, "token": self.response}
        counts = {name: list(map(len, texts)) for name, texts in lengths.items()}
        counts |= {"head": list(self.heads), "rank": [site.rank for site in self.sites]}
        counts["expert"] = [site.experts for site in self.sites]
        exists = torch.ones(self.values.shape, dtype=torch.bool)
        for axis, name in enumerate(self.by, start=2):
            count, slots = torch.tensor(counts[name])[:, None], torch.arange(exists.shape[axis])
            mask = slots < count
            if name in _WITH_NONE:
                mask |= (count == 0) & (slots == slots[-1])
            owner = 1 if name in (*_WITH_NONE, "rank") else 0
            shape = [1] * exists.ndim
            shape[owner], shape[axis] = mask.shape
            exists &= mask.view(shape)
        return exists | (self.values.cpu().nan_to_num() != 0)

    def along(
        self, axis: PartAxis, prompt: int | None = None
    ) -> tuple[Float[Tensor, "site part"], Bool[Tensor, "site part"]]:
        """The values along one axis, the others summed, and which of them exist.

        Args:
            axis: one of `by`.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt, or an axis that the attribution was not split by.
        """
        if axis not in self.by:
            fact = f"the attribution is split by {self.by or 'nothing'}, not by {axis!r}"
            raise ArgumentError(f"{fact}; compute it with by={axis!r}.")
        rows = base.prompt_rows(prompt, len(self.base))
        values, exists = self.values[rows].cpu().double().mean(0), self.exists[rows].any(0)
        for dim, name in reversed(list(enumerate(self.by, start=1))):
            if name != axis:
                values, exists = values.nansum(dim), exists.any(dim)
        return values, exists

    def plot(self, prompt: int | None = None, by: ShownAxis | None = None) -> drawing.Figure:
        """Heatmap of what was asked for: the parts along an axis, or layer × kind of module.

        Args:
            prompt: an index; without it, the mean over prompts, whose spread the hover gives. By
                position and token, without it the only prompt.
            by: 'position' and 'token' layer by layer, 'head', 'expert' and 'rank' of the 40 sites
                with the largest part, or 'site', layer × kind of module, hover naming each site.
                By default the first axis that the attribution was split by and some site has parts
                along, else 'site'; the title says what is summed over.

        Raises:
            ArgumentError: no such prompt, or several and none named; the attribution was not split
                by that axis, or no site has parts along it.
        """
        return drawing.figure(self, prompt, by)

    def plot_positions(
        self, prompt: int | None = None, most: int | None = MOST_POSITIONS
    ) -> drawing.Figure:
        """Heatmap layer × position over one prompt's tokens; needs by=('position', …).

        Args:
            prompt: an index; without it, the only prompt.
            most: how many positions are shown, those of largest |value| in a layer, which the title
                says; None for all of them.

        Raises:
            ArgumentError: the attribution was not split by position; no such prompt, or several
                and none named; a `most` below 1.
        """
        return drawing.positions(self, prompt, most)

    def token_view(self, prompt: int | None = None) -> TokenView:
        """One prompt's tokens coloured by what each contributes, drawn by circuitsvis.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: the attribution was not split by position; no such prompt, or several
                and none named.
            LensLoraError: circuitsvis is not installed.
        """
        return drawing.tokens(self, prompt)


@final
class GroupAttribution(Ranked):
    """What each group of sites contributes to a readout, or to each token of a response.

    In the readout's units. `plot` is bars of groups; by token a heatmap group × token of one
    response.

    Attributes:
        values: [batch, group], or [batch, group, token] with NaN beyond a response's own tokens.
        groups: {name: indices into sites}, as in `Effects`.
        by: () or ('token',).
        method: how it was computed: 'first_order', 'first_order/patterns'.
        at: the gate value at which it was taken.
        mode: 'forward', a tangent for each group, or 'reverse', one way back, by token a covector
            for each token.
        response: each prompt's y_1 … y_T, where values are by token.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch group *token"]
    groups: Annotated[Groups, "group: site"]
    method: str
    at: float
    mode: str
    by: tuple[str, ...] = ("token",)
    response: Annotated[tuple[tuple[str, ...], ...], "batch token?"] = ()

    @property
    def key(self) -> str:
        """'first_order@0': its stable name."""
        return base.key_of(self.method, self.at)

    @property
    def per_group(self) -> Float[Tensor, "batch group"]:
        """The values summed over tokens."""
        return self.values.nansum(2) if self.by else self.values

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values summed over groups; NaN beyond a response.

        Raises:
            ArgumentError: the groups were not split by token.
        """
        if not self.by:
            raise ArgumentError("these groups are not by token; ask for by='token'.")
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group (and token): its value and share of the shift."""
        frame = base.long_table(
            {"value": self.values, "share": self.share_of(self.values)},
            {"prompt": range(len(self.values))},
            {"group": list(self.groups), "sites": list(map(len, self.groups.values()))},
            *([{"t": range(self.values.shape[2])}] if self.by else []),
        )
        if not self.by:
            return frame
        lengths = torch.tensor([len(tokens) for tokens in self.response])
        slots = torch.arange(self.values.shape[2])
        is_there = (slots < lengths[:, None])[:, None].expand(self.values.shape)
        frame = frame.loc[is_there.flatten().numpy()].reset_index(drop=True)
        frame.insert(4, "y_t", base.tokens_at(self.response, frame["prompt"], frame["t"]))
        return frame

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's value, summed over tokens."""
        groups = {"group": list(self.groups)}
        return Entries(groups, *self.mean_over(prompt, self.per_group), "value")


def within_response(
    values: Float[Tensor, "batch *rest token"], response: Sequence[Sequence[str]]
) -> Float[Tensor, "batch *rest token"]:
    """NaN beyond a response's own tokens."""
    lengths = torch.tensor([len(tokens) for tokens in response], device=values.device)
    exists = torch.arange(values.shape[-1], device=values.device) < lengths[:, None]
    return torch.where(exists.view(len(lengths), *[1] * (values.ndim - 2), -1), values, torch.nan)


# --- Effects of real interventions


@final
class Effects(Ranked):
    """What intervening on each group of sites does to a readout, exactly, in its units.

    `plot` is a heatmap layer × kind of single sites, or bars of groups.

    Attributes:
        values: [batch, group]. Positive where the group raises the readout.
        groups: {name: indices into sites}; single sites carry their own name.
        how: 'add_one', g(e_G) − g(0), or 'leave_one_out', g(1) − g(1 − e_G).
        of: 'site', or 'rank' where each group is one rank of its only site, as 'blocks.0.attn.q[2]'
            names it, in the coordinates of the SVD of ΔW; or 'edge', where one reader alone sees
            what the site writes, as 'blocks.0.attn.o → blocks.1.mlp' names it.
        replace: the stand-in for δ_G: 'zero', 'mean' or 'resample'.
        texts: the number of texts that the stand-in came from.
        noise_floor: [batch], σ of an effect from rounding alone; None where it was not measured.
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
        **details: Any,
    ) -> Effects:
        """Effects with their labels, the exact shift beside them, and their noise floor.

        An effect is a difference of two values of g near one end, both of which are rounded.

        Cost: two forward passes for the exact ends and four for the noise, unless g knows them.

        Args:
            g: the function of which they are differences.
            values: in the readout's units.
            groups: indices of sites, by name.
            how: 'add_one', near the base, or 'leave_one_out', near the adapted model.
            details: `of`, `replace`, `texts`.
        """
        noise_floor = g.noise((1.0, -1.0), at=float(how == "leave_one_out"))
        return cls(values, groups, how, noise_floor=noise_floor, **details, **g.header())

    @property
    def key(self) -> str:
        """'add_one', 'leave_one_out', 'leave_one_out/mean': its stable name."""
        return self.how if self.replace == "zero" else f"{self.how}/{self.replace}"

    @property
    def share(self) -> Float[Tensor, "batch group"]:
        """The effects as shares of the shift."""
        return self.share_of(self.values)

    @property
    def interaction(self) -> Float[Tensor, " batch"]:
        """g(1) − g(0) − Σ effects: of the shift, what no group does on its own.

        Raises:
            ArgumentError: the groups overlap or leave sites out, are ranks, or were replaced by
                something else than zero, so that their sum means nothing.
        """
        if self.of != "site" or self.replace != "zero":
            fact = f"the sum of effects of {self.of}s replaced by {self.replace} is no shift"
            raise ArgumentError(f"{fact}; use of='site', replace='zero'.")
        if not base.is_partition(self.groups, len(self.sites)):
            raise ArgumentError(
                "the groups do not hold every site exactly once, so their sum cannot be compared "
                "with the shift; use group='site', 'layer' or 'kind' over all sites."
            )
        return self.shift - self.values.sum(1)

    @property
    def is_by_site(self) -> bool:
        """Whether the groups are the single sites, all of them."""
        return self.of == "site" and base.is_by_site(self.groups, len(self.sites))

    def summed(self, attribution: Attribution) -> Float[Tensor, "batch group"]:
        """An attribution of the same sites, summed over each group.

        Args:
            attribution: one that the same lens gave.

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
        return attribution.per_site @ indicator(self.groups, len(names)).to(attribution.per_site).T

    def attribution(self) -> Attribution:
        """The effects of single sites, all or some, as an attribution: heatmap, table and file.

        Of single ranks they are split by rank.

        Raises:
            ArgumentError: the effects are of groups of several sites.
        """
        if self.of == "edge" or any(len(members) > 1 for members in self.groups.values()):
            use = "use group='site', with ll.patch_sites"
            raise ArgumentError(f"effects of groups, or of edges, are of no single sites; {use}.")
        chosen = dict.fromkeys(index for (index,) in self.groups.values())
        sites = tuple(self.sites[index] for index in chosen)
        names = {field.name for field in dataclasses.fields(Measured)} - {"sites"}
        labels: dict[str, Any] = {name: getattr(self, name) for name in names}
        labels |= {"sites": sites, "heads": (0,) * len(sites), "method": self.key}
        labels |= {"values": self.values, "by": (), "at": float(self.how == "leave_one_out")}
        if self.of == "rank":
            by_site = list(self.values.T.split([site.rank for site in sites]))
            values = pad_sequence(by_site, batch_first=True).permute(2, 0, 1)
            labels |= {"values": values, "by": ("rank",), "gauge": "svd"}
        return Attribution(**labels)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group: number of sites, effect, share of the shift."""
        sizes = [len(members) for members in self.groups.values()]
        numbers, prompts = {"effect": self.values, "share": self.share}, range(len(self.values))
        groups = {"group": list(self.groups), "sites": sizes}
        return base.long_table(numbers, {"prompt": prompts}, groups)

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's effect."""
        return Entries({"group": list(self.groups)}, *self.mean_over(prompt, self.values), "effect")

    def to_patching_result(self) -> Any:
        """TransformerLens's `PatchingResult`: its standard errors, intervals and p-values.

        Its `values` are the readout with each group switched, [group, batch], and its `baseline`
        the readout before: `effect()` is `values` here for add one, and their negative for leave
        one out. `normalized(…)` of the readout at the other end is `share`.

        Raises:
            LensLoraError: the installed transformer-lens has no such class (4.3 has).
            ArgumentError: add one with δ replaced, where each group has a baseline of its own.
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
            columns |= {"layer": [s.layer for s in sites], "kind": [s.kind for s in sites]}
        return patching_result(self, adds, pd.DataFrame(columns))


def patching_result(effects: Any, adds: bool, index: pd.DataFrame, axes: Sequence[str] = ()) -> Any:
    """Effects as TransformerLens's own class: patched readouts, and the run that was patched.

    Effects that add to the base are patched − g(0); all others g(1) − patched.

    Raises:
        LensLoraError: the installed transformer-lens has no such class.
    """
    cls = getattr(importlib.import_module("transformer_lens.patching"), "PatchingResult", None)
    if cls is None:
        raise LensLoraError("transformer-lens before 4.3 has no PatchingResult; use to_frame().")
    cells = effects.values.movedim(0, -1)
    baseline = effects.base if adds else effects.adapted
    patched = baseline + cells if adds else baseline - cells
    names = {"axis_names": list(axes), "metric_names": [effects.readout]}
    return cls(values=patched, index_df=index, reduced=False, baseline=baseline, **names)
