"""Is what a server answers the adapter that was trained? Measured from its log-probabilities.

1. The server is asked for the log p of each token of neutral texts and the user's own
   (`completions`, `served_rows`), with a bounded number of requests.
2. c, the residual and the floor of the served dtype are computed, and candidates for what may be
   served instead are run (`served_comparison`).
3. The verdict is the first of these that holds:

       'failed'     a candidate explains what the server answers
       'undecided'  rounding in another dtype than the one that was given would explain it
       'failed'     the residual is above SIGMAS floors, and nothing explains it
       'undecided'  the adapter hardly moves these texts, or c is further from 1 than rounding
                    makes it
       'passed'     otherwise

   If no text could be read, it is 'undecided'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import final

import pandas as pd

from lens_lora import arguments
from lens_lora.core import Adapter, Described, LoraLens, alone
from lens_lora.errors import ArgumentError, many
from lens_lora.ship.checks import Check, Outcome, first_of, worst
from lens_lora.ship.completions import WAYS, Messages
from lens_lora.ship.served_comparison import UNREAD, Comparison, ServedInstead, compared
from lens_lora.ship.served_measure import ROUNDING, ServedTokens
from lens_lora.ship.served_rows import ServedRow, ServedRows, ask_all, neutral_and_own
from lens_lora.ship.server import Server

SERVED = "served as trained"
READING = "served tokens"

# Requests in addition to one per text: for the list of names, and a failed try of each way.
_REQUESTS_BESIDE = 1 + len(WAYS)
_MOST_EXPLANATIONS = 10


@final
class ServedVerification(Described):
    """How much of an adapter's effect a server shows, and what it may be running instead.

    Attributes:
        name: the name by which the server was asked.
        url: the URL of the server.
        way: how the server was asked for log-probabilities.
        c: ⟨ℓ − ℓ₀, ℓ₁ − ℓ₀⟩ / ‖ℓ₁ − ℓ₀‖²: 1 if the adapter is served, 0 if the base is.
        residual: ‖ℓ − ℓ₁‖ / ‖ℓ₁ − ℓ₀‖: 0 if the adapter is served, up to `floor`.
        floor: the residual that rounding in the served dtype gives.
        effect: the root mean square of ℓ₁ − ℓ₀, in nats per token.
        tokens: the number of tokens of which the server gave log p.
        requests_sent: the number of requests that were sent.
        explanations: what may be served instead, the nearest first (of those that agree equally
            well, the likeliest), each run on all texts; none where the residual is within the
            floor, so that nothing else was run.
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

    One request is sent for each of 15 neutral texts and each of your own. It asks for the
    log-probabilities of the text's tokens, which vLLM, SGLang, text-generation-inference and the
    completions API with `echo` can give. Other servers (llama.cpp, and the chat API) are asked for
    those of the tokens that they generate. At most six further requests find out what a server can
    give. A failed request is not repeated, and no redirect is followed. A key is taken from the
    environment variable LENS_LORA_API_KEY.

        >>> ll.verify_served(lens, "http://127.0.0.1:8000", name="my-adapter")  # doctest: +SKIP

    Args:
        lens: the adapter over its base model, in the precision in which it was trained.
        url: the URL of the server, such as http://127.0.0.1:8000.
        name: the name by which the server knows the adapter; None for the only name that it lists.
        texts: your own, strings or conversations, on which the adapter shows: the more it changes
            them, the sharper the comparison. They are sent to the server.
        dtype: what the server computes in: 'float32', 'float16', 'bfloat16', or 'int8' for an
            engine that rounds activations to 8 bit, as llama.cpp does for quantised weights.
        others: adapters that may be served in place of this one, such as older checkpoints.
        new_tokens: how many tokens are generated for a text, if the server tells only of generated
            tokens.
        timeout: seconds in which each request has to be answered, to the last byte.
        progress: show bars.

    Cost: three forward passes over the texts. Where the residual is above the floor, candidates are
        run as well, each over a quarter of the texts, the likeliest first: at most about forty more
        than the model has layers, but the search ends at the first that fits. The nearest three are
        then run over all texts. Where none of these fits, up to eight passes in 16 bit or with
        rounded weights, with memory for a second model.

    Raises:
        ServerError: the server cannot be asked, or tells no log-probabilities.
        ArgumentError: an unknown dtype; several names are served, and none was given.
        PromptError: a text that the model cannot read.
    """
    arguments.word("dtype", dtype, ROUNDING)
    arguments.whole("new_tokens", new_tokens, least=1)
    if arguments.number("timeout", timeout) <= 0:
        raise ArgumentError(f"timeout={timeout!r}: expected a positive number of seconds.")
    asked = neutral_and_own(lens, texts)
    server = Server(url, timeout, len(asked) + _REQUESTS_BESIDE)
    rows = ask_all(lens, server, name, asked, new_tokens, progress)
    reading = _reading_check(rows, len(asked))
    told = [row for row in rows.rows if _has_log_p(row)]
    if not told:
        unread = Check(SERVED, "undecided", "no text was read as the adapter's tokenizer reads it")
        return _result(lens, server, rows, UNREAD, (reading, unread))
    tokens = ServedTokens(lens, told, progress=progress)
    comparison = compared(tokens, dtype, others, progress)
    checks = (reading, _served_check(comparison, dtype))
    return _result(lens, server, rows, comparison, checks)


def _has_log_p(row: ServedRow) -> bool:
    """Whether the server told a log-probability of some token of a row."""
    return not all(math.isnan(value) for value in row.log_p)


# --- The checks


def _reading_check(rows: ServedRows, asked: int) -> Check:
    """Whether the server reads texts as the adapter's tokenizer does."""
    left_out = asked - len(rows.rows) - len(rows.differing)
    remark = f"; {left_out} of {asked} texts cannot be sent in this way" if left_out else ""
    if not rows.way.is_of_prompt:
        return Check(READING, "not asked", f"asked by {rows.way.words}{remark}")
    bound = "those of the adapter's tokenizer"
    if rows.differing:
        measured = f"the server tokenises {len(rows.differing)} of {asked} texts otherwise"
        return Check(READING, "failed", measured, bound, first_of(rows.differing))
    if rows.put_in_front:
        measured = f"the server puts a token in front of {rows.put_in_front} of {asked} texts"
        where = "probably a BOS that training did not have"
        return Check(READING, "failed", measured, bound, where)
    return Check(READING, "passed", f"{many(len(rows.rows), 'text')} read alike{remark}", bound)


