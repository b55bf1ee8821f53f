"""The direction between two sets of answers, within one model, and whether it tells new ones apart.

1. Each text is one vector at each hook point, m_i: the mean of h over the positions asked for. So a
   long text counts as much as a short one, and texts are what is independent. Sinks (the first
   token, and those whose ‖h‖ is an outlier) are left out: a mean with one of them is about it.
2. The direction is μ₊ − μ₋, the difference of the two sets' means. Its standard errors are those of
   a difference of means over texts, √(s₊²/n₊ + s₋²/n₋); with no difference at all ‖μ₊ − μ₋‖² would
   be Σ se² on average.
3. Held out: of every pair of a positive and a negative text, the direction of all others is

       d_ij = μ₊ without i − μ₋ without j,       and the pair is told apart if d_ij·(m_i − m_j) > 0

   The share of such pairs is an AUC of texts that had no part in their direction, ½ by chance. It
   needs only the products m_i·m_j. Beside it stands its 95 % quantile with the labels shuffled.
4. At points of the residual stream the direction is read through the final norm and the
   unembedding, the norm's denominator that of the texts' means, averaged
   (`hidden/stream_reading.py`).

Cost: one forward pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.arguments import number
from lens_lora.core import Adapter, LoraLens, Names, Pictured, Prompts, Scale, alone, name_of_scale
from lens_lora.core.adapter.factors import constant_factors
from lens_lora.core.function.activations import sinks_among
from lens_lora.core.function.asked import ask_prompts
from lens_lora.core.readout.positions import positions_text
from lens_lora.core.results.tokens import Positions
from lens_lora.errors import ArgumentError, SiteError
from lens_lora.hidden import activation_shift
from lens_lora.responses.answers import continued

_HELD_OUT = 128  # texts of each set, evenly spread; all pairs of more take long
_SHUFFLES, _LEVEL = 200, 0.95
_KINDS_BEHIND: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("resid_mid", "attn_out"), ("o",)),
    **dict.fromkeys(("resid_post", "out", "mlp_out"), ("down", "fc_out")),
}


@final
class Contrast(activation_shift.Readable, Pictured):
    """μ₊ − μ₋ at hook points: a direction wherever one is taken.

    `plot` is held-out AUC and ‖μ₊ − μ₋‖ / ‖m‖ by hook point, beside what chance gives.

    Attributes:
        values: [d] by hook point, μ₊ − μ₋, heads laid flat.
        errors: [d] by hook point, standard errors; NaN where a set has one text.
        sizes: the mean ‖m_i‖ over all texts, by hook point.
        auc: by hook point, the share of held-out pairs told apart; NaN where a set has one text.
        chance: by hook point, the 95 % quantile of `auc` with the labels shuffled.
        modules: by hook point, the Hugging Face module whose output joins the residual stream
            there, where a constant can be added (`adapter`).
        widths: by module, the features that it reads.
        counts: how many texts the positive and the negative set have, each different one once.
        positions: those that a text's mean is over, and whether sinks are among them.
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
        """The direction by hook point, wherever one is taken."""
        return self.values

    def cosine(self, other: Any) -> pd.DataFrame:
        """The cosine with other directions: one row per hook point and direction.

        Args:
            other: a Contrast or ActivationShift, point by point; [d], [direction, d], {label:
                either}, a sparse autoencoder, alone or as (autoencoder, indices); or a lens, for
                what its sites write.

        Returns:
            A data frame: name, direction, index, cosine.

        Raises:
            ArgumentError: directions of another width or space, or none at a point.
            ModelStateError: a lens, of which a norm changes what a site writes to the stream.
        """
        return activation_shift.cosine_table(self.values, other)

    def adapter(self, name: str, coefficient: float = 1.0) -> Adapter:
        """Steering as an adapter: `coefficient` times the direction is added at the hook point.

        At every token, as a change of bias of the module that writes there, and so at a text's
        first token too, which no mean here is over unless `sinks` were counted. At coefficient 1
        the negative set's mean moves to the positive one's.

        Args:
            name: a point of the residual stream among these, or what attention or an MLP adds.
            coefficient: a finite number; negative ones steer away.

        Raises:
            SiteError: a point that is not here, or at which no linear module writes.
            ArgumentError: a coefficient that is no finite number.
        """
        path = self.modules.get(name)
        if path is None:
            raise SiteError(
                f"{name!r}: no linear module writes straight to such a point, or it is not among "
                f"{list(self.values)[:4]}; a constant can be added at {list(self.modules)[:4]}."
            )
        vectors = {path: number("coefficient", coefficient) * self.values[name]}
        return Adapter(constant_factors(vectors, self.widths), name=f"{coefficient:g} at {name}")

    def to_frame(self) -> pd.DataFrame:
        """One row per hook point: ‖μ₊ − μ₋‖, its noise √Σse², its share of ‖m‖, AUC and chance."""
        lengths = {"size": self.values, "noise": self.errors}
        numbers = {k: [float(v.double().norm()) for v in vs.values()] for k, vs in lengths.items()}
        table = pd.DataFrame({"name": self.names, **numbers})
        table = table.assign(share=table["size"] / list(self.sizes.values()))
        return table.assign(auc=list(self.auc.values()), chance=list(self.chance.values()))


