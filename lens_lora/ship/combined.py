"""Is a combined adapter the weighted sum of the adapters that it was made of?

With ΔW_i the update of part i and w_i its weight, each site of a combined adapter is to add

    D = Σ_i w_i ΔW_i ,       Δb = Σ_i w_i Δb_i .

What it adds is R. Two numbers compare R with D:

    c = ⟨R, D⟩ / ‖D‖²        and        residual = ‖R − D‖ / ‖D‖ ;

If R is the sum, c is 1, and the residual is what rounding the factors to their dtype makes. If it
is not, other explanations of R are tried in turn (`combined_explanations`). On texts, the same two
numbers are computed from log p: ℓ₀ of the base, ℓ₁ of the sum, and ℓ of the combined adapter.

DoRA and trained parameters depend on the base: their ΔW_i are computed over it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import final

import pandas as pd

from lens_lora import arguments
from lens_lora.core import Adapter, AdapterLike, Described, LoraLens, alone, load_adapter, storage
from lens_lora.errors import AdapterError, ArgumentError, many
from lens_lora.ship.checks import Check, Outcome, first_of, kinds_of, worst
from lens_lora.ship.combined_explanations import (
    SitePart,
    WeightedPart,
    explanation,
    site_parts,
)
from lens_lora.ship.completions import Messages
from lens_lora.ship.served_measure import ServedTokens, token_log_probs
from lens_lora.ship.served_rows import ServedRow, neutral_and_own

COMBINED = "the sum of its parts"
ON_TEXTS = "the sum of its parts on texts"

# ‖computed − exact‖ / ‖exact‖ of programs that combine in float32, with a singular value
# decomposition among their steps.
_FLOAT32 = 1e-5
# The residual on texts is at most this many times that of the sites and of rounding together.
_GROWTH = 10.0
# The base without any adapter has this residual: a larger bound tells nothing.
_HIDDEN = 1.0
# What a right site adds.
_SUM = "the sum"
# How many kinds of wrong sites the line of the check names.
_KINDS_NAMED = 2


@storage.stored
@dataclasses.dataclass(frozen=True)
class CombinedSite:
    """How what a combined adapter adds at one site compares with the sum.

    Attributes:
        site: its name.
        module: its path in the Hugging Face model.
        layer: its number.
        kind: its kind, such as 'q'.
        outcome: 'passed' or 'failed'.
        looks: what it is, in words.
        c: ⟨R, D⟩ / ‖D‖²; NaN if the sum adds nothing here.
        residual: ‖R − D‖ / ‖D‖; NaN likewise.
    """

    site: str
    module: str
    layer: int
    kind: str
    outcome: Outcome
    looks: str
    c: float = math.nan
    residual: float = math.nan


@final
class CombinedVerification(Described):
    """Whether a combined adapter is the weighted sum of its parts, by site and on texts.

    Attributes:
        name: the combined adapter's.
        parts: the names of the adapters that it was made of.
        weights: one for each.
        sites: each with c and the residual of its weights.
        c: ⟨ℓ − ℓ₀, ℓ₁ − ℓ₀⟩ / ‖ℓ₁ − ℓ₀‖² over the tokens of the texts; NaN if the sum cannot be
            run.
        residual: ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖, likewise.
        effect: the root mean square of ℓ₁ − ℓ₀, in nats per token.
        tokens: the number of tokens in the texts, without the first of each.
        checks: each with its outcome.
        meta: model, adapter, dtype and versions.
    """

    name: str
    parts: tuple[str, ...]
    weights: tuple[float, ...]
    sites: tuple[CombinedSite, ...]
    c: float
    residual: float
    effect: float
    tokens: int
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """'failed' if any check failed, else 'undecided' if any is, else 'passed'."""
        return worst(self.checks)

    def to_frame(self) -> pd.DataFrame:
        """One row per site."""
        return pd.DataFrame([dataclasses.asdict(site) for site in self.sites])


@alone
def verify_combined(
    lens: LoraLens,
    parts: Sequence[AdapterLike],
    weights: Sequence[float] | None = None,
    *,
    texts: Sequence[str] | Sequence[Messages] = (),
    progress: bool = True,
) -> CombinedVerification:
    """Compare a combined adapter with the weighted sum of the adapters that it was made of.

    PEFT's `add_weighted_adapter` makes such adapters. Its 'cat' is the sum; 'svd' is the sum cut to
    a rank; 'linear' adds cross terms B_i A_j; 'ties', 'dare_linear' and the like prune. Whatever
    its kind, an adapter of rsLoRA comes out √rank times too large, DoRA's magnitudes are
    initialised anew, and biases are lost. Each is found and named.

        >>> ll.verify_combined(lens, ["a", "b"], [0.5, 0.5])  # doctest: +SKIP

    Args:
        lens: the combined adapter over its base.
        parts: the adapters that it was made of: folders, hub ids, adapters.
        weights: one for each; None for 1 each.
        texts: your own, on which the adapters show, beside 15 neutral ones.
        progress: show bars.

    Cost: four forward passes of the texts.

    Raises:
        ArgumentError: no list of parts, not as many weights as parts, or a weight that is not
            finite.
        AdapterError: a part does not fit the base.
        SiteError: a part adapts a module that the base lacks.
    """
    adapters = _parts(parts)
    weights = _weights(weights, len(adapters))
    combined = site_parts(lens)
    of_parts = [site_parts(lens.with_adapter(part, check=False)) for part in adapters]
    names = [part.name for part in adapters]
    sites = tuple(_compared_sites(combined, of_parts, weights, names))
    check = _sites_check(sites)
    measured = _on_texts(lens, adapters, weights, texts, sites, progress)
    return CombinedVerification(
        name=lens.adapter.name,
        parts=tuple(names),
        weights=tuple(weights),
        sites=sites,
        c=measured.c,
        residual=measured.residual,
        effect=measured.effect,
        tokens=measured.tokens,
        checks=(check, measured.check),
        meta=lens.describe(),
    )


def _parts(parts: Sequence[AdapterLike]) -> list[Adapter]:
    if isinstance(parts, str) or not parts:
        raise ArgumentError("parts is no list of adapters", remedy='give parts=["a", "b"].')
    return [load_adapter(part) for part in parts]


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ArgumentError(
            f"{many(len(weights), 'weight')} for {many(count, 'adapter')}",
            remedy="give one for each, in the same order.",
        )
    return [arguments.number("weights", weight) for weight in weights]


# --- Site by site


def _compared_sites(
    combined: dict[str, SitePart],
    parts: Sequence[dict[str, SitePart]],
    weights: Sequence[float],
    names: Sequence[str],
) -> Iterator[CombinedSite]:
    every = dict.fromkeys(itertools.chain(*parts, combined))
    for site in every:
        found = combined.get(site)
        terms: list[WeightedPart] = []
        for weight, part, name in zip(weights, parts, names, strict=True):
            if site in part and weight != 0:
                terms.append(WeightedPart(weight, part[site], name))
        if found is not None and terms:
            yield _compared_site(site, found, terms)
        elif found is not None and found.size > 0:
            yield _judged(site, found, "none of the parts adapts it")
        elif found is None and terms:
            looks = "not in the combined adapter"
            yield _judged(site, terms[0].part, looks, c=0.0, residual=1.0)


def _judged(
    site: str, part: SitePart, looks: str, c: float = math.nan, residual: float = math.nan
) -> CombinedSite:
    outcome: Outcome = "passed" if looks == _SUM else "failed"
    place = part.place
    return CombinedSite(site, place.module, place.layer, place.kind, outcome, looks, c, residual)


def _compared_site(site: str, found: SitePart, terms: Sequence[WeightedPart]) -> CombinedSite:
    D = SitePart.summed([term.term for term in terms])
    size = D.weight.norm
    lengths = sum(abs(term.weight) * term.part.weight.norm for term in terms)
    # Beside rounding, which is relative to the factors, terms of the sum may cancel.
    rounds = found.rounding + _FLOAT32 * lengths
    off = found.weight.distance(D.weight)
    bias_off = found.bias_distance(D)
    bias_rounds = (_FLOAT32 + found.eps) * max(found.bias_norm, D.bias_norm)
    c = math.nan
    residual = math.nan
    if size > 0:
        c = found.weight.inner(D.weight) / size**2
        residual = off / size
    if off > rounds:
        return _judged(site, found, explanation(found, terms, D), c, residual)
    if bias_off > bias_rounds:
        looks = "the sum, another bias"
        if not found.bias_norm:
            looks = "the sum, but its bias is lost"
        return _judged(site, found, looks, c, residual)
    return _judged(site, found, _SUM, c, residual)


def _sites_check(sites: Sequence[CombinedSite]) -> Check:
    bad = [site for site in sites if site.outcome == "failed"]
    cs = [site.c for site in sites if not math.isnan(site.c)]
    mean_c = sum(cs) / len(cs) if cs else math.nan
    if not sites:
        return Check(COMBINED, "failed", "the parts add nothing, nor does the combined adapter")
    if not bad:
        largest = _largest_residual(sites)
        measured = f"the sum at {many(len(sites), 'site')}, residual at most {largest:.1g}"
        return Check(COMBINED, "passed", measured, "Σ w ΔW, to rounding", value=mean_c)
    kinds = kinds_of([site.looks for site in bad], _KINDS_NAMED)
    measured = "; ".join(f"{count} of {len(sites)} sites: {looks}" for looks, count in kinds)
    where = first_of([site.site for site in bad])
    return Check(COMBINED, "failed", measured, "Σ w ΔW, to rounding", where, mean_c)


def _largest_residual(sites: Sequence[CombinedSite]) -> float:
    """The largest residual of these sites; where the sum adds nothing, there is none."""
    residuals = [site.residual for site in sites if not math.isnan(site.residual)]
    return max(residuals, default=0.0)


# --- On texts


@dataclasses.dataclass(frozen=True)
class _OnTexts:
    """The numbers of `CombinedVerification` on texts, and their check."""

    check: Check
    c: float = math.nan
    residual: float = math.nan
    effect: float = math.nan
    tokens: int = 0


def _on_texts(
    lens: LoraLens,
    parts: Sequence[Adapter],
    weights: Sequence[float],
    texts: Sequence[str] | Sequence[Messages],
    sites: Sequence[CombinedSite],
    progress: bool,
) -> _OnTexts:
    """Measure c and the residual of log p. Four forward passes."""
    try:
        summed = _summed(parts, weights)
        lens_of_sum = lens.with_adapter(summed, check=False)
    except AdapterError as error:
        return _OnTexts(Check(ON_TEXTS, "undecided", f"the sum cannot be run: {error}"))
    # The combined adapter stands where a server would: ℓ is what it says of each token.
    tokens = ServedTokens(lens_of_sum, _rows_of(lens, texts, progress), progress=progress)
    base = tokens.log_probs_at(lens_of_sum.gates(0.0))
    adapted = tokens.log_probs_at(lens_of_sum.gates(1.0))
    if adapted.equal(base):
        facts = "the sum of the parts changes none of the texts"
        return _OnTexts(Check(ON_TEXTS, "undecided", facts))
    found = tokens.agreement(base, adapted, lens.eps)
    of_sites = _largest_residual([site for site in sites if site.outcome == "passed"])
    bound = _GROWTH * (of_sites + found.floor)
    measured = (
        f"c = {found.c:.3g}, residual {found.residual:.2g} over {many(len(base), 'token')}, "
        f"whose log p the sum moves by {found.effect:.2g} nats"
    )
    outcome: Outcome = "passed" if found.residual <= bound else "failed"
    if outcome == "passed" and bound >= _HIDDEN:
        outcome = "undecided"
        measured += ": rounding hides it"
    expected = f"c = 1, residual at most {bound:.1g}"
    check = Check(ON_TEXTS, outcome, measured, expected, value=found.c)
    return _OnTexts(check, found.c, found.residual, found.effect, len(base))


def _rows_of(
    lens: LoraLens, texts: Sequence[str] | Sequence[Messages], progress: bool
) -> list[ServedRow]:
    """The texts with log p of each token in the combined adapter. One forward pass."""
    ids_of_texts = [text.ids for text in neutral_and_own(lens, texts)]
    found = token_log_probs(lens, lens.gates(1.0), ids_of_texts, progress=progress)
    rows: list[ServedRow] = []
    for ids, log_p in zip(ids_of_texts, found, strict=True):
        length = len(ids)
        rows.append(ServedRow(ids, log_p[:length].tolist(), prompt_length=length))
    return rows


def _summed(parts: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum, each part apart.

    Raises:
        AdapterError: DoRA on a module that another part adapts too.
    """
    scaled = [
        part.scaled(weight).named(f"part{number}")
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
        if weight != 0
    ]
    if not scaled:
        raise AdapterError("every weight is 0")
    total = scaled[0]
    for part in scaled[1:]:
        total = total + part
    return total