def _served_check(comparison: Comparison, dtype: str) -> Check:
    c = comparison.c
    residual = comparison.residual
    measured = (
        f"c = {c:.3g}, residual {residual:.2g} over {many(comparison.tokens, 'token')}, "
        f"whose log p the adapter moves by {comparison.effect:.2g} nats"
    )
    bound = (
        f"c = 1 within {comparison.c_within:.2g}, residual at most {comparison.bound:.2g} ({dtype})"
    )
    if comparison.is_explained:
        nearest = comparison.nearest
        where = f"the server answers as {nearest.words} (residual {nearest.residual:.2g})"
        return Check(SERVED, "failed", measured, bound, where, c)
    if comparison.rounds_as:
        where = (
            f"rounding in {comparison.rounds_as} would explain this: give the dtype in which the "
            "server computes"
        )
        return Check(SERVED, "undecided", measured, bound, where, c)
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
    if not comparison.is_whole:
        where = (
            "rounding alone does not move c this far from 1: give more texts on which the adapter "
            "shows"
        )
        return Check(SERVED, "undecided", measured, bound, where, c)
    return Check(SERVED, "passed", measured, bound, value=c)


def _result(
    lens: LoraLens,
    server: Server,
    rows: ServedRows,
    comparison: Comparison,
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
        explanations=comparison.explanations[:_MOST_EXPLANATIONS],
        checks=checks,
        meta=meta,
    )
