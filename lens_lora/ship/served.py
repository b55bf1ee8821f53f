"""Is what a server answers the adapter that was trained? Measured from its log-probabilities.

1. The server is asked for the log p of each token of neutral texts and the user's own
   (`completions`, `served_rows`), with a bounded number of requests.
2. c, the residual and the floor of the served dtype are computed (`served_measure`).
3. Candidates for what may be served instead are run (`served_explanations`), and each is compared
   with what the server told.
4. The verdict: 'passed' if the residual is within SIGMAS floors and no candidate explains it,
   'failed' if it is beyond or one does, 'undecided' if the adapter hardly moves these texts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import final

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora import arguments
from lens_lora.core import SIGMAS, Adapter, Described, LoraLens, alone, stored
from lens_lora.errors import ArgumentError, many
from lens_lora.ship.checks import Check, Outcome, first_of, worst
from lens_lora.ship.completions import WAYS, Asked, Messages
from lens_lora.ship.served_explanations import Candidate, candidates, rounded_bases
from lens_lora.ship.served_measure import ROUNDING, ServedTokens, projection
from lens_lora.ship.served_rows import ServedRows, ask_all, texts_to_ask
from lens_lora.ship.server import Server
from lens_lora.texts.neutral import readable_texts

SERVED = "served as trained"
READING = "served tokens"

# Every eighth neutral text is asked.
_EIGHTH = 8
# Requests beside one per text: the list of names, and a failed try of each way of asking.
_REQUESTS_BESIDE = 1 + len(WAYS)
# Above this floor the effect of the adapter is too small, beside rounding, to be called served.
_VISIBLE = 0.2
# A candidate explains a deviation if it leaves at most half of it (a quarter of its square), and
# the deviation goes that far in its direction: 1 is all the way.
_LEAVES = 0.5
_FAR = (0.75, 1.25)
# The most explanations that a result keeps.
_KEPT = 10


@stored
@dataclasses.dataclass(frozen=True)
class ServedInstead:
    """A model that the server may be running, and how well it agrees with what the server told.

    Attributes:
        words: the candidate.
        residual: ‖ℓ − ℓ_candidate‖ / ‖ℓ₁ − ℓ₀‖; 0 if the candidate is what is served.
    """

    words: str
    residual: float


@final
class ServedVerification(Described):
    """How much of an adapter's effect a server shows, and what it may be running instead.

    Attributes:
        name: by which the server was asked.
        url: of the server.
        way: how the server told log-probabilities.
        c: ⟨ℓ − ℓ₀, ℓ₁ − ℓ₀⟩ / ‖ℓ₁ − ℓ₀‖²: 1 if the adapter is served, 0 if the base is.
        residual: ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖: 0 if the adapter is served, up to `floor`.
        floor: the residual that rounding in the served dtype gives.
        effect: the root mean square of ℓ₁ − ℓ₀, in nats per token.
        tokens: how many tokens the server told of.
        requests_sent: how many requests there were.
        explanations: what may be served instead, the nearest first; none where the residual is
            within the floor, so that nothing else was run.
        checks: each with its outcome.
        meta: model, adapter, dtype and versions.
    """

    name: str
    url: str
    way: str
    c: float
    residual: float
    floor: float
    effect: float
    tokens: int
    requests_sent: int
    explanations: tuple[ServedInstead, ...]
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        """'failed' if any check failed, else 'undecided' if any is, else 'passed'."""
        return worst(self.checks)

    def to_frame(self) -> pd.DataFrame:
        """One row per explanation, the nearest first; the adapter itself is the first row."""
        rows = [{"served": "the adapter", "residual": self.residual}]
        rows += [{"served": e.words, "residual": e.residual} for e in self.explanations]
        return pd.DataFrame(rows)


@alone
def verify_served(
    lens: LoraLens,
    url: str,
    *,
    name: str | None = None,
    texts: Sequence[str] | Sequence[Messages] = (),
    dtype: str = "bfloat16",
    others: Sequence[Adapter] = (),
    new_tokens: int = 16,
    timeout: float = 60.0,
    progress: bool = True,
) -> ServedVerification:
    """Compare what a server answers with the base and the adapted model, token by token.

    Asked are 15 neutral texts and your own, a request each, for the log-probabilities of their
    tokens (vLLM, SGLang, text-generation-inference, and the completions API with `echo`); of a
    server that has none of these, for those of the tokens that it generates (llama.cpp, and the
    chat API). Up to six requests more find out how it is asked. Nothing is tried again and no
    redirect is followed. A key is taken from the environment variable LENS_LORA_API_KEY.

        >>> ll.verify_served(lens, "http://127.0.0.1:8000", name="my-adapter")  # doctest: +SKIP

    Args:
        lens: the adapter over its base model, in the precision in which it was trained.
        url: of the server, such as http://127.0.0.1:8000.
        name: by which the server knows the adapter; None for the only name that it lists.
        texts: your own, strings or conversations, on which the adapter shows: the more it changes
            them, the sharper the comparison. They are sent to the server.
        dtype: what the server computes in: 'float32', 'float16', 'bfloat16', or 'int8' for an
            engine that rounds activations to 8 bit, as llama.cpp does for quantised weights.
        others: adapters that may be served in place of this one, such as older checkpoints.
        new_tokens: how many tokens are generated for a text, where the server tells of these alone.
        timeout: seconds to wait for an answer.
        progress: show bars.

    Cost: three forward passes of the texts. Where the residual is beyond the floor, one for each
        candidate, which are about as many as the layers and forty more; and three copies of the
        model, one after another, where none of these explains what is served.

    Raises:
        ServerError: the server cannot be asked, or tells no log-probabilities.
        ArgumentError: an unknown dtype; several names are served, and none was given.
        PromptError: a text that the model cannot read.
    """
    relative = ROUNDING[arguments.word("dtype", dtype, ROUNDING)]
    arguments.whole("new_tokens", new_tokens, least=1)
    if arguments.number("timeout", timeout) <= 0:
        raise ArgumentError(f"timeout={timeout!r}; expected seconds.")
    asked = _texts(lens, texts)
    server = Server(url, timeout, len(asked) + _REQUESTS_BESIDE)
    rows = ask_all(lens, server, name, asked, new_tokens, progress)
    reading = _reading_check(rows, len(asked))
    told = [row for row in rows.rows if not all(math.isnan(value) for value in row.log_p)]
    if not told:
        unread = Check(SERVED, "undecided", "no text was read as the adapter's tokenizer reads it")
        comparison = _Comparison(math.nan, math.nan, math.nan, math.nan, 0, ())
        return _result(lens, server, rows, comparison, (reading, unread))
    comparison = _compared(ServedTokens(lens, told), relative, others, progress)
    checks = (reading, _served_check(comparison, dtype))
    return _result(lens, server, rows, comparison, checks)


def _texts(lens: LoraLens, texts: Sequence[str] | Sequence[Messages]) -> list[Asked]:
    """The neutral texts, and then the user's own."""
    asked: list[Asked] = []
    neutral = readable_texts(lens.model, lens.prepend_bos, _EIGHTH)
    if neutral is not None:
        asked += texts_to_ask(neutral, [_opening(source.said) for source in neutral.sources])
    for text in texts:
        messages = None if isinstance(text, str) else text
        asked += texts_to_ask(lens.prompts(text), [messages])
    readable = [text for text in asked if len(text.ids) > 1]
    if not readable:
        raise ArgumentError(
            "the tokenizer reads no text of two tokens",
            remedy="give texts of your own.",
        )
    return readable


