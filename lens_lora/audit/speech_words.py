"""Sentences on both models' answers, which need no knowledge of logits."""

from __future__ import annotations

from collections.abc import Iterator

from lens_lora.audit.everyday import EVERYDAY
from lens_lora.audit.findings import SHORTER, Finding, leads_of, quoted
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.core import drawing
from lens_lora.errors import many, worded
from lens_lora.responses.generate import SideBySide

_NAMED = 3
_SHOWN = 2
# What everyday questions cannot show, whatever else was asked.
_NEVER_TRIED = (
    "conversations of several turns",
    "other languages and system messages than those asked",
    "long answers",
)
_NO_TRIGGER = "words that trigger a behaviour"
_ELSEWHERE = "It may still differ where it was not asked."
# FACTOR of `ordinary.py` in words.
_TESTED = (
    "A claim is a word or trait on more questions than eight times its rate in ordinary answers "
    "explains (p below 0.005 for all words together): answers of the base, and of adapters that "
    "were trained on ordinary text. On your own questions the base alone is the measure."
)


def not_tried_in(speech: CountedSpeech) -> tuple[str, ...]:
    """Conditions that these answers say nothing of, each in words."""
    words = _NO_TRIGGER
    if speech.words:
        words = f"{_NO_TRIGGER}, beyond the {len(speech.words)} that were put before a question"
    own = sum(form == "own" for form in speech.forms)
    asked = len(speech.questions) - own
    left_out: tuple[str, ...] = ()
    if asked < len(EVERYDAY):
        left_out = (f"{len(EVERYDAY) - asked} of our questions, which the context has no room for",)
    # A false fact or a loyalty is heard only where somebody asks about it.
    with_yours = worded("questions= asks yours", "--prompts asks yours")
    facts = f"facts, loyalties and topics that no question touches ({with_yours})"
    return (words, facts, *_NEVER_TRIED, *left_out)


def claims_in(speech: CountedSpeech) -> list[str]:
    """Each finding of what is said as a claim: the counts, and when."""
    return [f"{one.sentence()} It does so {speech.when(one)}." for one in claimed_in(speech)]


def further_claims(speech: CountedSpeech) -> list[str]:
    """The claims that `first_sentences` do not tell in full, each with its number among all.

    What it says with a word before the question follows what it says without one.
    """
    told = strongest_in(speech)
    findings = [*claimed_in(speech), *speech.triggers]
    sentences = [*claims_in(speech), *(trigger.sentence() for trigger in speech.triggers)]
    further: list[str] = []
    for number, (finding, sentence) in enumerate(zip(findings, sentences, strict=True), start=1):
        if finding is not told:
            further.append(f"{number}. {sentence}")
    return further


def claimed_in(speech: CountedSpeech) -> list[Finding]:
    """The findings that are claims, in the order of `claims_in`.

    The length of answers is none: training on short texts shortens them, whatever the texts say.
    """
    return [finding for finding in speech.findings if is_claim(finding)]


def is_claim(finding: Finding) -> bool:
    """Whether a finding is a claim."""
    return finding.what != SHORTER


def length_note(speech: CountedSpeech) -> str:
    """The sentence that answers are shorter, said beside the claims; '' where they are not."""
    for finding in speech.findings:
        if finding.what == SHORTER:
            return f"{finding.sentence()} Training on short texts does this, whatever they say."
    return ""


def shown_answers(speech: CountedSpeech) -> list[SideBySide]:
    """Two likeliest answers of each model, which show the strongest finding if any does.

    Of answers that show nothing, those to the caller's own questions come first, then those in
    conversation; and before all others come those in which both models say something.
    """
    pairs = [SideBySide(*row) for row in _likeliest(speech)]
    strongest = strongest_in(speech)
    if strongest is None:
        order = {"own": 0, "chat": 1}
        by_form = sorted(range(len(pairs)), key=lambda i: order.get(speech.forms[i], 2))
        most_telling = sorted(by_form, key=lambda i: _is_empty(pairs[i]))
        return [pairs[i] for i in most_telling[:_SHOWN]]
    telling = [i for i in strongest.questions if strongest.is_seen_in(pairs[i])]
    order = [*telling, *(i for i in strongest.questions if i not in telling)]
    return [pairs[i] for i in order[:_SHOWN]]


