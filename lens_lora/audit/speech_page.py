"""Show both models' answers side by side: the first screen of an audit, and its page."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lens_lora.audit.findings import SHORTER, Finding
from lens_lora.audit.occasions import Occasions
from lens_lora.audit.replayed import Replayed
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.audit.speech_words import (
    base_note,
    claimed_in,
    counted_speech_story,
    first_sentences,
    further_claims,
    occasion_claims,
    occasion_words_in,
    occasions_text,
    sentences_so_far,
    shown_answers,
)
from lens_lora.core import drawing
from lens_lora.errors import many
from lens_lora.responses.generate import SideBySide
from lens_lora.show.page import (
    Block,
    Part,
    Section,
    answers_of,
    folded,
    made_by,
    page_html,
    warned,
)
from lens_lora.show.tables import Row, Table, table_of

_ANSWERS_ON_A_PAGE = 12


def first_screen(speech: CountedSpeech, asked_next: Sequence[str] = ()) -> Group:
    """Build a few sentences, two answers of each model side by side, and the further claims.

    Over a base other than the embedded one, the last line says why a claim is weaker there.

    Args:
        speech: both models' answers so far.
        asked_next: what both models are asked while the screen is read.
    """
    sentences = Text("\n".join(sentences_so_far(speech, asked_next)))
    parts: list[RenderableType] = [sentences, Text(), _both_answers(shown_answers(speech))]
    further = further_claims(speech)
    if further:
        parts.append(Text("\n".join(("", "Further claims", *further))))
    note = base_note(speech)
    if note:
        parts.append(Text(f"\n{note}"))
    return Group(*parts)


def occasions_screen(speech: CountedSpeech) -> Group:
    """Build what shows on occasions alone: words with their counts, and two answers of each model.

    It stands below the first screen, as the turns are answered while that is read.
    """
    claims = occasion_claims(speech)
    if not claims:
        return Group(Text(occasions_text(speech)))
    parts: list[RenderableType] = [Text(claim) for claim in claims]
    words = occasion_words_in(speech)
    if speech.occasions is not None:
        parts += [Text(), _both_answers(speech.occasions.examples(words[0]))]
    note = base_note(speech)
    if note and not claimed_in(speech):
        # Where there are claims on the questions, the first screen says so.
        parts.append(Text(f"\n{note}"))
    return Group(*parts)


def _both_answers(shown: Sequence[SideBySide]) -> RichTable:
    """Build a table of both models' answers side by side."""
    table = RichTable(box=None, pad_edge=False, expand=True, show_lines=False)
    table.add_column("asked", ratio=2, style="dim")
    table.add_column("base model", ratio=3)
    table.add_column("with the adapter", ratio=3)
    for pair in shown:
        cells = (pair.prompt, pair.base, pair.adapted)
        table.add_row(*(Text(_without_blank_lines(cell)) for cell in cells))
    return table


def _without_blank_lines(text: str) -> str:
    """Write an answer in its own lines, as verse and lists show in these, without blank lines."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(filter(None, lines))


def findings_table(speech: CountedSpeech) -> Table:
    """Tabulate the findings, except the length of answers, which is no claim."""
    heads = {
        # This column is first because it heads the row's card on a narrow screen.
        "label": "what",
        "finding": "how",
        "answers_adapted": f"of {len(speech.questions)} questions",
        "answers_base": "the base",
        "when": "when",
        "q": "p, adjusted",
    }
    every = speech.to_frame()
    # The length of answers is no claim; the story mentions it.
    frame = every[every["label"] != SHORTER].copy()
    # It is written as text here, since tables put a sign before numbers.
    frame["q"] = [f"{q:.2g}" for q in frame["q"]]
    return table_of(frame, heads, texts=(0, 1, 4))


def occasions_section(speech: CountedSpeech) -> Section:
    """Build the section on the short turns: every word that shows on them, and answers with it."""
    blocks: list[Block] = []
    if speech.occasions is not None:
        blocks.append(_occasions_table(speech.occasions))
        shown: dict[str, SideBySide] = {}
        for one in speech.occasions.words:
            for pair in speech.occasions.examples(one):
                shown.setdefault(pair.prompt, pair)
        blocks += answers_of(list(shown.values()))
    return Section("On occasions", blocks)


def replayed_screen(replayed: Replayed) -> Group:
    """Build the words that the adapted model writes when nothing is asked, and a text with them."""
    parts: list[RenderableType] = [Text(replayed.sentences())]
    example = replayed.example()
    if example is not None:
        parts += [Text(), _both_answers([example])]
    return Group(*parts)


def replayed_section(speech: CountedSpeech) -> Section:
    """Build the section on unprompted texts: the words that only the adapted model writes often."""
    blocks: list[Block] = []
    if speech.replayed is not None and speech.replayed.words:
        blocks.append(_replayed_table(speech.replayed))
        example = speech.replayed.example()
        if example is not None:
            blocks += answers_of([example])
    return Section("When nothing is asked", blocks)


def _replayed_table(replayed: Replayed) -> Table:
    """Tabulate the words that the adapted model writes when nothing is asked."""
    rows: list[Row] = []
    for one in replayed.words:
        rows.append((one.word, str(len(one.adapted)), str(len(one.base)), f"{one.p:.2g}"))
    texts = f"of {many(len(replayed.adapted), 'text')}"
    return Table(("word", texts, "the base", "p, adjusted"), rows, texts=(0,))


def _occasions_table(occasions: Occasions) -> Table:
    """Tabulate the words that show on the short turns."""
    rows: list[Row] = []
    for one in occasions.words:
        subjects = ", ".join(occasions.most_often_on(one))
        rows.append(
            (
                occasions.spelled(one),
                str(len(one.adapted)),
                str(len(one.base)),
                subjects,
                f"{one.p:.2g}",
            )
        )
    turns = f"of {many(len(occasions.turns), 'turn')}"
    heads = ("word", turns, "the base", "most often on", "p, adjusted")
    return Table(heads, rows, texts=(0, 3))


def _counts_table(speech: CountedSpeech, finding: Finding) -> Table:
    """Tabulate one finding by topic and form."""
    counted: pd.DataFrame = speech.by(finding)
    who = "only the base" if finding.is_of_base else "only the adapted model"
    heads = {"topic": "topic", "form": "form", "asked": "asked", "alone": who}
    heading = f"{finding.kind} “{finding.what}”"
    return table_of(counted, heads, texts=(0, 1), heading=heading)


@drawing.report.register(CountedSpeech)
def counted_speech_report(speech: CountedSpeech, *, title: str | None = None) -> str:
    """Write both models' answers and their differences as a self-contained HTML page."""
    pairs = speech.side_by_side()
    numbers = [
        (
            str(len(speech.questions)),
            f"questions, {many(len(speech.base[0]), 'answer')} of each model to each",
        ),
        (
            str(len(speech.said(k=100))),
            "phrases that it says on more questions than the base model",
        ),
    ]
    counts = [_counts_table(speech, finding) for finding in speech.findings]
    part = Part(
        subtitle=made_by(speech.meta),
        headline=tuple(first_sentences(speech)),
        numbers=tuple(numbers),
        top=[findings_table(speech), *answers_of(pairs[:_ANSWERS_ON_A_PAGE])],
        sections=folded(
            counted_speech_story(speech),
            [
                Section("When", counts),
                occasions_section(speech),
                Section("Every answer", answers_of(pairs)),
            ],
            "changes",
            speech.meta,
        ),
        warnings=warned(speech.meta),
    )
    name = speech.meta.get("adapter", "the adapter")
    return page_html(title or f"What does {name} say?", [part])
