"""The direction between two sets of texts in one model, and whether it tells new texts apart.

1. Each text i has one vector m_i at each hook point, the mean of h over the chosen positions. So a
   long text counts as much as a short one, and the texts are the independent samples. Sinks (the
   first token, and tokens whose ‖h‖ is an outlier) are left out, because they would dominate it.
2. The direction is μ₊ − μ₋, the difference of the two sets' means. Its standard errors are those of
   a difference of means over texts, √(s₊²/n₊ + s₋²/n₋). With no true difference, ‖μ₊ − μ₋‖² would
   be Σ se² on average.
3. Accuracy is judged on held-out texts. For every pair of a positive text i and a negative text j,
   the direction of all other texts is

       d_ij = μ₊ without i − μ₋ without j,

   and the pair is told apart if d_ij·(m_i − m_j) > 0. The share of such pairs is an AUC on texts
   that had no part in their direction; by chance it is ½. It needs only the products m_i·m_j, and
   is compared with the 95 % quantile of the same share with the labels shuffled.
4. At points of the residual stream the direction is read through the final norm and the
   unembedding. The norm's denominator is that of the texts' means, averaged
   (`stream/stream_reading.py`).

Cost: one forward pass.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, final

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import (
    Adapter,
    ChosenPositions,
    LoraLens,
    Names,
    Pictured,
    Positions,
    Prompts,
    Scale,
    alone,
)
from lens_lora.errors import ArgumentError, SiteError, warn
from lens_lora.stream.cosines import cosine_table
from lens_lora.stream.point_activations import (
    TextsLike,
    activations_at,
    positions_in,
    text_rows,
)
from lens_lora.stream.readable import Readable, readable
from lens_lora.stream.site_activations import sinks_among

# At most this number of texts of each set, evenly spread, are compared in pairs; more take long.
_HELD_OUT = 128
# How often the labels are shuffled, and the quantile of the AUC over these shuffles.
_SHUFFLES = 200
_LEVEL = 0.95
# The kinds of linear map whose output is the last that is added before a hook point of a block.
_AFTER_ATTENTION = ("o",)
_AFTER_MLP = ("down", "fc_out")
_KINDS_BEFORE: dict[str, tuple[str, ...]] = {
    "resid_mid": _AFTER_ATTENTION,
    "attn_out": _AFTER_ATTENTION,
    "resid_post": _AFTER_MLP,
    "out": _AFTER_MLP,
    "mlp_out": _AFTER_MLP,
}


@final
class Contrast(Readable, Pictured):
    """The difference μ₊ − μ₋ between two sets of texts, for every call that takes a direction.

    `plot` shows the held-out AUC and ‖μ₊ − μ₋‖ / ‖m‖ by hook point, beside the AUC by chance.

    Attributes:
        values: [d] by hook point, μ₊ − μ₋, with the axis of heads flattened.
        errors: [d] by hook point, standard errors; NaN if a set has one text.
        sizes: the mean ‖m_i‖ over all texts, by hook point.
        auc: the share of held-out pairs told apart, by hook point; NaN if a set has one text.
        chance: the 95 % quantile of `auc` with the labels shuffled, by hook point.
        modules: the Hugging Face module whose output joins the residual stream at each hook point,
            to which a constant can be added (`adapter`).
        widths: the number of features that each of these modules reads.
        counts: the number of texts in the positive and in the negative set, without repeats.
        positions: the positions that a text's mean is over, and whether sinks are among them.
        at: the gates of the model.
        readings, strings, meta: see `Readable`.
    """

    values: Annotated[Mapping[str, Float[Tensor, " _d"]], "point"]
    errors: Annotated[Mapping[str, Float[Tensor, " _d"]], "point"]
    sizes: Annotated[Mapping[str, float], "point"]
    auc: Annotated[Mapping[str, float], "point"]
    chance: Annotated[Mapping[str, float], "point"]
    modules: Mapping[str, str]
    widths: Mapping[str, int]
    counts: tuple[int, int]
    positions: str
    at: str

    @property
    def by_point(self) -> Mapping[str, Float[Tensor, " _d"]]:
        """The direction by hook point, as every call that takes directions reads it."""
        return self.values

    def cosine(self, other: Any) -> pd.DataFrame:
        """The cosine with other directions: one row per hook point and direction.

        Args:
            other: a Contrast or ActivationShift, point by point; [d], [direction, d], {label:
                either}, a sparse autoencoder, alone or as (autoencoder, indices); or a lens, for
                what its sites write.

        Returns:
            A data frame: point, direction, index, cosine.

        Raises:
            ArgumentError: directions have another width or space, or there is none at a point.
            ModelStateError: `other` is a lens with a norm that changes what a site writes.
        """
        return cosine_table(self.values, other)

    def adapter(self, name: str, coefficient: float = 1.0) -> Adapter:
        """An adapter that adds `coefficient` times the direction at the hook point, to steer.

        It changes the bias of the module that writes there. So the direction is added at every
        token, also at a text's first one, which the means leave out unless `sinks` were counted.
        At coefficient 1 the negative set's mean moves to the positive one's.

        Args:
            name: one of the contrast's points in the residual stream, or the output of attention
                or of an MLP.
            coefficient: a finite number; negative ones steer away.

        Raises:
            SiteError: the contrast lacks the point, or no linear module writes at it.
            ArgumentError: the coefficient is not a finite number.
        """
        path = self.modules.get(name)
        if path is None:
            raise SiteError(
                f"{name!r}: no linear module writes straight to such a point, or it is not among "
                f"{list(self.values)[:4]}; a constant can be added at {list(self.modules)[:4]}."
            )
        factor = number("coefficient", coefficient)
        constant = {path: factor * self.values[name]}
        return Adapter.constant(constant, self.widths, name=f"{coefficient:g} at {name}")

    def to_frame(self) -> pd.DataFrame:
        """One row per hook point: ‖μ₊ − μ₋‖, its noise √Σse², its ratio to ‖m‖, AUC and chance."""
        sizes = [float(value.double().norm()) for value in self.values.values()]
        noise = [float(error.double().norm()) for error in self.errors.values()]
        table = pd.DataFrame({"point": self.names, "size": sizes, "standard_error": noise})
        return table.assign(
            share=table["size"] / list(self.sizes.values()),
            auc=list(self.auc.values()),
            chance=list(self.chance.values()),
        )


@alone
def contrast(
    lens: LoraLens,
    positive: TextsLike,
    negative: TextsLike,
    names: Names,
    positions: Positions | Literal["last"] = "response",
    scale: Scale = 1.0,
    *,
    sinks: bool = False,
) -> Contrast:
    """The mean difference of activations between two sets of texts, within one model.

    Cost: one forward pass of every text. One vector is held for each text and hook point.

    Args:
        lens: the adapter over the model.
        positive: texts in any form that prompts may have; a tuple (prompts, responses), as
            `ll.lora_activations` takes them; or the result of `lens.generate`. So a tuple of two
            strings is one text, a prompt and its response; pass two texts in a list. A text that is
            repeated counts once.
        negative: the other set; the direction points away from it.
        names: a hook point, several, globs, or a predicate. A point named in full must fire and
            hold activations by position, [batch, pos, …]; globs and predicates choose among the
            points that do.
        positions: the tokens that a text's mean is over: 'response' for those of the response, or
            all if the text has none; 'prompt' for those before it; None or 'each' for every token;
            an index, a slice or indices, negative ones from the text's end.
        scale: the gates of the model, as for `LoraLens.gates`: 0 for the base, 1 for the adapted.
        sinks: count sinks, too: each text's first token, and at each hook point tokens whose ‖h‖
            is an outlier.

    Raises:
        SiteError: the model lacks a hook point; the error names the nearest ones.
        ModelStateError: a point named in full never fires, holds no activations by position, or
            is between a site's input and output; globs match no other points.
        ArgumentError: a text is in both sets; a text has no counted token at these positions.
        TokenError, PromptError: a text or response does not fit the model; a set is empty.
        NumericsError: an activation is not finite.
    """
    if isinstance(positions, str) and positions == "last":
        warn("contrast: positions='last' is called -1 now, and the old name will go")
        positions = -1
    texts = {"positive": _distinct(lens, positive), "negative": _distinct(lens, negative)}
    _require_apart(texts)
    positive_side = _Side("positive", texts["positive"], positions, sinks=sinks)
    negative_side = _Side("negative", texts["negative"], positions, sinks=sinks)
    plus = _means(lens, positive_side, scale, names)
    minus = _means(lens, negative_side, scale, names)
    statistics = {name: _PointStatistics.of(plus[name], minus[name]) for name in plus}
    values: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    sizes: dict[str, float] = {}
    auc: dict[str, float] = {}
    chance: dict[str, float] = {}
    shifts: list[tuple[str, Tensor, Tensor]] = []
    for name, point in statistics.items():
        values[name] = point.direction.to(lens.gate_dtype)
        errors[name] = point.errors.to(lens.gate_dtype)
        sizes[name] = point.size
        auc[name] = point.auc
        chance[name] = point.chance
        shifts.append((name, point.shifts, point.means))
    modules = _modules_before(lens, statistics)
    return Contrast(
        values=values,
        errors=errors,
        sizes=sizes,
        auc=auc,
        chance=chance,
        modules={name: module.path for name, module in modules.items()},
        widths={module.path: module.width for module in modules.values()},
        counts=(positive_side.rows.batch, negative_side.rows.batch),
        positions=_positions_text(positions, sinks=sinks),
        at=lens.scale_in_words(scale),
        **readable(lens, list(texts.values()), shifts),
    )


def _positions_text(positions: Any, *, sinks: bool) -> str:
    """The tokens that the means are over, in words."""
    tokens = str(ChosenPositions.of(positions))
    if tokens == "-1":
        tokens = "last"
    if tokens in ("all", "each"):
        tokens = "every token"
    return tokens if sinks else f"{tokens}, without sinks"


# --- The two sets of texts


def _distinct(lens: LoraLens, texts: TextsLike) -> Prompts:
    """The texts without repeats, each with its response if it has one."""
    rows = text_rows(lens, texts)
    first: dict[tuple[int, ...], int] = {}
    for index, key in enumerate(_keys(rows)):
        first.setdefault(key, index)
    return rows.chosen(sorted(first.values()))


def _keys(rows: Prompts) -> list[tuple[int, ...]]:
    """A key for each text, from the start of its response and its tokens, to find repeats."""
    keys: list[tuple[int, ...]] = []
    for ids, length, start in zip(
        rows.tokens.tolist(), rows.lengths.tolist(), rows.asked_lengths, strict=True
    ):
        keys.append((start, *ids[:length]))
    return keys


def _require_apart(texts: Mapping[str, Prompts]) -> None:
    """Refuse a text that is in both sets."""
    negative = {key: index for index, key in enumerate(_keys(texts["negative"]))}
    for index, key in enumerate(_keys(texts["positive"])):
        if key in negative:
            raise ArgumentError(
                f"text {index} of the positive set is text {negative[key]} of the negative "
                "one; leave it out, because a text in both sets belongs to neither."
            )


class _Side:
    """One set of texts, and which of their tokens the means are over."""

    def __init__(self, name: str, rows: Prompts, positions: Any, *, sinks: bool) -> None:
        self.name = name
        self.rows = rows
        self._positions = positions
        self._sinks = sinks
        is_of_response = isinstance(positions, str) and positions == "response"
        if is_of_response and not rows.holds_responses:
            # If the texts hold no responses, every token counts.
            self.chosen = positions_in(rows, None)
        else:
            self.chosen = positions_in(rows, positions)
        if not sinks:
            self.chosen &= rows.after_first.cpu()
        self._require_tokens(self.chosen, range(rows.batch))

    def weights(
        self, index: Sequence[int], norms: Float[Tensor, "text token"]
    ) -> Float[Tensor, "text token"]:
        """The weight of each token in its text's mean, 0 for sinks.

        Args:
            index: the indices of these texts.
            norms: ‖h‖ at the hook point, which shows the sinks.
        """
        width = norms.shape[1]
        chosen = self.chosen[list(index), :width]
        if not self._sinks:
            real = self.rows.real.cpu()[list(index), :width]
            chosen = chosen & ~sinks_among([norms], real)
            self._require_tokens(chosen, index)
        return chosen.double() / chosen.sum(1, keepdim=True)

    def _require_tokens(self, chosen: Bool[Tensor, "text token"], index: Sequence[int]) -> None:
        """Refuse a text without a token that is counted."""
        without = (~chosen.any(1)).nonzero().flatten().tolist()
        if without:
            text = index[without[0]]
            counted = "" if self._sinks else " that is not a sink (sinks=True counts them, too)"
            raise ArgumentError(
                f"positions={self._positions!r}: text {text} of the {self.name} set has "
                f"{int(self.rows.lengths[text])} tokens and none of these{counted}."
            )


def _means(
    lens: LoraLens, side: _Side, scale: Scale, names: Names
) -> dict[str, Float[Tensor, "text _d"]]:
    """The mean of h over each text's chosen tokens, in float64 on the CPU. One forward pass."""
    means: dict[str, Tensor] = {}
    for index, activations in activations_at(lens, side.rows, names, [scale]):
        for name, (activation,) in activations.items():
            h = activation.double()
            weights = side.weights(index, h.norm(dim=-1))
            mean = torch.einsum("bt,btd->bd", weights, h.nan_to_num())
            if name not in means:
                means[name] = mean.new_zeros(side.rows.batch, mean.shape[1])
            means[name][index] = mean
    return means


