"""The story of an audit, which claims no more than its controls allow."""

from __future__ import annotations

from collections.abc import Iterable

from lens_lora.audit.what_changed import WhatChanged
from lens_lora.core import drawing
from lens_lora.show.text import (
    magnitude,
    reading_text,
    signed,
    visible,
)

_TOKENS_NAMED = 6


@drawing.story.register(WhatChanged)
def what_changed_story(changed: WhatChanged) -> str:
    """Tell the brief, how much changes, and which tokens are promoted, one paragraph per line."""
    first = magnitude(changed.found.first_kl)
    at_first = f"At the texts' first tokens, which are left out, the mean KL is {first} nats."
    size = f"{moved_text(changed)} {at_first}"
    paragraphs = [changed.brief().told, size, promoted_text(changed), reading_text(changed.meta)]
    return "\n".join(filter(None, paragraphs))


def moved_text(changed: WhatChanged) -> str:
    """State how far the next-token distribution moves, and how far the controls move it."""
    size = f"{magnitude(changed.found.mean_kl)} nats a token (mean KL from the base)"
    moves = [f"On {changed.texts}, the adapter moves the next-token distribution by {size}."]
    if changed.nulls:
        moved = _range(changes.mean_kl for changes in changed.nulls)
        moves.append(f"As a control, its own updates moved to other modules do so by {moved}.")
    if changed.unrelated:
        others = _range(changes.mean_kl for changes in changed.unrelated)
        moves.append(f"Adapters trained for something else do so by {others}.")
    return " ".join(moves)


def _range(values: Iterable[float]) -> str:
    """Write a range of values, such as '0.1 to 0.3', or '0.1' where all are equal."""
    ends = sorted(values)
    return " to ".join(dict.fromkeys(map(magnitude, (ends[0], ends[-1]))))


def promoted_text(changed: WhatChanged) -> str:
    """Name the tokens that are promoted most, beside the largest shift under a control."""
    frame = changed.promoted(_TOKENS_NAMED)
    most = f"the first by {signed(frame['logit'].tolist()[0])} logits"
    if "null" in frame:
        most += f"; no token by more than {signed(frame['null'].tolist()[0])} under a control"
    tokens = ", ".join(f"‘{visible(token)}’" for token in frame["token"])
    return f"Promoted most by mean logit: {tokens} ({most})."
