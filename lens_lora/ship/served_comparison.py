"""Compare what a server told with the base, the adapted model, and what may be served instead.

1. c, the residual, and what rounding makes of each, by three forward passes (`served_measure`).
2. Where the residual is beyond the floor, candidates for what may be served instead are run
   (`served_explanations`), the likeliest first, on the few texts in which the server deviates most.
   The first that leaves almost nothing of the deviation ends the search.
3. The nearest of them are run on all texts. Of two that agree equally well, the likelier is named.
4. Where none explains the deviation, the floor is measured by a run in the served dtype, if that
   has 16 bit. Then the model is run with rounded weights. Rounding in another dtype than the
   given one is recognised by its size alone.

Cost: three forward passes of all texts; beyond the floor a quarter of a pass for each candidate
that is tried, of which there are at most about as many as layers and forty more, and three passes
for the nearest; beyond the bound, and unexplained, up to eight passes with rounded weights or in 16
bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.core import SIGMAS, Adapter, storage
from lens_lora.ship.served_explanations import (
    IN_16_BIT,
    Candidate,
    candidates,
    log_p_in,
    rounded,
)
from lens_lora.ship.served_measure import ROUNDING, ServedTokens, projection

# Above this floor the effect of the adapter is too small, beside rounding, to be called served.
_VISIBLE = 0.2
# Rounding differs from token to token, so that it moves c less than the residual. What all tokens
# have in common of it moves c by at most this.
_COMMON = 0.05
# A candidate explains a deviation if it leaves at most this part of it (a quarter of its square).
_LEAVES = 0.5
# The deviation must also go towards it by a part between these two, where 1 is all the way.
_NEAR_ENOUGH = 0.75
_NOT_TOO_FAR = 1.25
# Rounding decides between two candidates whose residuals differ by less than this factor.
_EQUALLY_WELL = 1.05
# No other candidate is tried after one that leaves less of the deviation than this (1 % of its
# square).
_LEAVES_NOTHING = 0.1
# Candidates are first tried on the quarter of the texts that deviates most, at least on _FEWEST.
_ONE_OF = 4
_FEWEST = 3
# How many of the nearest candidates are then run on all texts.
_SHORTLIST = 3


@storage.stored
@dataclasses.dataclass(frozen=True)
class ServedInstead:
    """A model that the server may be running, and how well it agrees with what the server told.

    Attributes:
        words: the candidate.
        residual: ‖ℓ − ℓ_candidate‖ / ‖ℓ₁ − ℓ₀‖; 0 if the candidate is what is served.
    """

    words: str
    residual: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The numbers of `ServedVerification`, and the nearest candidate's direction.

    Attributes:
        c, residual, floor, effect, tokens: as in `ServedVerification`.
        spread: SIGMAS standard deviations of c, if rounding is independent from token to token.
        explanations: those that were run on all texts, the nearest first; of those that agree with
            the server equally well, the likeliest is in front.
        along_nearest: how far the deviation ℓ − ℓ₁ goes towards the nearest candidate; 1 is all
            the way.
        rounds_as: another dtype whose rounding is as large as the residual, where no candidate
            explains it; else empty.
    """

    c: float
    residual: float
    floor: float
    effect: float
    tokens: int
    spread: float = 0.0
    explanations: tuple[ServedInstead, ...] = ()
    along_nearest: float = math.nan
    rounds_as: str = ""

    @property
    def is_visible(self) -> bool:
        """Whether the adapter moves the texts far enough beyond rounding to be called served."""
        return self.floor <= _VISIBLE

    @property
    def is_whole(self) -> bool:
        """Whether c is 1 but for rounding."""
        return abs(self.c - 1) <= self.c_within

    @property
    def c_within(self) -> float:
        """How far rounding may move the c of a right server from 1."""
        return _COMMON + self.spread

    @property
    def bound(self) -> float:
        """The largest residual of a right server."""
        return SIGMAS * self.floor

    @property
    def nearest(self) -> ServedInstead:
        """The candidate that agrees best."""
        return self.explanations[0]

    @property
    def is_explained(self) -> bool:
        """Whether the nearest candidate is what is served, rather than the adapter."""
        if not self.explanations or not _NEAR_ENOUGH <= self.along_nearest <= _NOT_TOO_FAR:
            return False
        left = self.nearest.residual
        if self.residual > self.bound:
            return left <= max(_LEAVES * self.residual, self.bound)
        return left <= _LEAVES * self.residual and self.residual > self.floor

    def explained_by(self, found: Sequence[_Fit]) -> Comparison:
        """The same numbers with candidates that were run on all texts.

        Args:
            found: how each candidate fits, the likeliest first.
        """
        ordered = _nearest_first(found)
        explanations = tuple(ServedInstead(fit.words, fit.residual) for fit in ordered)
        along = ordered[0].along if ordered else math.nan
        return dataclasses.replace(self, explanations=explanations, along_nearest=along)