@alone
def contrast(
    lens: LoraLens,
    positive: Any,
    negative: Any,
    names: Names,
    positions: Positions | Literal["last"] = "response",
    scale: Scale = 1.0,
    *,
    sinks: bool = False,
) -> Contrast:
    """The mean difference of activations between two sets of texts, within one model.

    Cost: one forward pass of every text. Holds one vector for each text and hook point.

    Args:
        lens: the adapter over the model.
        positive: texts as every analysis takes prompts, or a tuple (prompts, responses), as
            `ll.activations` takes them. A text that is there twice counts once.
        negative: the other set; the direction points away from it.
        names: a hook point, several, globs, or a predicate. A name in full must fire and hold
            activations by position, [batch, pos, …]; globs and predicates choose among the points
            that do.
        positions: what a text's mean is over: 'response', the tokens of the response, or of a text
            without one every token; 'prompt', those before it; None or 'each' for every token;
            'last', an index, a slice or indices, negative ones from the text's end.
        scale: the gates of the model, as for `LoraLens.gates`: 0 for the base, 1 for the adapted.
        sinks: count sinks, too: each text's first token, and at each hook point tokens whose ‖h‖
            there is an outlier.

    Raises:
        SiteError: a hook point that the model lacks, with the nearest names.
        ModelStateError: a point named in full that never fires, holds no activations by position,
            or lies between a site's input and output; globs that match no other.
        ArgumentError: a text that is in both sets; positions at which a text has no token that is
            counted.
        TokenError, PromptError: a text or response that does not fit the model; an empty set.
        NumericsError: non-finite activations.
    """
    positions = -1 if isinstance(positions, str) and positions == "last" else positions
    sets = {"positive": _distinct(lens, positive), "negative": _distinct(lens, negative)}
    _require_apart(sets)
    plus, minus = (
        _means(lens, _Side(side, rows, positions, sinks=sinks), scale, names)
        for side, rows in sets.items()
    )
    values = {name: plus[name].mean(0) - minus[name].mean(0) for name in plus}
    both = {name: torch.cat([plus[name], minus[name]]) for name in plus}
    tests = {name: _held_out(plus[name], minus[name]) for name in plus}
    modules = {name: place for name in plus if (place := _module_at(lens, name)) is not None}
    return Contrast(
        values={name: value.to(lens.gate_dtype) for name, value in values.items()},
        errors={name: _errors(plus[name], minus[name]).to(lens.gate_dtype) for name in plus},
        sizes={name: float(h.norm(dim=1).mean()) for name, h in both.items()},
        auc={name: auc for name, (auc, _) in tests.items()},
        chance={name: chance for name, (_, chance) in tests.items()},
        **activation_shift.readable(
            lens,
            list(sets.values()),
            ((n, values[n].expand_as(h), h) for n, h in both.items()),
        ),
        modules={name: path for name, (path, _) in modules.items()},
        widths=dict(modules.values()),
        counts=(len(plus[next(iter(plus))]), len(minus[next(iter(minus))])),
        positions=_positions_text(positions, sinks=sinks),
        at=name_of_scale(scale),
    )


def _positions_text(positions: Any, *, sinks: bool) -> str:
    said = "last" if positions == -1 else positions_text(positions)
    said = "every token" if said in ("all", "each") else said
    return said if sinks else f"{said}, without sinks"


def _distinct(lens: LoraLens, texts: Any) -> Prompts:
    """Each different text once, with its response where it has one."""
    if isinstance(texts, tuple) and len(texts) == 2:
        rows = continued(lens.model, lens.prompts(texts[0]), texts[1])
    else:
        rows = ask_prompts(lens, texts).prompts
    first = {key: i for i, key in reversed(list(enumerate(_keys(rows))))}
    return rows.chosen(sorted(first.values()))


def _keys(rows: Prompts) -> list[tuple[int, ...]]:
    """Each text's tokens, and where its response begins; the same of equal texts."""
    rest = rows.tokens.tolist(), rows.lengths.tolist(), rows.asked_lengths
    return [(start, *ids[:length]) for ids, length, start in zip(*rest, strict=True)]


def _require_apart(sets: Mapping[str, Prompts]) -> None:
    positive, negative = ({k: i for i, k in enumerate(_keys(rows))} for rows in sets.values())
    for key in filter(negative.__contains__, positive):
        raise ArgumentError(
            f"text {positive[key]} of the positive set is text {negative[key]} of the negative "
            "one; what is in both sets belongs to neither side, leave it out."
        )