def _opening(said: str | None) -> Messages | None:
    """The conversation of a neutral text that is one."""
    return None if said is None else [{"role": "user", "content": said}]


# --- The comparison


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """The numbers of `ServedVerification`, and the nearest candidate's direction.

    Attributes:
        c, residual, floor, effect, tokens: as there.
        explanations: all of them, the nearest first.
        along_nearest: how far the deviation ℓ − ℓ₁ goes towards the nearest candidate; 1 is all
            the way.
    """

    c: float
    residual: float
    floor: float
    effect: float
    tokens: int
    explanations: tuple[ServedInstead, ...]
    along_nearest: float = math.nan

    @property
    def is_visible(self) -> bool:
        """Whether the adapter moves the texts enough, beside rounding, to be called served."""
        return self.floor <= _VISIBLE

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
        if not self.explanations or not _FAR[0] <= self.along_nearest <= _FAR[1]:
            return False
        left = self.nearest.residual
        if self.residual > self.bound:
            return left <= max(_LEAVES * self.residual, self.bound)
        return left <= _LEAVES * self.residual and self.residual > self.floor


def _compared(
    tokens: ServedTokens, relative: float, others: Sequence[Adapter], progress: bool
) -> _Comparison:
    lens = tokens.lens
    served = tokens.served
    base = tokens.at(lens.gates(0.0))
    adapted = tokens.at(lens.gates(1.0))
    shift = adapted - base
    effect = float(shift.norm())
    if effect == 0:
        return _Comparison(math.nan, math.nan, math.inf, 0.0, len(served), (_NOTHING,))
    floor = float((tokens.rounded(relative) - adapted).norm()) / effect
    c = projection(served - base, shift)
    residual = float((served - adapted).norm()) / effect
    if residual <= floor:
        # No candidate could be told from the adapter.
        return _with([], c, residual, floor, shift)
    likely = tqdm(
        list(candidates(tokens, others)), desc="candidates", leave=False, disable=not progress
    )
    found = _explanations(likely, served, adapted, effect)
    comparison = _with(found, c, residual, floor, shift)
    if residual > comparison.bound and not comparison.is_explained:
        found += _explanations(rounded_bases(tokens), served, adapted, effect)
        comparison = _with(found, c, residual, floor, shift)
    return comparison