def _nearest_first(found: Sequence[_Fit]) -> list[_Fit]:
    """Sort candidates by residual, but put the likeliest of the equally good ones first.

    Args:
        found: how each candidate fits, the likeliest first.
    """
    ordered = sorted(found, key=lambda fit: fit.residual)
    if not ordered:
        return []
    least = ordered[0].residual
    likeliest = next(fit for fit in found if fit.residual <= _EQUALLY_WELL * least)
    return [likeliest, *(fit for fit in ordered if fit is not likeliest)]


# The comparison where nothing can be measured.
UNREAD = Comparison(math.nan, math.nan, math.nan, math.nan, 0)
_BASE = ServedInstead("the base, without the adapter", math.nan)


def compared(
    tokens: ServedTokens, dtype: str, others: Sequence[Adapter], progress: bool
) -> Comparison:
    """Compare what was told with the models that may have told it.

    Args:
        tokens: what the server told, over the lens of the adapter that it is to serve.
        dtype: what the server computes in, a key of `served_measure.ROUNDING`.
        others: adapters that may be served in its place, such as older checkpoints.
        progress: show a bar.
    """
    lens = tokens.lens
    base = tokens.log_probs_at(lens.gates(0.0))
    adapted = tokens.log_probs_at(lens.gates(1.0))
    if adapted.equal(base):
        return Comparison(math.nan, math.nan, math.inf, 0.0, len(base), explanations=(_BASE,))
    found = tokens.agreement(base, adapted, ROUNDING[dtype])
    comparison = Comparison(
        c=found.c,
        residual=found.residual,
        floor=found.floor,
        effect=found.effect,
        tokens=len(base),
        spread=SIGMAS * found.spread,
    )
    if comparison.residual <= comparison.floor:
        # No candidate could be told from the adapter.
        return comparison
    search = _Search(tokens, base, adapted)
    fits = search.nearest(list(candidates(tokens, others)), progress)
    comparison = comparison.explained_by(fits)
    if comparison.residual <= comparison.bound or comparison.is_explained:
        return comparison
    if dtype in IN_16_BIT:
        size = search.rounding_in(dtype)
        comparison = dataclasses.replace(comparison, floor=max(comparison.floor, size))
        if comparison.residual <= comparison.bound:
            return comparison
    fits += search.on_all_texts(rounded(tokens))
    comparison = comparison.explained_by(fits)
    if comparison.is_explained:
        return comparison
    for other in IN_16_BIT:
        if other != dtype and comparison.residual <= SIGMAS * search.rounding_in(other):
            return dataclasses.replace(comparison, rounds_as=other)
    return comparison


# --- Candidates