# --- The statistics of the two sets at one hook point


@dataclasses.dataclass(frozen=True)
class _PointStatistics:
    """The direction at one hook point, and how far it can be trusted.

    Attributes:
        direction: μ₊ − μ₋.
        errors: its standard errors.
        means: m_i of all texts, the positive ones first.
        auc: the share of held-out pairs that are told apart.
        chance: the 95 % quantile of that share with the labels shuffled.
    """

    direction: Float[Tensor, " d"]
    errors: Float[Tensor, " d"]
    means: Float[Tensor, "text d"]
    auc: float
    chance: float

    @classmethod
    def of(cls, plus: Float[Tensor, "text d"], minus: Float[Tensor, "other d"]) -> _PointStatistics:
        """The statistics of the two sets' means."""
        auc, chance = _held_out(plus, minus)
        return cls(
            direction=plus.mean(0) - minus.mean(0),
            errors=_standard_errors(plus, minus),
            means=torch.cat([plus, minus]),
            auc=auc,
            chance=chance,
        )

    @property
    def size(self) -> float:
        """The mean ‖m_i‖ over all texts."""
        return float(self.means.norm(dim=1).mean())

    @property
    def shifts(self) -> Float[Tensor, "text d"]:
        """The direction repeated for each text, to be read with that text's denominator."""
        return self.direction.expand_as(self.means)


