"""The next token before and after, by probability; and what first order says of its logit.

By raw logit, tokens that neither model would ever say come first: a rare token's logit may move by
much while its probability stays near zero. So rows are ordered by the change of probability, and
tokens to which neither model gives a ten-thousandth are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from lens_lora.analyses.explain_margin import Explanation
from lens_lora.show.tables.parts import Row
from lens_lora.show.text import percent, points, signed, visible

__all__ = ["MOVED_HEADS", "moved_rows", "site_moves"]

MOVED_HEADS: Row = (
    *("token", "base model", "with the adapter", "change", "logit shift, first order"),
)
Pairs = list[tuple[str, str]]
_RARE = 1e-4


def moved_rows(e: Explanation, k: int) -> list[Row]:
    """The k next tokens that gain the most probability, then the k that lose the most.

    Args:
        e: the explanation of one prompt.
        k: how many of each.

    Returns:
        A cell for each of MOVED_HEADS; probabilities are of real runs.
    """
    base, adapted = e.probabilities
    change, logits = adapted - base, e.shift.joint[0] - e.shift.joint[0].mean()
    up, down = _ends(e, change.tolist(), k)
    return [
        (
            visible(e.shift.strings[i]),
            percent(float(base[i])),
            percent(float(adapted[i])),
            points(float(change[i])),
            signed(float(logits[i])),
        )
        for i in (*up, *reversed(down))
    ]


def site_moves(e: Explanation, k: int) -> list[tuple[str, Pairs, Pairs]]:
    """What each of the largest sites does to the next token's probabilities, to first order.

    Args:
        e: the explanation of one prompt.
        k: how many tokens raised, and how many lowered.

    Returns:
        (site, (token, change of probability and logit shift) of each raised, of each lowered).
    """
    base, rows = e.probabilities[0], []
    for site, shifts in zip(e.module_shift.sites, e.module_shift.values[0], strict=True):
        logits = shifts.to(base)
        change, relative = base * (logits - (base * logits).sum()), logits - logits.mean()
        sides: list[Pairs] = [
            [
                (
                    visible(e.shift.strings[i]),
                    f"{points(float(change[i]))}, {signed(float(relative[i]))}",
                )
                for i in chosen
            ]
            for chosen in _ends(e, change.tolist(), k)
        ]
        rows.append((site.name, *sides))
    return rows


def _ends(e: Explanation, change: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """The k that rise most and the k that fall most, of the tokens that a model might say."""
    said = (e.probabilities.amax(0) >= _RARE).nonzero().flatten().tolist()
    order = sorted(said, key=lambda i: -change[i])
    return [i for i in order[:k] if change[i] > 0], [i for i in order[::-1][:k] if change[i] < 0]
