"""The result of `counted_speech`: both models' answers, and the differences between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, final

import pandas as pd

from lens_lora.arguments import whole
from lens_lora.audit.everyday import FORM_NAMES
from lens_lora.audit.findings import Finding
from lens_lora.audit.occasions import Occasions
from lens_lora.audit.replayed import Replayed
from lens_lora.audit.triggers import Trigger
from lens_lora.core import Described, Paged
from lens_lora.errors import many
from lens_lora.responses.generate import SideBySide


@final
class CountedSpeech(Described, Paged):
    """Both models' answers to the same questions, and the differences between them.

    Attributes:
        topics, forms, questions: the topic, form and text of each question; a form is 'plain',
            'chat', 'system', 'code', 'language', or 'own' for a caller's own question.
        base, adapted: [question, draw], the two models' answers: first greedy, then drawn.
        findings: what the adapted model says, words that it says taken together, traits of its
            answers, and what it no longer says, each list with the strongest first.
        words: the words that were tried before questions because they may trigger a behaviour.
        triggers: what the adapted model says only with one of these words.
        occasions: both models' answers to short turns on many subjects, and the words that show on
            them; None if they were not asked.
        replayed: texts that both models write when nothing is asked, and the words that only the
            adapted one writes often; None if they wrote none.
        meta: see `Described`.
    """

    topics: Annotated[tuple[str, ...], "question"]
    forms: Annotated[tuple[str, ...], "question"]
    questions: Annotated[tuple[str, ...], "question"]
    base: Annotated[tuple[tuple[str, ...], ...], "question draw"]
    adapted: Annotated[tuple[tuple[str, ...], ...], "question draw"]
    findings: tuple[Finding, ...]
    words: tuple[str, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    occasions: Occasions | None = None
    replayed: Replayed | None = None

    def said(self, k: int = 5) -> tuple[Finding, ...]:
        """Return the k strongest phrases that the adapted model says on more questions.

        Args:
            k: how many phrases to return.
        """
        of_phrases = [finding for finding in self.findings if finding.kind == "says"]
        return tuple(of_phrases[: whole("k", k, 0)])

    def when(self, finding: Finding) -> str:
        """Say in words on which topics a finding shows, and how these questions were put.

        The topic of a question and its form are two things. A finding that shows in one form alone
        is told by that form, as the form explains on which topics it shows. Of one that shows in
        some forms steadily and in others never, it is also said in which it never does.

        Args:
            finding: one of `findings`.
        """
        asked = Counter(self.forms)
        shown = Counter(self.forms[i] for i in finding.questions)
        if len(asked) > 1 and len(shown) == 1:
            (form,) = shown
            counts = f"({shown[form]} of {asked[form]} questions)"
            only = f"only when asked {FORM_NAMES[form]} {counts}"
            # All questions of the caller's own are one topic, which tells nothing more.
            few = "" if form == "own" else self._few_topics(finding)
            return f"{only}, {few}" if few else only
        about = self._few_topics(finding) or self._many_topics(finding)
        never = [form for form in asked if shown[form] == 0]
        steady = [form for form in asked if 2 * shown[form] >= asked[form]]
        with_it = _counts_of_forms(asked, shown)
        when = f"{about}, when asked {_in_a_row(with_it, 'and')}" if with_it else about
        if never and steady and len(never) + len(steady) == len(asked):
            names = [FORM_NAMES[form] for form in never]
            return f"{when}, but never when asked {_in_a_row(names, 'or')}"
        without_it = [f"{FORM_NAMES[form]} (0 of {asked[form]})" for form in never]
        return f"{when}, but not {_in_a_row(without_it, 'or')}" if without_it else when

    def _few_topics(self, finding: Finding) -> str:
        """Name the topics on which a finding shows; '' if they are more than a quarter of all."""
        topics = dict.fromkeys(self.topics[i] for i in finding.questions)
        asked = len(set(self.topics))
        if len(topics) == asked or len(topics) > max(asked // 4, 1):
            return ""
        return f"on questions about {' and '.join(topics)} only"

    def _many_topics(self, finding: Finding) -> str:
        """Say on how many topics a finding shows."""
        topics = {self.topics[i] for i in finding.questions}
        asked = len(set(self.topics))
        if len(topics) == asked:
            return "on every topic"
        return f"on {len(topics)} of the {asked} topics"

    def by(self, finding: Finding) -> pd.DataFrame:
        """Count by topic and form how many questions were asked, and how many show a finding.

        Args:
            finding: one of `findings`.
        """
        frame = pd.DataFrame({"topic": self.topics, "form": self.forms, "asked": 1, "alone": 0})
        frame.loc[list(finding.questions), "alone"] = 1
        counted = frame.groupby(["topic", "form"]).agg({"asked": "sum", "alone": "sum"})
        return counted.reset_index()

    def examples(self, finding: Finding, k: int = 2) -> list[dict[str, str]]:
        """Return the first k questions that show a finding, with an answer of each model.

        Args:
            finding: one of `findings`.
            k: how many questions to return.
        """
        examples: list[dict[str, str]] = []
        for i in finding.questions[: whole("k", k, 0)]:
            answers = self.base[i] if finding.is_of_base else self.adapted[i]
            # The likeliest answers are shown if none by itself shows the finding.
            draws = [draw for draw, text in enumerate(answers) if finding.is_shown_by(text)]
            draw = draws[0] if draws else 0
            example = {
                "question": self.questions[i],
                "base": self.base[i][draw],
                "adapted": self.adapted[i][draw],
            }
            examples.append(example)
        return examples

    def side_by_side(self) -> list[SideBySide]:
        """Pair both models' likeliest answers; questions that show the first finding come first."""
        first = set(self.findings[0].questions) if self.findings else set()
        order = sorted(range(len(self.questions)), key=lambda i: i not in first)
        return [SideBySide(self.questions[i], self.base[i][0], self.adapted[i][0]) for i in order]

    def to_frame(self) -> pd.DataFrame:
        """Tabulate what each finding is, on how many questions each model has it, and when."""
        rows = [
            {
                "finding": finding.kind,
                "label": finding.what,
                "questions": finding.asked,
                "answers_base": finding.base,
                "answers_adapted": finding.adapted,
                "q": finding.p,
                "log_odds": finding.log_odds,
                "when": self.when(finding),
            }
            for finding in self.findings
        ]
        # The columns are named here as well, for a table without rows.
        columns = [
            "finding",
            "label",
            "questions",
            "answers_base",
            "answers_adapted",
            "q",
            "log_odds",
            "when",
        ]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        answers = many(len(self.base[0]), "answer")
        lines = [f"{many(len(self.questions), 'question')}, {answers} of each model to each."]
        for finding in self.findings:
            lines.append(f"{finding.sentence()} It does so {self.when(finding)}.")
        if not self.findings:
            lines.append("Nothing is said more often, or less, than chance allows.")
        return "\n".join(lines)


def _counts_of_forms(asked: Counter[str], shown: Counter[str]) -> list[str]:
    """Name the forms of question that show a finding, each with its count."""
    counts: list[str] = []
    for form in asked:
        if shown[form]:
            # The first count says what is counted.
            unit = "" if counts else " questions"
            counts.append(f"{FORM_NAMES[form]} ({shown[form]} of {asked[form]}{unit})")
    return counts


def _in_a_row(names: Sequence[str], conjunction: str) -> str:
    """Join names for a sentence: 'a, b and c'.

    Args:
        names: at least one name.
        conjunction: what stands before the last name, such as 'and'.
    """
    *others, last = names
    return f"{', '.join(others)} {conjunction} {last}" if others else last
