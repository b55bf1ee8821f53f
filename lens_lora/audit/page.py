"""The tables of an audit, for the terminal and for its page."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from lens_lora.audit.brief import Claim
from lens_lora.audit.figures import promoted_figure, shares_figure
from lens_lora.audit.speech_page import findings_table, occasions_section, replayed_section
from lens_lora.audit.speech_words import first_sentences, in_short, strongest_in
from lens_lora.audit.what_changed import BY, By, WhatChanged
from lens_lora.audit.words import moved_text, promoted_text, what_changed_story
from lens_lora.core import drawing
from lens_lora.show import text
from lens_lora.show.page import Block, Part, Section, answers_of, folded, made_by, page_html, warned
from lens_lora.show.tables import Pairs, Table, in_terminal, table_of
from lens_lora.show.text import (
    magnitude,
    percent,
    signed,
    visible,
)

_PROMOTED = {
    "logit": ("promoted by mean logit", "by mean logit", "mean Δlogit"),
    "probability": ("promoted by mean probability", "by mean probability", "mean Δp"),
    "count": ("most often among the 20 promoted most", "by count", "after this share of tokens"),
    "reading": ("Δh on the texts' first tokens, read as tokens", "read as tokens", "logits"),
}


_TOKENS_SHOWN = 20
_ANSWERS_ON_TOP = 2
_PHRASES_ON_TOP = 4
# The length of a context that is shown, in characters.
_CONTEXT_SHOWN = 48
_PLACES_SHOWN = 12
_MODULES_SHOWN = 20


def _promoted_table(changed: WhatChanged, by: By, k: int) -> Table:
    """List the tokens promoted most; the heading gives the largest shift under each control."""
    frame = changed.promoted(k, by)
    title, heading, units = _PROMOTED[by]
    ends = ""
    if by == "reading":
        point = list(changed.found.readings)[-1]
        ends += f" at {point}"
    under = {"null": "a control", "unrelated": "an unrelated adapter"}
    most: list[str] = []
    for control, described in under.items():
        if control in frame:
            most.append(f"{signed(frame[control].tolist()[0])} under {described}")
    if most:
        ends += f" (at most {', '.join(most)})"
    heads = {"rank": "", "token": "token", by: units}
    return table_of(frame, heads, texts=(1,), title=title + ends, heading=heading + ends)


def _places_table(changed: WhatChanged, k: int) -> Table:
    """List the tokens after which the prediction of the next token changes most."""
    every_place = changed.where(k)
    is_without = every_place["promoted"] == ""
    left_out = int(is_without.sum())
    title = "where the next token changes most"
    if left_out:
        title += f" ({left_out} places left out: no probability rises there)"
    places = every_place[~is_without].copy()
    where = zip(places["text"], places["position"], strict=True)
    places["context"] = [text.context_text(changed.str_tokens[i], t) for i, t in where]
    for control in places.columns.intersection(["null", "unrelated"]):
        places[control] = list(map(magnitude, places[control]))
    heads = {
        "context": "after ⟦token⟧",
        "kl": "KL, nats",
        "promoted": "promoted there, Δp",
        "null": "KL, control",
        "unrelated": "KL, unrelated",
    }
    return table_of(places, heads, texts=(0, 2), title=title)


def _modules_table(changed: WhatChanged, k: int) -> Table:
    """List the sites with the largest share of the KL; no row if it was not split by site."""
    heads = {"site": "site", "module": "module", "nats": "nats a token", "share": "of all"}
    return table_of(changed.modules(k), heads, texts=(0, 1), title="modules with most of the KL")


def _groups_table(changed: WhatChanged) -> Table:
    """List the groups of tokens that the same texts promote."""
    groups = changed.promoted_groups()
    groups["tokens"] = [" ".join(map(visible, tokens)) for tokens in groups["tokens"]]
    heads = {"share": "of all promoted", "tokens": "tokens", "text": "most in"}
    return table_of(groups, heads, texts=(1, 2), heading="tokens that the same texts promote")


def _writers_table(changed: WhatChanged, k: int) -> Table:
    """List the blocks that add most of the mean Δh of the first tokens."""
    heads = {"name": "added by", "share": "share of ‖Δh‖²"}
    return table_of(changed.writers(k), heads, heading="which blocks add it")


def _size_table(changed: WhatChanged) -> Table:
    """State how much the adapter changes, and each control."""
    summary = changed.summary()
    behind_the_last_block = summary.columns[-1]
    heads = {"adapter": "adapter", "kind": "kind", "scale": "scale", "mean_kl": "KL, nats a token"}
    for by in BY:
        heads[f"largest_{by}"] = f"largest {by}"
    heads["share"] = "constant behind the last block"
    frame = summary.rename(columns={behind_the_last_block: "share"})
    return table_of(frame, heads, texts=(0, 1))


def _would_say_table(claims: Sequence[Claim], heading: str = "") -> Table:
    """List words that the adapter makes more likely, with their probability in every run."""
    rows: list[dict[str, str]] = []
    for claim in claims:
        row = {
            "says": claim.says,
            "adapted": f"{math.exp(claim.adapted):.2g}",
            "base": f"{math.exp(claim.base):.2g}",
            "null": f"{math.exp(claim.null):.2g}",
            "context": _end_of(claim.context),
        }
        rows.append(row)
    heads = {
        "says": "words",
        "adapted": "p, adapted",
        "base": "base",
        "null": "controls, at most",
        "context": "after",
    }
    return table_of(pd.DataFrame(rows), heads, texts=(0, 4), title=heading, heading=heading)


def _end_of(context: str) -> str:
    """Cut a claim's context to its last characters."""
    return context if len(context) <= _CONTEXT_SHOWN else f"…{context[-_CONTEXT_SHOWN:]}"