def _standard_errors(
    plus: Float[Tensor, "text d"], minus: Float[Tensor, "other d"]
) -> Float[Tensor, " d"]:
    """√(s₊²/n₊ + s₋²/n₋); NaN if a set has one text."""
    if min(len(plus), len(minus)) < 2:
        return torch.full_like(plus[0], torch.nan)
    return (plus.var(0) / len(plus) + minus.var(0) / len(minus)).sqrt()


def _held_out(plus: Float[Tensor, "text d"], minus: Float[Tensor, "more d"]) -> tuple[float, float]:
    """The AUC of held-out pairs, and its quantile with the labels shuffled."""
    plus = _evenly_spread(plus)
    minus = _evenly_spread(minus)
    n = len(plus)
    m = len(minus)
    if min(n, m) < 2:
        return math.nan, math.nan
    both = torch.cat([plus, minus])
    both = both - both.mean(0)
    products = both @ both.T

    def auc_of(order: Int[Tensor, " text"]) -> float:
        """The AUC with the first n texts of an order as the positive ones."""
        positive, negative = order.split([n, m])
        return _auc(products, positive, negative)

    generator = torch.Generator().manual_seed(0)
    shuffled: list[float] = []
    for _ in range(_SHUFFLES):
        shuffled.append(auc_of(torch.randperm(n + m, generator=generator)))
    return auc_of(torch.arange(n + m)), float(torch.tensor(shuffled).quantile(_LEVEL))


