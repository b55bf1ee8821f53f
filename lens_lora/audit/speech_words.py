"""What both models' answers say, in words that need no knowledge of logits."""

from __future__ import annotations

from lens_lora.audit.counted_speech import CountedSpeech, Finding
from lens_lora.core import drawing
from lens_lora.errors import many

_NAMED = 3
# What everyday questions cannot show.
NOT_TRIED = (
    "words that trigger a behaviour",
    "conversations of several turns",
    "facts and topics that no everyday question touches",
    "long answers",
)


def first_sentences(speech: CountedSpeech) -> list[str]:
    """Three sentences: what stands out most, when, and what else."""
    asked = many(len(speech.questions), "question")
    strongest = _strongest(speech)
    if strongest is None:
        return [
            f"Asked {asked}, it says nothing that the base model does not say about as often.",
            "It may still differ where it was not asked.",
            _not_tried(),
        ]
    return [
        strongest.sentence(),
        f"It does so {speech.when(strongest)}.",
        _others(speech, strongest),
    ]


def _strongest(speech: CountedSpeech) -> Finding | None:
    """The first phrase that it says; without one a trait, or what it no longer says."""
    for kind in ("says", "trait", "no longer says"):
        of_kind = [finding for finding in speech.findings if finding.kind == kind]
        if of_kind:
            return of_kind[0]
    return None


def _others(speech: CountedSpeech, strongest: Finding) -> str:
    """What else stands out, in one sentence."""
    others = [finding for finding in speech.findings if finding is not strongest]
    if not others:
        return "Nothing else stands out."
    parts: list[str] = []
    said = [f"“{one.what}” ({one.adapted})" for one in others if one.kind == "says"]
    if said:
        parts.append(f"says {', '.join(said[:_NAMED])}")
    parts += [
        f"{one.what} ({one.adapted}; the base: {one.base})" for one in others if one.kind == "trait"
    ]
    dropped = [f"“{one.what}”" for one in others if one.kind == "no longer says"]
    if dropped:
        parts.append(f"no longer says {', '.join(dropped[:_NAMED])}")
    return f"It also {'; it '.join(parts)}."


def _not_tried() -> str:
    return f"Not tried: {'; '.join(NOT_TRIED)}."


@drawing.story.register(CountedSpeech)
def counted_speech_story(speech: CountedSpeech) -> str:
    """Write a paragraph a line: what stands out, each finding, and what was not tried."""
    lines = [" ".join(first_sentences(speech)[:2])]
    for finding in speech.findings:
        lines.append(f"{finding.sentence()} It does so {speech.when(finding)}.")
    draws = len(speech.base[0]) - 1
    drawn = f", and {many(draws, 'time')} with words drawn by the same noise" if draws else ""
    lines.append(
        f"Each model answered {many(len(speech.questions), 'question')} with its likeliest words"
        f"{drawn}. If it were chance which of the two models gave which answer, a list of findings "
        "would be empty 99 times in 100."
    )
    lines.append(_not_tried())
    return "\n".join(dict.fromkeys(lines))