class _Side:
    """One set of texts, and which of their tokens the means are over."""

    def __init__(self, name: str, rows: Prompts, positions: Any, *, sinks: bool) -> None:
        self.name = name
        self.rows = rows
        self._positions = positions
        self._sinks = sinks
        asks_for_response = isinstance(positions, str) and positions == "response"
        # Texts that hold no response are asked whole.
        asked = None if asks_for_response and not rows.holds_responses else positions
        self.chosen = activation_shift.positions_in(rows, asked)
        if not sinks:
            self.chosen &= rows.after_first.cpu()
        self._require_tokens(self.chosen, range(rows.batch))

    def weights(
        self, index: Sequence[int], norms: Float[Tensor, "text token"]
    ) -> Float[Tensor, "text token"]:
        """Of each token in its text's mean; sinks, which the norms of h show, have none."""
        chosen = self.chosen[list(index), : norms.shape[1]]
        if not self._sinks:
            real = self.rows.real.cpu()[list(index), : norms.shape[1]]
            chosen = chosen & ~sinks_among([norms], real)
            self._require_tokens(chosen, index)
        return chosen.double() / chosen.sum(1, keepdim=True)

    def _require_tokens(self, chosen: Bool[Tensor, "text token"], index: Sequence[int]) -> None:
        for row in (~chosen.any(1)).nonzero().flatten().tolist()[:1]:
            counted = "" if self._sinks else " that is no sink (ask with sinks=True to count them)"
            raise ArgumentError(
                f"positions={self._positions!r}: text {index[row]} of the {self.name} set has "
                f"{int(self.rows.lengths[index[row]])} tokens and none of these{counted}."
            )


def _means(
    lens: LoraLens, side: _Side, scale: Scale, names: Names
) -> dict[str, Float[Tensor, "text _d"]]:
    """The mean of h over each text's chosen tokens, in float64 on the CPU."""
    means: dict[str, Tensor] = {}
    for index, held in activation_shift.activations_at(lens, side.rows, names, [scale]):
        for name, ends in held.items():
            h = ends[0].double()
            weights = side.weights(index, h.norm(dim=-1))
            mean = torch.einsum("bt,btd->bd", weights, h.nan_to_num())
            means.setdefault(name, mean.new_zeros(side.rows.batch, mean.shape[1]))[index] = mean
    return means


def _errors(plus: Float[Tensor, "text d"], minus: Float[Tensor, "other d"]) -> Float[Tensor, " d"]:
    """√(s₊²/n₊ + s₋²/n₋), NaN of one text."""
    if min(len(plus), len(minus)) < 2:
        return torch.full_like(plus[0], torch.nan)
    return (plus.var(0) / len(plus) + minus.var(0) / len(minus)).sqrt()


def _held_out(plus: Float[Tensor, "text d"], minus: Float[Tensor, "more d"]) -> tuple[float, float]:
    """The AUC of held-out pairs, and its quantile with the labels shuffled."""
    evenly = (torch.linspace(0, len(h) - 1, min(len(h), _HELD_OUT)).long() for h in (plus, minus))
    plus, minus = (h[index] for h, index in zip((plus, minus), evenly, strict=True))
    n, m = len(plus), len(minus)
    if min(n, m) < 2:
        return math.nan, math.nan
    both = torch.cat([plus, minus])
    both = both - both.mean(0)
    products, generator = both @ both.T, torch.Generator().manual_seed(0)
    orders = [torch.arange(n + m)]
    orders += [torch.randperm(n + m, generator=generator) for _ in range(_SHUFFLES)]
    auc, *shuffled = (_auc(products, *order.split([n, m])) for order in orders)
    return auc, float(torch.tensor(shuffled).quantile(_LEVEL))


def _auc(
    products: Float[Tensor, "text text"], plus: Int[Tensor, " some"], minus: Int[Tensor, " other"]
) -> float:
    """The share of pairs with d_ij·(m_i − m_j) > 0, from the products of all texts."""
    between, squares = products[plus][:, minus], products.diagonal()
    n, m = len(plus) - 1, len(minus) - 1
    to_plus, to_minus = products[:, plus].sum(1), products[:, minus].sum(1)
    of_plus = (to_plus[plus] - squares[plus]) / n - to_minus[plus] / m
    of_minus = to_plus[minus] / n - (to_minus[minus] - squares[minus]) / m
    margins = of_plus[:, None] - of_minus + between * (1 / n + 1 / m)
    return float(((margins.sign() + 1) / 2).mean())


def _module_at(lens: LoraLens, name: str) -> tuple[str, int] | None:
    """(path, width) of the linear module whose output is added last before a hook point."""
    host = lens.plan.host
    match = re.fullmatch(r"blocks\.(\d+)\.hook_(.*)", name)
    layer, point = (int(match[1]), match[2]) if match else (host.n_layers, name)
    if point in ("resid_pre", "in", "ln_final.hook_in"):
        layer, point = layer - 1, "resid_post"
    family = host.family
    if not 0 <= layer < host.n_layers or family.is_probed or family.post_norm:
        return None
    held = [kind for kinds in family.linears.values() for kind in kinds]
    kind = next((kind for kind in _KINDS_BEHIND.get(point, ()) if kind in held), None)
    return None if kind is None else (family.path(layer, kind), host.shape(layer, kind)[1])