def _evenly_spread(means: Float[Tensor, "text d"]) -> Float[Tensor, "some d"]:
    """The texts that are compared in pairs: all of them, or `_HELD_OUT` that are evenly spread."""
    count = min(len(means), _HELD_OUT)
    return means[torch.linspace(0, len(means) - 1, count).long()]


def _auc(
    products: Float[Tensor, "text text"], plus: Int[Tensor, " some"], minus: Int[Tensor, " other"]
) -> float:
    """The share of pairs with d_ij·(m_i − m_j) > 0, from the products of all texts.

    A pair with d_ij·(m_i − m_j) = 0 counts as half a pair.
    """
    n = len(plus) - 1
    m = len(minus) - 1
    between = products[plus][:, minus]
    squares = products.diagonal()
    to_plus = products[:, plus].sum(1)
    to_minus = products[:, minus].sum(1)
    # d_ij·m_i and d_ij·m_j without the product of i with j, which is added once for both.
    of_plus = (to_plus[plus] - squares[plus]) / n - to_minus[plus] / m
    of_minus = to_plus[minus] / n - (to_minus[minus] - squares[minus]) / m
    margins = of_plus[:, None] - of_minus + between * (1 / n + 1 / m)
    return float(((margins.sign() + 1) / 2).mean())


# --- Where a constant can be added


class _Module(NamedTuple):
    """A linear module: its Hugging Face path, and the number of features that it reads."""

    path: str
    width: int


def _modules_before(lens: LoraLens, names: Iterable[str]) -> dict[str, _Module]:
    """The linear module whose output is added last before each hook point that has one."""
    modules: dict[str, _Module] = {}
    for name in names:
        module = _module_before(lens, name)
        if module is not None:
            modules[name] = module
    return modules


def _module_before(lens: LoraLens, name: str) -> _Module | None:
    """The linear module whose output is added last before a hook point; None without one."""
    host = lens.host
    family = host.family
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(.*)", name)
    if match is None:
        layer = host.n_layers
        point = name
    else:
        layer = int(match[1])
        point = match[2]
    if point in ("resid_pre", "in", "ln_final.hook_in"):
        # The input of a block is the output of the one before.
        layer -= 1
        point = "resid_post"
    if not 0 <= layer < host.n_layers or family.is_probed or family.post_norm:
        return None
    kinds_of_family = set(itertools.chain.from_iterable(family.linears.values()))
    for kind in _KINDS_BEFORE.get(point, ()):
        if kind in kinds_of_family:
            _, width = host.shape(layer, kind)
            return _Module(family.path(layer, kind), width)
    return None
