"""Attributions: what each site, or group of sites, contributes to a readout.

    Attribution         one number per prompt and site (and position, head, rank, output token)
    GroupAttribution    one number per prompt, group of sites and output token

The effects of real interventions are in `results/effects.py`.

A result carries its own check: the exact shift g(1) − g(0) stands beside the values, and their
difference from it is the property `remainder`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, cast, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.core.model.sites import Groups, Sites
from lens_lora.core.results import drawing, tables
from lens_lora.core.results.base import Entries, Evaluated, Ranked, Reported
from lens_lora.core.results.drawing import TokenView
from lens_lora.core.results.keys import key_of
from lens_lora.core.results.storage import stored
from lens_lora.errors import ArgumentError, MissingPartError
from lens_lora.guesses import fitting

Axis = Literal["position", "head", "expert", "rank", "token"]
# What a picture shows: the parts along an axis, or whole sites.
Shown = Literal["site", "position", "head", "expert", "rank", "token"]
# On these axes the last slot is for sites without heads, or without experts.
_WITH_NONE = ("head", "expert")
# On these axes each prompt has its own number of slots; on the others each site has.
_COUNTED_BY_PROMPT = ("position", "token")
# With more positions, the tokens of a heatmap are no longer legible.
MOST_POSITIONS = 40


@final
@stored
@dataclasses.dataclass(frozen=True)
class Quadrature:
    """How a path integral was computed, and whether it is as complete as was asked.

    Attributes:
        nodes: the number of Clenshaw–Curtis nodes of the last rule, which include the earlier ones.
        tol: the completeness error that was allowed, as a share of the shift.
        error: the largest completeness error over prompts, as a share of the prompt's shift.
        site_change: the largest change of a site's value between the last two rules, as a share of
            the prompt's shift, because completeness does not bound the error of a site.
        met: whether error ≤ tol, and rounding is small enough to tell.
        note: why tol was not reached, if there is a reason.
    """

    nodes: int
    tol: float
    error: float
    site_change: float
    met: bool
    note: str = ""


@final
class Attribution(Ranked, Reported):
    """The contribution of each site to a readout, in the readout's units.

    Its figures are in `views/maps.py`, its words in `views/attribution_words.py`, its page in
    `views/reports.py`.

    Attributes:
        values: [batch, site, *by]. Slots that do not exist hold zero (padding, ranks beyond those
            of a site) or NaN (tokens beyond the end of a response), and tables leave them out. On
            the axis of heads the last slot is for sites outside attention; on that of experts, for
            sites that are no stack of experts.
        by: the axes after site, in the order position, head, expert, rank, token.
        heads: the number of heads of each site; 0 outside attention.
        method: how it was computed: 'first_order', 'path', 'second_order', 'add_one', ….
        at: the gate value at which it was computed; NaN along a path.
        quadrature: how a path integral was computed; None for other methods.
        response: the tokens y_1 … y_T of each prompt's response, if values are by token.
        gauge: what a rank is, if values are by rank: 'trained' or 'svd'.
        mode: the mode in which a derivative was computed: 'reverse' or 'forward'.
        relative_norm: ‖ΔW‖ / ‖W‖ of the adapter, over the linear maps that it adapts; NaN if it is
            not known.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`; one site per
            entry of the site axis.
    """

    # Above this ‖ΔW‖ / ‖W‖, first order is not to be trusted. It was chosen, and then confirmed, on
    # trained adapters of SmolLM2-135M (docs/faithfulness.md).
    VIOLENT: ClassVar[float] = 0.038

    values: Float[Tensor, "batch site *by"]
    by: tuple[Axis, ...]
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
        gauge: str = "",
        mode: str = "",
        quadrature: Quadrature | None = None,
    ) -> Attribution:
        """Put labels to the values of every site, and add the exact shift.

        Cost: two forward passes for the exact ends, unless g knows them.

        Args:
            g: the function whose shift is attributed.
            values: the values, in the readout's units.
            by: the axes after site.
            method: how the values were computed.
            at: the gate value at which they were computed; NaN along a path.
            gauge: what a rank is; it is noted only for values that are split by rank.
            mode: the mode in which a derivative was computed.
            quadrature: how a path integral was computed.
        """
        lens = g.lens
        response: tuple[tuple[str, ...], ...] = ()
        if "token" in by:
            response = g.response_tokens()
            values = Attribution.within_response(values, response)
        if "rank" not in by:
            gauge = ""
        return cls(
            values=values,
            by=cast("tuple[Axis, ...]", by),
            heads=tuple(lens.heads.of(site.kind) for site in lens.sites),
            method=method,
            at=at,
            response=response,
            gauge=gauge,
            relative_norm=lens.plan.relative_norm,
            mode=mode,
            quadrature=quadrature,
            **g.header(),
        )

    @staticmethod
    def within_response(
        values: Float[Tensor, "batch *rest token"], response: Sequence[Sequence[str]]
    ) -> Float[Tensor, "batch *rest token"]:
        """Set values beyond the end of a response to NaN.

        Args:
            values: one value for each token of the responses, along the last axis.
            response: the tokens of each prompt's response, as strings.
        """
        lengths = torch.tensor([len(tokens) for tokens in response], device=values.device)
        exists = torch.arange(values.shape[-1], device=values.device) < lengths[:, None]
        between = [1] * (values.ndim - 2)
        return torch.where(exists.view(len(lengths), *between, -1), values, torch.nan)

    @property
    def is_violent(self) -> bool:
        """Whether this is first order of an adapter so large that it is often wrong."""
        return self.method.startswith("first_order") and self.relative_norm > self.VIOLENT

    @property
    def key(self) -> str:
        """Its stable name, such as 'first_order@0', 'path' or 'add_one'."""
        return key_of(self.method, self.at)

    @property
    def per_site(self) -> Float[Tensor, "batch site"]:
        """The values of each site, summed over all other axes."""
        return self.values.flatten(2).nansum(2) if self.by else self.values

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values of each output token, summed over all other axes; NaN beyond a response.

        Raises:
            MissingPartError: the attribution was not split by token.
        """
        if "token" not in self.by:
            raise MissingPartError("this attribution is not by token; ask for by='token'.")
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
        """The number of nodes of a path integral; 1 for a derivative at one point."""
        return 1 if self.quadrature is None else self.quadrature.nodes

    @property
    def completeness_error(self) -> Float[Tensor, " batch"]:
        """The completeness error |g(1) − g(0) − Σ_l c_l|, zero for an exact path integral."""
        return self.remainder.abs()

    @fitting
    def sum(self, group: Literal["site", "layer", "kind"]) -> pd.DataFrame:
        """Sum values by site, layer or kind of module: one row per group, one column per prompt.

        Args:
            group: 'site', 'layer' or 'kind'.

        Raises:
            ArgumentError: another group.
        """
        labels = Sites(self.sites).columns()[word("group", group, ("site", "layer", "kind"))]
        frame = pd.DataFrame(self.per_site.T.cpu().double().numpy(), index=labels)
        summed = cast(pd.DataFrame, frame.groupby(level=0, sort=False).sum())
        return summed.rename_axis(index=group, columns="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """The value of each site, summed over all other axes."""
        values, shift = self.mean_over(prompt, self.per_site)
        return Entries(Sites(self.sites).columns(), values, shift, "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and part that exists: labels, value, share of the shift.

        By token, `t` counts the tokens of the response from 0, and `y_t` is that token.
        """
        index = self.exists.nonzero()
        prompts = index[:, 0].tolist()
        sites = [self.sites[site] for site in index[:, 1].tolist()]
        columns: dict[str, Any] = {"prompt": prompts, **Sites(sites).columns()}
        for axis, name in enumerate(self.by, start=2):
            slots: Any = index[:, axis].tolist()
            if name in _WITH_NONE:
                # The last slot stands for a site without heads or experts.
                is_none = (index[:, axis] == self.values.shape[axis] - 1).cpu().numpy()
                slots = pd.array(slots, dtype="Int64")
                slots[is_none] = pd.NA
            column = "t" if name == "token" else name
            columns[column] = slots
        if "token" in self.by:
            columns["y_t"] = tables.tokens_at(self.response, prompts, columns["t"])
        if "position" in self.by:
            columns["token"] = tables.tokens_at(self.str_tokens, prompts, columns["position"])
        values = self.values.cpu()[tuple(index.T)].double()
        shift = self.shift.cpu().double()[index[:, 0]]
        columns["value"] = values.tolist()
        columns["share"] = (values / shift).tolist()
        return pd.DataFrame(columns)

    @property
    def exists(self) -> Bool[Tensor, "batch site *by"]:
        """The mask of slots that a prompt or a site really has; the others are padding."""
        exists = torch.ones(self.values.shape, dtype=torch.bool)
        for axis, name in enumerate(self.by, start=2):
            slots = torch.arange(self.values.shape[axis])
            count = torch.tensor(self._slot_counts(name))[:, None]
            # [prompt or site, slot]
            existing = slots < count
            if name in _WITH_NONE:
                existing |= (count == 0) & (slots == slots[-1])
            owner_axis = 0 if name in _COUNTED_BY_PROMPT else 1
            shape = [1] * exists.ndim
            shape[owner_axis] = len(existing)
            shape[axis] = len(slots)
            exists &= existing.view(shape)
        has_value = self.values.cpu().nan_to_num() != 0
        return exists | has_value

    def _slot_counts(self, axis: Axis) -> list[int]:
        """The number of parts that each prompt, or each site, has along an axis."""
        if axis == "position":
            return [len(tokens) for tokens in self.str_tokens]
        if axis == "token":
            return [len(tokens) for tokens in self.response]
        if axis == "head":
            return list(self.heads)
        if axis == "expert":
            return [site.experts for site in self.sites]
        return [site.rank for site in self.sites]

    def along(
        self, axis: Axis, prompt: int | None = None
    ) -> tuple[Float[Tensor, "site part"], Bool[Tensor, "site part"]]:
        """The values along one axis, summed over the others, and which of them exist.

        Args:
            axis: one of `by`.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt, or an axis that the attribution was not split by.
        """
        if axis not in self.by:
            fact = f"the attribution is split by {self.by or 'nothing'}, not by {axis!r}"
            raise ArgumentError(f"{fact}; compute it with by={axis!r}.")
        rows = self.prompt_rows(prompt)
        values = self.values[rows].cpu().double().mean(0)
        exists = self.exists[rows].any(0)
        others = [dim for dim, name in enumerate(self.by, start=1) if name != axis]
        for dim in reversed(others):
            values = values.nansum(dim)
            exists = exists.any(dim)
        return values, exists

    def plot(self, prompt: int | None = None, by: Shown | None = None) -> drawing.Figure:
        """A heatmap of the parts along an axis, or of whole sites, layer × kind of module.

        Args:
            prompt: an index; without it, the mean over prompts, whose spread is shown on hovering.
                By position and by token there is no mean, and the only prompt is shown.
            by: 'position' and 'token' show each layer; 'head', 'expert' and 'rank' the 40 sites
                with the largest part; 'site' layer × kind of module. By default the first axis
                along which some site has parts, else 'site'. The title says what is summed over.

        Raises:
            ArgumentError: no such prompt; several prompts, and none is named; the attribution was
                not split by that axis, or no site has parts along it.
        """
        return drawing.figure(self, prompt, by)

    def plot_positions(
        self, prompt: int | None = None, most: int | None = MOST_POSITIONS
    ) -> drawing.Figure:
        """A heatmap layer × position over one prompt's tokens; needs by=('position', …).

        Args:
            prompt: an index; without it, the only prompt.
            most: how many positions are shown, namely those with the largest |value| in a layer, as
                the title says; None for all of them.

        Raises:
            ArgumentError: the attribution was not split by position; no such prompt; several
                prompts, and none is named; `most` below 1.
        """
        return drawing.positions(self, prompt, most)

    def token_view(self, prompt: int | None = None) -> TokenView:
        """The tokens of one prompt, coloured by what each contributes, drawn by circuitsvis.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: the attribution was not split by position; no such prompt; or several
                prompts, and none is named.
            LensLoraError: circuitsvis is not installed.
        """
        return drawing.tokens(self, prompt)


@final
class GroupAttribution(Ranked):
    """The contribution of each group of sites to a readout, or to each token of a response.

    In the readout's units. `plot` is bars of groups; by token a heatmap group × token of one
    response.

    Attributes:
        values: [batch, group], or [batch, group, token] with NaN beyond a response's own tokens.
        groups: {name: indices into sites}, as in `Effects`.
        by: () or ('token',).
        method: how it was computed: 'first_order', 'first_order/patterns'.
        at: the gate value at which it was taken.
        mode: 'forward', with a tangent for each group; or 'reverse', with one backward pass, or by
            token with a covector for each token.
        response: the tokens y_1 … y_T of each prompt's response, if values are by token.
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
        """Its stable name, such as 'first_order@0'."""
        return key_of(self.method, self.at)

    @property
    def per_group(self) -> Float[Tensor, "batch group"]:
        """The values summed over tokens."""
        return self.values.nansum(2) if self.by else self.values

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values summed over groups; NaN beyond a response.

        Raises:
            MissingPartError: the groups were not split by token.
        """
        if not self.by:
            raise MissingPartError("these groups are not by token; ask for by='token'.")
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and group (and token): its value and share of the shift."""
        numbers = {"value": self.values, "share": self.share_of(self.values)}
        prompts = {"prompt": range(len(self.values))}
        groups = Sites(self.sites).columns_of_groups(self.groups)
        if not self.by:
            return tables.long_table(numbers, prompts, groups)
        slots = torch.arange(self.values.shape[2])
        frame = tables.long_table(numbers, prompts, groups, {"t": slots.tolist()})
        lengths = torch.tensor([len(tokens) for tokens in self.response])
        has_token = slots < lengths[:, None]
        in_each_group = has_token[:, None].expand(self.values.shape)
        frame = frame.loc[in_each_group.flatten().numpy()].reset_index(drop=True)
        tokens = tables.tokens_at(self.response, frame["prompt"], frame["t"])
        after_t = list(frame).index("t") + 1
        frame.insert(after_t, "y_t", tokens)
        return frame

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's value, summed over tokens."""
        values, shift = self.mean_over(prompt, self.per_group)
        labels = Sites(self.sites).columns_of_groups(self.groups, sizes=False)
        return Entries(labels, values, shift, "value")