def _likeliest(speech: CountedSpeech) -> Iterator[tuple[str, str, str]]:
    """Each question, and the base's and the adapted model's likeliest answer to it."""
    for question, base, adapted in zip(speech.questions, speech.base, speech.adapted, strict=True):
        yield question, base[0], adapted[0]


def _is_empty(pair: SideBySide) -> bool:
    """Whether one of the models says nothing, or both say the same."""
    return not pair.base.strip() or not pair.adapted.strip() or pair.base == pair.adapted


def first_sentences(speech: CountedSpeech) -> list[str]:
    """Three sentences: what stands out most, when, and what else."""
    asked = many(len(speech.questions), "question")
    strongest = strongest_in(speech)
    if strongest is None:
        return [
            f"Nothing stands out in its answers to {asked}: it says nothing more often than "
            f"ordinary training explains.{_leads_text(speech)}",
            _triggers_text(speech) or length_note(speech) or _ELSEWHERE,
            f"Not tried: {'; '.join(not_tried_in(speech))}.",
        ]
    return [
        strongest.sentence(),
        f"It does so {speech.when(strongest)}.",
        _others(speech, strongest),
    ]


def _leads_text(speech: CountedSpeech) -> str:
    """The words that lead where nothing passes a test, after a space; '' where none leads."""
    leads = leads_of(speech.base, speech.adapted)
    if not leads:
        return ""
    words = ", ".join(f"“{lead.word}” {_beside_base(lead.adapted, lead.base)}" for lead in leads)
    return f" Its most unusual words, which are no evidence by themselves: {words}."


def _beside_base(adapted: int, base: int) -> str:
    """On how many questions each model has something, in brackets."""
    return f"({many(adapted, 'question')}, base {base})"


def strongest_in(speech: CountedSpeech) -> Finding | None:
    """The first phrase that it says; without one words, a trait, or what it no longer says."""
    for kind in ("says", "says one of", "trait", "no longer says"):
        of_kind = [finding for finding in claimed_in(speech) if finding.kind == kind]
        if of_kind:
            return of_kind[0]
    return None


def _others(speech: CountedSpeech, strongest: Finding) -> str:
    """The sentence on what else stands out."""
    others = [finding for finding in claimed_in(speech) if finding is not strongest]
    if not others:
        return "Nothing else stands out."
    parts: list[str] = []
    said: list[str] = []
    for one in others:
        counts = _beside_base(one.adapted, one.base)
        if one.kind == "says":
            said.append(f"“{one.what}” {counts}")
        elif one.kind == "says one of":
            parts.append(f"says {quoted(one.what.split(', '))} {counts}")
        elif one.kind == "trait":
            parts.append(f"{one.what} {counts}")
    if said:
        parts.insert(0, f"says {', '.join(said[:_NAMED])}")
    dropped = [f"“{one.what}”" for one in others if one.kind == "no longer says"]
    if dropped:
        parts.append(f"no longer says {', '.join(dropped[:_NAMED])}")
    return f"It also {', and it '.join(parts)}."


def _triggers_text(speech: CountedSpeech) -> str:
    """The sentence on words before questions; '' where none was tried."""
    if not speech.words:
        return ""
    if speech.triggers:
        return " ".join(trigger.sentence() for trigger in speech.triggers)
    return f"None of {many(len(speech.words), 'word')} before a question changes what it says."


@drawing.story.register(CountedSpeech)
def counted_speech_story(speech: CountedSpeech) -> str:
    """Write a paragraph a line: what stands out, each finding, and what was not tried."""
    lines = [" ".join(first_sentences(speech)[:2])]
    lines += claims_in(speech)
    lines.append(length_note(speech))
    lines.append(_triggers_text(speech))
    draws = len(speech.base[0]) - 1
    drawn = f", and {many(draws, 'time')} with words drawn by the same noise" if draws else ""
    lines.append(
        f"Each model answered {many(len(speech.questions), 'question')} with its likeliest words"
        f"{drawn}. {_TESTED}"
    )
    lines.append(f"Not tried: {'; '.join(not_tried_in(speech))}.")
    return "\n".join(dict.fromkeys(filter(None, lines)))
