"""How far an adapter moves texts that have nothing to do with its training.

KL(base ‖ adapted), in nats per token, is compared with the KL between the base and the base with
noise of the size of its rounding. KL grows with the square of the shift that makes it, so a bound
of SIGMAS roundings on the shift is one of SIGMAS² on KL.

A few texts decide if KL is far from every bound; otherwise all texts are run.

Cost: two forward passes over 15 short texts, and two over 4 of them for the rounding. If KL is less
than a hundred times that of rounding, two more over all 110 texts for each of the two. If a bound
on the mean KL is given, KL is measured over all 110 texts in any case, and so is the rounding where
the bound is less than a hundred times it.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core import SIGMAS, LoraLens, Prompts, alone, rounding_hooks
from lens_lora.errors import many
from lens_lora.ship.checks import Check, Outcome
from lens_lora.texts.divergences import text_divergences
from lens_lora.texts.neutral import readable_texts

EFFECT = "changes neutral texts"
KL = "KL on neutral texts"

# Every eighth neutral text decides if KL is far from its bounds.
_EIGHTH = 8
# Every fourth of these is enough to measure the rounding.
_FOURTH = 4
# KL is far from rounding if it is this many times larger: no other text would change the outcome.
_CLEAR = 100


class _NeutralKL(NamedTuple):
    """KL over some texts, in nats per token.

    Attributes:
        largest: the mean over tokens of the text where it is largest.
        mean: the mean over all tokens.
        texts: how many there are.
    """

    largest: float
    mean: float
    texts: int


@alone
def neutral_checks(lens: LoraLens, max_kl: float | None, progress: bool) -> list[Check]:
    """Check that the adapter moves neutral texts beyond rounding, and by no more than a bound.

    Args:
        lens: the adapter over the base model.
        max_kl: the largest mean KL, in nats per token; None if there is no bound.
        progress: show bars.
    """
    lens.check_state()
    some_texts = readable_texts(lens.model, lens.prepend_bos, _EIGHTH)
    all_texts = readable_texts(lens.model, lens.prepend_bos)
    if some_texts is None or all_texts is None:
        return _unasked(max_kl)

    kl = _kl(lens, some_texts, progress)
    fewest = some_texts.chosen(range(0, some_texts.batch, _FOURTH))
    floor = _kl_of_rounding(lens, fewest, progress)

    is_near_rounding = not kl.largest > _CLEAR * floor.largest
    is_bound_near_rounding = max_kl is not None and max_kl < _CLEAR * floor.mean
    if is_near_rounding or is_bound_near_rounding:
        floor = _kl_of_rounding(lens, all_texts, progress)
    if is_near_rounding or max_kl is not None:
        kl = _kl(lens, all_texts, progress)

    return [_effect_check(kl, floor, some_texts), _kl_check(kl, floor, max_kl)]


def _unasked(max_kl: float | None) -> list[Check]:
    reason = "the tokenizer has no tokens of which a text could be made"
    outcome: Outcome = "not asked" if max_kl is None else "undecided"
    return [Check(EFFECT, "undecided", reason), Check(KL, outcome, reason)]


def _effect_check(kl: _NeutralKL, floor: _NeutralKL, texts: Prompts) -> Check:
    outcome: Outcome = "passed" if kl.largest > floor.largest else "undecided"
    measured = f"KL up to {kl.largest:.2g} nats per token in {many(kl.texts, 'text')}"
    if texts.sources[0].how == "ids":
        measured += " of the tokenizer's own tokens"
    bound = f"above rounding, {floor.largest:.1g}"
    return Check(EFFECT, outcome, measured, bound, value=kl.largest)


def _kl_check(kl: _NeutralKL, floor: _NeutralKL, max_kl: float | None) -> Check:
    measured = f"{kl.mean:.3g} nats per token in {many(kl.texts, 'text')}"
    if max_kl is None:
        return Check(KL, "not asked", measured, value=kl.mean)
    outcome: Outcome = "passed"
    if kl.mean > max(max_kl, floor.mean):
        outcome = "failed"
    elif max_kl < floor.mean:
        outcome = "undecided"
    return Check(KL, outcome, measured, f"at most {max_kl:g}", value=kl.mean)


def _kl(lens: LoraLens, texts: Prompts, progress: bool) -> _NeutralKL:
    """KL(base ‖ adapted). Two forward passes."""
    base = (lens, lens.gates(0.0))
    adapted = (lens, lens.gates(1.0))
    counted = texts.distinct()
    (sums,) = text_divergences(base, [adapted], texts, counted, progress=progress)
    return _per_token(sums, counted.sum(1))


def _kl_of_rounding(lens: LoraLens, texts: Prompts, progress: bool) -> _NeutralKL:
    """The largest KL that rounding alone explains: between the base and itself with noise.

    Two forward passes.
    """
    base = (lens, lens.gates(0.0))
    counted = texts.distinct()
    noise = rounding_hooks(lens)
    (sums,) = text_divergences(base, [base], texts, counted, hooks=noise, progress=progress)
    return _per_token(SIGMAS**2 * sums, counted.sum(1))


def _per_token(sums: Float[Tensor, " text"], counts: Int[Tensor, " text"]) -> _NeutralKL:
    has_tokens = counts > 0
    by_text = sums[has_tokens] / counts[has_tokens]
    return _NeutralKL(float(by_text.max()), float(sums.sum() / counts.sum()), len(sums))