_NOTHING = ServedInstead("the base, without the adapter", math.nan)
_Found = list[tuple[ServedInstead, float]]


def _with(
    found: _Found, c: float, residual: float, floor: float, shift: Float[Tensor, " token"]
) -> _Comparison:
    ordered = sorted(found, key=lambda pair: pair[0].residual)
    explanations = tuple(explanation for explanation, _ in ordered)
    root_mean_square = float(shift.square().mean().sqrt())
    along = ordered[0][1] if ordered else math.nan
    return _Comparison(c, residual, floor, root_mean_square, len(shift), explanations, along)


def _explanations(
    models: Iterable[Candidate],
    served: Float[Tensor, " token"],
    adapted: Float[Tensor, " token"],
    effect: float,
) -> _Found:
    """Each candidate with its residual, and how far the deviation goes towards it."""
    found: _Found = []
    for candidate in models:
        log_p = candidate.log_p()
        # A token that begins its row in this candidate says nothing about it.
        log_p = log_p.where(log_p.isfinite(), adapted)
        residual = float((served - log_p).norm()) / effect
        along = projection(served - adapted, log_p - adapted)
        found.append((ServedInstead(candidate.words, residual), along))
    return found


# --- The checks


def _reading_check(rows: ServedRows, asked: int) -> Check:
    """Whether the server reads texts as the adapter's tokenizer does."""
    left_out = asked - len(rows.rows) - len(rows.differing)
    remark = f"; {left_out} of {asked} texts cannot be sent so" if left_out else ""
    if not rows.way.is_of_prompt:
        return Check(READING, "not asked", f"asked by {rows.way.words}{remark}")
    bound = "those of the adapter's tokenizer"
    if rows.differing:
        measured = f"{len(rows.differing)} of {asked} texts are read otherwise"
        return Check(READING, "failed", measured, bound, first_of(rows.differing))
    if rows.put_in_front:
        measured = f"{rows.put_in_front} of {asked} texts are read with a token more in front"
        return Check(READING, "failed", measured, bound, "a BOS that training did not have?")
    return Check(READING, "passed", f"{many(len(rows.rows), 'text')} read alike{remark}", bound)


def _served_check(comparison: _Comparison, dtype: str) -> Check:
    c = comparison.c
    residual = comparison.residual
    measured = (
        f"c = {c:.3g}, residual {residual:.2g} over {many(comparison.tokens, 'token')}, "
        f"whose log p the adapter moves by {comparison.effect:.2g} nats"
    )
    bound = f"c = 1, residual at most {comparison.bound:.2g} ({dtype})"
    if comparison.is_explained:
        nearest = comparison.nearest
        where = f"the server answers as {nearest.words} (residual {nearest.residual:.2g})"
        return Check(SERVED, "failed", measured, bound, where, c)
    if residual > comparison.bound:
        nearest = comparison.nearest
        where = (
            f"no candidate explains it; the nearest is {nearest.words} "
            f"(residual {nearest.residual:.2g})"
        )
        return Check(SERVED, "failed", measured, bound, where, c)
    if not comparison.is_visible:
        where = "the adapter hardly moves these texts: give texts on which it shows"
        return Check(SERVED, "undecided", measured, bound, where, c)
    return Check(SERVED, "passed", measured, bound, value=c)


def _result(
    lens: LoraLens,
    server: Server,
    rows: ServedRows,
    comparison: _Comparison,
    checks: tuple[Check, ...],
) -> ServedVerification:
    meta: Mapping[str, str] = lens.describe()
    return ServedVerification(
        name=rows.name,
        url=server.url,
        way=rows.way.words,
        c=comparison.c,
        residual=comparison.residual,
        floor=comparison.floor,
        effect=comparison.effect,
        tokens=comparison.tokens,
        requests_sent=server.requests,
        explanations=comparison.explanations[:_KEPT],
        checks=checks,
        meta=meta,
    )
