"""What an audit without a question found, in words that claim no more than its controls allow."""

from __future__ import annotations

from lens_lora.results import drawing
from lens_lora.results.what_changed import By, Changes, WhatChanged
from lens_lora.show.text import magnitude, percent, signed, visible

__all__ = ["what_changed_story"]

_NAMED, _MODULES = 6, 4


@drawing.story.register(WhatChanged)
def what_changed_story(found: WhatChanged) -> str:
    """A paragraph a line: how much, where, towards which tokens, by which modules, how constant.

    Args:
        found: the audit.
    """
    parts = (_size, _tokens, _reading, _places, _modules, _constant)
    return "\n".join(text for part in parts if (text := part(found)))


def _size(found: WhatChanged) -> str:
    own = found.found
    text = (
        f"Over {found.texts} the next-token distribution moves by {magnitude(own.mean_kl)} nats a "
        f"token (KL, base to adapted)"
    )
    random, others = (_range(group) for group in (found.nulls, found.unrelated))
    if random:
        text += f"; null adapters, of the same sizes in random directions: {random}"
    if others:
        text += f"; unrelated adapters: {others}"
    return f"{text}. At first tokens, which are left out: {magnitude(own.first_kl)} nats."


def _range(group: tuple[Changes, ...]) -> str:
    values = sorted(one.mean_kl for one in group)
    if not values:
        return ""
    ends = dict.fromkeys((magnitude(values[0]), magnitude(values[-1])))
    return " to ".join(ends)


def _tokens(found: WhatChanged) -> str:
    lines: list[str] = []
    units: dict[By, str] = {"logit": "logits", "probability": "of probability"}
    for by, unit in units.items():
        frame = found.promoted(_NAMED, by)
        first = f"{signed(frame[by].tolist()[0])} {unit}"
        names = ", ".join(f"‘{visible(token)}’" for token in frame["token"])
        text = f"promoted most by mean {by}: {names} (the first by {first}"
        if "null" in frame:
            text += (
                f"; no token by more than {signed(frame['null'].tolist()[0])} under a null adapter"
            )
        lines.append(f"{text})")
    return f"P{'; '.join(lines)[1:]}."


def _reading(found: WhatChanged) -> str:
    frame = found.promoted(_NAMED, "reading")
    names = ", ".join(f"‘{visible(token)}’" for token in frame["token"])
    writers = found.writers(_MODULES).to_dict("records")
    shares = ", ".join(f"{row['name']} {percent(row['share'])}" for row in writers)
    return (
        "What the residual stream gains on the first tokens of the texts reads, through the final "
        f"norm and the unembedding, as {names}. It is added by {shares}."
    )


def _places(found: WhatChanged) -> str:
    frame = found.where(1)
    if not len(frame):
        return ""
    row = frame.iloc[0]
    return (
        f"The next token changes most after {row['context']!r}, by {magnitude(row['kl'])} nats: "
        f"{row['promoted']}."
    )


def _modules(found: WhatChanged) -> str:
    if not bool(found.shares.any()):
        return ""
    rows = found.modules(_MODULES).to_dict("records")
    shares = ", ".join(f"{row['site']} {percent(row['share'])}" for row in rows)
    return (
        f"Of the quadratic KL, {magnitude(float(found.shares.sum()))} nats a token, most belongs "
        f"to {shares}."
    )


def _constant(found: WhatChanged) -> str:
    shares = ", ".join(f"{percent(v)} at {name}" for name, v in found.found.constant.items())
    return (
        f"How much of the shift of activations is one vector, whatever the token, on held-out "
        f"texts: {shares}."
    )