@dataclasses.dataclass(frozen=True)
class _Fit:
    """How well one candidate agrees with the server, on some texts.

    Attributes:
        words: the candidate.
        residual: ‖ℓ − ℓ_candidate‖ / ‖ℓ₁ − ℓ₀‖.
        along: how far the deviation ℓ − ℓ₁ goes towards it; 1 is all the way.
        left: ‖ℓ − ℓ_candidate‖ / ‖ℓ − ℓ₁‖.
    """

    words: str
    residual: float
    along: float
    left: float


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Some of the served texts, and the log p of the adapted model there.

    Attributes:
        tokens: what the server told of them.
        adapted: ℓ₁.
        effect: ‖ℓ₁ − ℓ₀‖.
    """

    tokens: ServedTokens
    adapted: Float[Tensor, " token"]
    effect: float

    def fit(self, candidate: Candidate) -> _Fit:
        """Run a candidate. One forward pass of these texts."""
        log_p = candidate.log_p(self.tokens)
        # A token that begins its row in this candidate says nothing about it.
        log_p = log_p.where(log_p.isfinite(), self.adapted)
        deviation = self.tokens.served - self.adapted
        left = float((self.tokens.served - log_p).norm())
        return _Fit(
            candidate.words,
            residual=left / self.effect,
            along=projection(deviation, log_p - self.adapted),
            left=left / float(deviation.norm()),
        )


class _Search:
    """Looks for the candidates that agree best with what a server told."""

    def __init__(
        self,
        tokens: ServedTokens,
        base: Float[Tensor, " token"],
        adapted: Float[Tensor, " token"],
    ) -> None:
        self._all = _Texts(tokens, adapted, float((adapted - base).norm()))
        rows = _most_deviating(tokens, adapted)
        is_chosen = tokens.is_in_rows(rows)
        few_shift = (adapted - base)[is_chosen]
        # Where the adapter adds nothing, the effect on all texts stands for theirs.
        few_effect = float(few_shift.norm()) or self._all.effect
        self._few = _Texts(tokens.only_rows(rows), adapted[is_chosen], few_effect)

    def nearest(self, models: Sequence[Candidate], progress: bool) -> list[_Fit]:
        """The nearest candidates, run on all texts, the likeliest of them first.

        Args:
            models: the likeliest first.
            progress: show a bar.
        """
        residuals: list[float] = []
        for candidate in tqdm(models, desc="candidates", leave=False, disable=not progress):
            fit = self._few.fit(candidate)
            residuals.append(fit.residual)
            if fit.left <= _LEAVES_NOTHING:
                whole = self._all.fit(candidate)
                if whole.left <= _LEAVES_NOTHING:
                    return [whole]
        nearest = sorted(range(len(models)), key=residuals.__getitem__)[:_SHORTLIST]
        return [self._all.fit(models[index]) for index in sorted(nearest)]

    def on_all_texts(self, models: Iterable[Candidate]) -> Iterator[_Fit]:
        """Run a few candidates on all texts, one by one, until one leaves almost nothing."""
        for candidate in models:
            fit = self._all.fit(candidate)
            yield fit
            if fit.left <= _LEAVES_NOTHING:
                return

    def rounding_in(self, dtype: str) -> float:
        """The residual of the adapted model if it computes in 16 bit; 0 if it cannot be run so.

        One forward pass of a copy of the model.

        Args:
            dtype: float16 or bfloat16.
        """
        log_p = log_p_in(self._all.tokens, dtype)
        if log_p is None:
            return 0.0
        return float((log_p - self._all.adapted).norm()) / self._all.effect


def _most_deviating(tokens: ServedTokens, adapted: Float[Tensor, " token"]) -> list[int]:
    """The rows in which the server deviates most from the adapted model, in ascending order."""
    squares = (tokens.served - adapted).square()
    deviations: list[float] = []
    for row in range(len(tokens.rows)):
        of_row = squares[tokens.is_in_rows([row])]
        deviations.append(float(of_row.sum()))
    ordered = sorted(range(len(tokens.rows)), key=lambda row: -deviations[row])
    return sorted(ordered[: max(len(ordered) // _ONE_OF, _FEWEST)])