_WOULD_SAY = "What it would say"
_RAISED = "What is more likely than before, but no claim"


def brief_tables(changed: WhatChanged) -> Group:
    """Build the rest of the page: what it would say, what is only raised, what was not tried.

    The verdict is part of it if no questions were asked, since there is no first screen then, or if
    the adapter breaks the model.
    """
    brief = changed.brief()
    parts: list[RenderableType] = []
    if changed.speech is None or brief.is_broken:
        parts.append(Text(f"\n{brief.verdict}"))
    if brief.triggered:
        parts.append(Text("\n".join(("", "With a word before the question", *brief.triggered))))
    if brief.would_say:
        said = [f"- {claim.sentence()}" for claim in brief.would_say]
        parts.append(Text("\n".join(("", _WOULD_SAY, *said))))
    if brief.raised:
        parts += [Text(), in_terminal(_would_say_table(brief.raised, _RAISED))]
    parts.append(Text("\n".join(("", moved_text(changed), *brief.told_end, ""))))
    return Group(*parts)


def what_changed_tables(changed: WhatChanged, k: int = 10) -> Group:
    """Build the tables of promoted tokens, places and modules for the terminal."""
    promoted = (_promoted_table(changed, by, k) for by in BY)
    return in_terminal(*promoted, _places_table(changed, k), _modules_table(changed, k))


@drawing.report.register(WhatChanged)
def what_changed_report(changed: WhatChanged, *, title: str | None = None) -> str:
    """Write the audit as a self-contained HTML page."""
    logit, probability, count, reading = [_promoted_table(changed, by, _TOKENS_SHOWN) for by in BY]
    modules = _modules_table(changed, _MODULES_SHOWN)
    brief = changed.brief()
    speech = changed.speech
    claims = [] if speech is None else [findings_table(speech)]
    would_say: list[Block] = []
    if brief.would_say:
        would_say.append(_would_say_table(brief.would_say, _WOULD_SAY))
    # The section's own heading names the table.
    raised = [_would_say_table(brief.raised)] if brief.raised else []
    answers = [] if speech is None else speech.side_by_side()
    in_speech: list[Section] = []
    if speech is not None:
        in_speech = [occasions_section(speech), replayed_section(speech)]
    split: list[Block] = [shares_figure(changed), modules] if modules.rows else []
    sections = [
        Section(_RAISED, raised),
        *in_speech,
        Section("Every answer", answers_of([*answers, *changed.answers])),
        Section("How much", [_size_table(changed), promoted_figure(changed)]),
        Section(
            "Which tokens are promoted",
            [(logit, probability), (count, _groups_table(changed))],
        ),
        Section(
            "What the first tokens carry",
            [(reading, _writers_table(changed, _TOKENS_SHOWN))],
        ),
        Section("Where", [_places_table(changed, _PLACES_SHOWN)]),
        Section("Which modules", split),
    ]
    part = Part(
        subtitle=f"{made_by(changed.meta)} · {changed.texts}",
        headline=_headline(changed),
        numbers=_numbers(changed),
        top=[*answers_of(brief.answers[:_ANSWERS_ON_TOP]), *claims, *would_say],
        sections=folded(what_changed_story(changed), sections, "changes", changed.meta),
        warnings=warned(changed.meta),
    )
    return page_html(title or f"What did {changed.found.name} change?", [part])


def _headline(changed: WhatChanged) -> tuple[str, ...]:
    """Give the verdict, sentence by sentence, what a trigger word changes, and hints.

    Without counted speech the headline is the verdict, how far the model moves, and which tokens
    the adapter promotes.
    """
    brief = changed.brief()
    if changed.speech is None:
        return (brief.verdict, moved_text(changed), promoted_text(changed))
    first, *others = first_sentences(changed.speech)
    broken = brief.verdict.removesuffix(in_short(changed.speech))
    hints = brief.told_hints
    if strongest_in(changed.speech) is None:
        # The sentences tell what a trigger word changes, and the last one what was not tried.
        *others, not_tried = others
        return (broken + first, *others, *hints, not_tried)
    return (broken + first, *others, *brief.triggered, *hints)


def _numbers(changed: WhatChanged) -> Pairs:
    """Give the claims that most questions show; without counted speech, how much changes."""
    if changed.speech is not None:
        asked = len(changed.speech.questions)
        said = changed.speech.said(_PHRASES_ON_TOP)
        return [(str(one.adapted), f"of {asked} questions: “{one.what}”") for one in said]
    found = changed.found
    top = changed.promoted(1).to_dict("records")[0]
    promoted = f"logits, “{visible(top['token'])}”, promoted most"
    if "null" in top:
        promoted += f"; its updates elsewhere {signed(top['null'])} at most"
    largest_kl = float(found.kl[:, 1:].nan_to_num().max())
    constant = list(found.constant.values())[-1]
    return (
        (magnitude(found.mean_kl), "nats a token, KL from the base to the adapted model"),
        (signed(top["logit"]), promoted),
        (magnitude(largest_kl), "nats where it changes most"),
        (percent(constant), "of the shift behind the last block is one vector, whatever the token"),
    )
