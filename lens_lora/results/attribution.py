"""Attributions: what each site, or group of sites, contributes to a readout, frozen and labelled.

    Attribution         one number per prompt and site (and position, head, rank, output token)
    GroupAttribution    one number per prompt, group of sites and output token

A result carries its own check: the exact shift g(1) − g(0) stands beside the values, and what they
leave of it is the property `remainder`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, cast, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import word
from lens_lora.errors import ArgumentError
from lens_lora.model.sites import Groups
from lens_lora.results import drawing
from lens_lora.results.base import Entries, Ranked, key_of, prompt_rows, site_labels, tokens_at
from lens_lora.results.drawing import TokenView
from lens_lora.results.storage import stored

Axis = Literal["position", "head", "expert", "rank", "token"]
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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
    by: tuple[Axis, ...]
    heads: Annotated[tuple[int, ...], "site: head"]
    method: str
    at: float
    quadrature: Quadrature | None = None
    response: Annotated[tuple[tuple[str, ...], ...], "batch token?"] = ()
    gauge: str = ""
    mode: str = ""
    relative_norm: float = math.nan

    @property
    def is_violent(self) -> bool:
        """Whether this is first order of an adapter so large that it is often wrong."""
        return self.method.startswith("first_order") and self.relative_norm > VIOLENT

    @property
    def key(self) -> str:
        """'first_order@0', 'path', 'add_one': its stable name."""
        return key_of(self.method, self.at)

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
        labels = site_labels(self.sites)[word("group", group, ("site", "layer", "kind"))]
        frame = pd.DataFrame(self.per_site.T.cpu().double().numpy(), index=labels)
        summed = cast(pd.DataFrame, frame.groupby(level=0, sort=False).sum())
        return summed.rename_axis(index=group, columns="prompt")

    def entries(self, prompt: int | None = None) -> Entries:
        """Each site's value, summed over the other axes."""
        return Entries(site_labels(self.sites), *self.mean_over(prompt, self.per_site), "value")

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part: labels, token, value, share of the shift.

        By token, `t` counts the tokens of the response from 0, and `y_t` is that token.
        """
        index = self.exists.nonzero()
        columns: dict[str, Any] = {"prompt": index[:, 0].tolist()}
        columns |= site_labels([self.sites[i] for i in index[:, 1].tolist()])
        for axis, name in enumerate(self.by, start=2):
            columns["t" if name == "token" else name] = index[:, axis].tolist()
        prompts = columns["prompt"]
        if "token" in self.by:
            columns["y_t"] = tokens_at(self.response, prompts, columns["t"])
        if "position" in self.by:
            columns["token"] = tokens_at(self.str_tokens, prompts, columns["position"])
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
        self, axis: Axis, prompt: int | None = None
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
        rows = prompt_rows(prompt, len(self.base))
        values, exists = self.values[rows].cpu().double().mean(0), self.exists[rows].any(0)
        for dim, name in reversed(list(enumerate(self.by, start=1))):
            if name != axis:
                values, exists = values.nansum(dim), exists.any(dim)
        return values, exists

    def plot(self, prompt: int | None = None, by: Axis | None = None) -> drawing.Figure:
        """Heatmap layer × kind of module, hover naming each site; or of the parts along an axis.

        Args:
            prompt: an index; without it, the mean over prompts, whose spread the hover gives. By
                position and token, without it the only prompt.
            by: None, or an axis that the attribution was split by: 'head', 'expert' and 'rank' of
                the 40 sites with the largest part, 'position' and 'token' layer by layer.

        Raises:
            ArgumentError: no such prompt, or several and none named; the attribution was not split
                by that axis.
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
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class GroupAttribution(Ranked):
    """What each group of sites contributes to each token of a response, in the readout's units.

    `plot` is a heatmap group × token of one response.

    Attributes:
        values: [batch, group, token]; NaN beyond a response's own tokens.
        groups: {name: indices into sites}, as in `Effects`.
        method: how it was computed: 'first_order', 'first_order/patterns'.
        at: the gate value at which it was taken.
        mode: 'forward', a tangent for each group, or 'reverse', a covector for each token.
        response: each prompt's y_1 … y_T.
        sites, base, adapted, str_tokens, readout, units, meta: see `Measured`.
    """

    values: Float[Tensor, "batch group token"]
    groups: Annotated[Groups, "group: site"]
    method: str
    at: float
    mode: str
    response: Annotated[tuple[tuple[str, ...], ...], "batch token"]

    @property
    def key(self) -> str:
        """'first_order@0': its stable name."""
        return key_of(self.method, self.at)

    @property
    def per_group(self) -> Float[Tensor, "batch group"]:
        """The values summed over tokens."""
        return self.values.nansum(2)

    @property
    def per_token(self) -> Float[Tensor, "batch token"]:
        """The values summed over groups; NaN beyond a response."""
        return self.values.sum(1)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, group and token of its response: its value and share of the shift."""
        values, shares = self.values.tolist(), self.share_of(self.values).tolist()
        rows = [
            (p, name, len(members), t, token, values[p][g][t], shares[p][g][t])
            for p, tokens in enumerate(self.response)
            for g, (name, members) in enumerate(self.groups.items())
            for t, token in enumerate(tokens)
        ]
        columns = ["prompt", "group", "sites", "t", "y_t", "value", "share"]
        return pd.DataFrame(rows, columns=columns)

    def entries(self, prompt: int | None = None) -> Entries:
        """Each group's value, summed over tokens."""
        groups = {"group": list(self.groups)}
        return Entries(groups, *self.mean_over(prompt, self.per_group), "value")
