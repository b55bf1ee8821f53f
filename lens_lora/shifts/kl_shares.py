"""The quadratic part of a KL, split exactly over the sites: q_l = ½ v_lᵀ F v.

At every token t of the response, with p₀ the base model's distribution,

    v_l = J δz_l,    v = Σ_l v_l,    F_t = diag p₀,t − p₀,t p₀,tᵀ
    D(ε·1) = ½ ε² Σ_t vᵀ F_t v + O(ε³),    Σ_l q_l = ½ vᵀ F v

1. One dual forward pass gives p₀ and v, the tangent of all sites together, and keeps the graph of
   f(0).
2. The covector F v goes back through the graph: ∂/∂ε_l of (F v)ᵀf is v_lᵀ F v. It is split by
   position, head and rank like any readout (`g.pulled_back`).
3. On request, the kernel between sites or groups is computed, from a tangent for each:

       K_lm = Σ_t v_lᵀ F_t v_m = w_l · w_m,    w_l = √p₀ ∘ (v_l − p₀ᵀv_l)

   K is symmetric and positive semidefinite, and sums to vᵀ F v.
4. The divergence itself is measured along ε by forward passes, beside its quadratic part.
5. To see whether the shares rank the sites as the whole divergence does, they are compared with
   ∂D/∂ε_l at ε = ½. This is the path integral of D by a rule of one node, and equals q_l if D is
   quadratic. It takes one forward and one backward pass.

A share is negative if a site moves the distribution against the others.

Cost: two forward passes, a dual forward pass and two backward passes, and one more forward pass for
each ε below 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Literal, final, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.arguments import numbers_of, word
from lens_lora.core import (
    AnswerLike,
    Attribution,
    Evaluations,
    Function,
    Gauge,
    Groups,
    LoraLens,
    OfMeasured,
    Prompts,
    PromptsLike,
    Shown,
    Sites,
    alone,
    by_axes,
    drawing,
    tables,
)
from lens_lora.correlation import correlation
from lens_lora.errors import ArgumentError
from lens_lora.responses.kl import KL, ReadTokens, with_base

_Kernel = Literal["site", "layer", "kind"]
# The strengths at which the divergence is compared with its quadratic part.
_SCALES = (0.03, 0.1, 0.3, 0.5, 0.7, 0.85)
# With at least this rank correlation, the verdict is that the shares rank the sites; it was chosen
# and confirmed in docs/faithfulness.md.
_RANKED = 0.9


@final
@dataclasses.dataclass(frozen=True)
class SharesVerdict:
    """Whether shares of a KL's quadratic part rank the sites as the whole KL does, on one prompt.

    Attributes:
        ratio: the divergence at ε = 1 over the quadratic.
        agreement: the rank correlation of the shares with the gradient of the KL at ε = ½.
    """

    ratio: float
    agreement: float

    def __str__(self) -> str:
        return drawing.text(self)

    @property
    def kind(self) -> Literal["holds", "fails", "unknown"]:
        """'holds' if the ranks agree, 'fails' if not, 'unknown' without a rank correlation."""
        if math.isnan(self.agreement):
            return "unknown"
        return "holds" if self.agreement >= _RANKED else "fails"


@final
class KLShares(OfMeasured):
    """The share of each site in the divergence of both distributions, to second order in ε.

    Attributes:
        attribution: q_l in nats, split along the axes of `by`; its ends are D(0) = 0 and D(1),
            exact.
        scales: ε along the path, the last one 1.
        divergence: [batch, scale], D(ε·1), exact.
        midpoint: [batch, site], ∂D/∂ε_l at ε = ½, in nats: the path integral of the divergence by
            one node, which would be q_l if D were quadratic.
        gram: [batch, group, group], the kernel K between the groups, in nats; None if it was not
            computed.
        groups: the groups of the kernel, {name: indices into sites}.
    """

    attribution: Attribution
    scales: Float[Tensor, " scale"]
    divergence: Float[Tensor, "batch scale"]
    midpoint: Float[Tensor, "batch site"]
    gram: Float[Tensor, "batch group group"] | None = None
    groups: Annotated[Groups, "group?"] = dataclasses.field(default_factory=dict)

    @property
    def measured(self) -> Attribution:
        """The attribution, with its exact ends."""
        return self.attribution

    @property
    def quadratic(self) -> Float[Tensor, " batch"]:
        """½ vᵀ F v, the sum of all shares: what D would be at ε = 1 if it were quadratic."""
        return self.attribution.total

    @property
    def ratio(self) -> Float[Tensor, "batch scale"]:
        """D(ε) over ε² ½ vᵀ F v, which is 1 if the divergence is quadratic up to ε."""
        return self.divergence / (self.scales**2 * self.quadratic[:, None])

    @property
    def agreement(self) -> Float[Tensor, " batch"]:
        """Rank correlation of the shares with `midpoint`; NaN for one site, or for equal shares."""
        shares = self.attribution.per_site.cpu().double().numpy()
        slopes = self.midpoint.cpu().double().numpy()
        correlations: list[float] = []
        for shares_of_prompt, slopes_of_prompt in zip(shares, slopes, strict=True):
            correlations.append(correlation(shares_of_prompt, slopes_of_prompt, ranked=True))
        return torch.tensor(correlations, dtype=torch.float64)

    @property
    def verdict(self) -> tuple[SharesVerdict, ...]:
        """For each prompt, whether the shares rank the sites as the whole KL does."""
        ratios = self.ratio[:, -1].cpu().double().tolist()
        agreements = self.agreement.tolist()
        return tuple(
            SharesVerdict(ratio, agreement)
            for ratio, agreement in zip(ratios, agreements, strict=True)
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and existing part, with its share of the quadratic."""
        frame = self.attribution.to_frame().drop(columns="share")
        by_prompt = self.quadratic.cpu().double().numpy()
        by_row = by_prompt[frame["prompt"].to_numpy()]
        return frame.assign(share=frame["value"] / by_row)

    def along(self) -> pd.DataFrame:
        """One row per prompt and ε: the divergence, the quadratic, and their ratio."""
        quadratic = self.scales**2 * self.quadratic[:, None]
        numbers = {"divergence": self.divergence, "quadratic": quadratic, "ratio": self.ratio}
        prompts = {"prompt": range(len(self.divergence))}
        return tables.long_table(numbers, prompts, {"scale": self.scales.tolist()})

    def kernel(self, group: _Kernel = "layer", prompt: int | None = None) -> pd.DataFrame:
        """The kernel K_lm = Σ_t v_lᵀ F_t v_m between sites or groups, in nats, labelled.

        Half its sum is the quadratic, and half the sum of a site's row is the site's share.

        Args:
            group: 'site', 'layer' or 'kind'. A kernel between sites gives all of them; a kernel
                between layers or kinds gives only that one.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: the kernel was not computed, or only between groups of which these do not
                consist; or there is no such prompt.
        """
        if self.gram is None:
            raise ArgumentError(
                "this result holds no kernel, which takes a tangent for each site or group",
                remedy=f"ask for it: ll.kl_shares(…, kernel={group!r}).",
            )
        wanted = Sites(self.attribution.sites).grouped(group)
        members = self._members(wanted).to(self.gram)
        if not bool((members.sum(0) == 1).all()):
            raise ArgumentError(
                f"the kernel is between {len(self.groups)} groups, such as "
                f"{next(iter(self.groups))!r}, which do not make up each {group}",
                remedy=f"ask for it: ll.kl_shares(…, kernel={group!r}).",
            )
        between = members @ self.gram @ members.T
        rows = self.prompt_rows(prompt)
        kernel = between[rows].cpu().double().mean(0)
        names = list(wanted)
        return pd.DataFrame(kernel.numpy(), index=names, columns=names)

    def _members(self, wanted: Groups) -> Float[Tensor, "wanted group"]:
        """1 where a group of the kernel lies within a wanted one."""
        parts = [set(sites) for sites in self.groups.values()]
        rows: list[list[float]] = []
        for sites in wanted.values():
            rows.append([float(part <= set(sites)) for part in parts])
        return torch.tensor(rows)

    def top(self, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k sites of largest share.

        Args:
            k: the number of sites.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.attribution.top(k, prompt).drop(columns="share")

    def plot(self, prompt: int | None = None, by: Shown | None = None) -> drawing.Figure:
        """A heatmap of the shares, as `Attribution.plot` draws them.

        Args:
            prompt: an index; without it, the mean over prompts; by position, the only prompt.
            by: an axis along which they were split, or 'site'; by default the first such axis, or
                'site' if there is none.

        Raises:
            ArgumentError: no such prompt, or several and none named; or an axis along which they
                were not split.
        """
        return drawing.figure(self.attribution, prompt, by)


@alone
def kl_shares(
    lens: LoraLens,
    prompts: PromptsLike,
    response: AnswerLike | None = None,
    *,
    by: tuple[str, ...] | str = (),
    gauge: Gauge = "trained",
    direction: Literal["base_to_adapted", "adapted_to_base"] = "base_to_adapted",
    tokens: ReadTokens | None = None,
    scales: Sequence[float] = _SCALES,
    kernel: _Kernel | None = None,
    max_memory: float | None = None,
    progress: bool = True,
) -> KLShares:
    """The share q_l = ½ v_lᵀ F v of every site: a complete split of the quadratic KL.

    Both directions have the same quadratic; they differ in the divergence that it is compared with.
    A trained adapter at full strength is seldom near enough to the base for these shares to rank
    its sites: `verdict` says whether they do, and what to use if not.

    Cost: about 4 forward passes for the shares and the divergence at 1, one forward and one
    backward pass for the verdict, and one more forward pass for each scale. The kernel adds a
    tangent for each group, about half a dual forward pass each, and holds one number for each
    group, token of the response and token of the vocabulary.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        response: the response to each prompt; None for only the next token.
        by: axes along which the shares are split: any of 'position', 'head', 'expert', 'rank'.
        gauge: the gauge of the parts by rank, as for `first_order`.
        direction: the direction of the divergence along ε.
        tokens: without a response, the tokens after which it is read, as for `KL`: 'prompt' for all
            of a text except the first.
        scales: strengths ε, beside 1, at which the divergence is measured; () for none.
        kernel: also compute K between sites, layers or kinds, which `.kernel(group)` of the result
            returns.
        max_memory: bytes beside the model and the result, as for `lens.within`, whose bound it
            replaces.
        progress: show a bar.

    Raises:
        ArgumentError: another axis, gauge or direction, tokens beside a response, a gauge 'svd'
            without 'rank', a scale that is not between 0 and 1, or less memory than one tangent
            takes.
        ModelStateError: the model has an operation without a forward-mode derivative.
        TokenError, PromptError: a response or prompt that does not fit the model.
        NumericsError: a derivative is not finite; the error names the site.
    """
    axes = by_axes(by)
    strengths = _strengths(scales)
    groups: Groups = {}
    if kernel is not None:
        word("kernel", kernel, get_args(_Kernel))
        groups = lens.sites.grouped(kernel)
    if max_memory is not None:
        lens = lens.within(max_memory)
    f = lens.function(prompts, progress=progress)
    readout = KL(response, direction, tokens).on(f.prompts)
    reading = readout.reading(lens.model, f.prompts)

    # This reading does not know p₀ yet, and is not asked for it: the pass that gives the shares
    # gives f(0) as well, from which the divergence is computed.
    without_base = f.over(lens.in_gauge(gauge, axes)).about(readout, reading)
    doubled_shares, base_logits = without_base.pulled_back(_times_fisher, axes)
    g = Evaluations(f.about(readout, with_base(readout, reading, base_logits)))
    # D(0) = 0 by definition.
    g.know(0.0, torch.zeros(reading.batch, dtype=lens.gate_dtype, device=lens.device))
    # The pass for these slopes also gives D(0.5), which may be one of the strengths.
    midpoint = g.slopes(0.5)
    divergence = g.along(strengths).T
    gram = None
    if groups:
        gram = _gram(g, base_logits.softmax(-1), groups)
    attribution = Attribution.of(
        g,
        doubled_shares / 2,
        axes,
        method="kl_quadratic",
        at=0.0,
        gauge=gauge,
    )
    return KLShares(
        attribution=attribution,
        scales=lens.gates(0.0).new_tensor(strengths),
        divergence=divergence,
        midpoint=midpoint,
        gram=gram,
        groups=groups,
    )


def _strengths(scales: Sequence[float]) -> list[float]:
    """The strengths at which the divergence is measured, in increasing order, and last 1."""
    below_1 = numbers_of("scales", scales)
    if not all(0 < scale < 1 for scale in below_1):
        raise ArgumentError(f"scales={scales!r}: expected strengths between 0 and 1.")
    return [*sorted(below_1), 1.0]


def _times_fisher(
    f: Float[Tensor, "row *slot vocab"], v: Float[Tensor, "row *slot vocab"], rows: Prompts
) -> Float[Tensor, "row *slot vocab"]:
    """F v = p₀ ∘ (v − p₀ᵀv) at each slot that holds a token, and zero elsewhere."""
    p = f.softmax(-1)
    return p * _centred(p, v) * _mask(rows, v)


def _centred(p: Tensor, v: Tensor) -> Tensor:
    """The shift minus its mean: v − p₀ᵀv."""
    return v - (p * v).sum(-1, keepdim=True)


def _gram(
    g: Function, p: Float[Tensor, "row *slot vocab"], groups: Groups
) -> Float[Tensor, "row group group"]:
    """The kernel K, from a tangent for each group."""
    root = (p * _mask(g.rows, p)).sqrt()[:, None]

    def weighted(tangents: Tensor) -> Float[Tensor, "row group *slot vocab"]:
        """√p₀ ∘ (v − p₀ᵀv), whose products are those of F."""
        return root * _centred(p[:, None], tangents)

    members = g.lens.sites.indicator(groups)
    w = g.tangent(members, read=weighted).movedim(0, 1).flatten(2)
    return w @ w.transpose(1, 2)


def _mask(rows: Prompts, like: Tensor) -> Tensor:
    """1 at each slot that holds a token, as wide as `like`."""
    mask = rows.read_mask.to(like)
    return mask[..., None] if like.ndim == 3 else mask
