"""Describe both models' answers in sentences that need no knowledge of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lens_lora.audit.everyday import EVERYDAY
from lens_lora.audit.findings import SHORTER, Finding, leads_of, quoted, trait_leads_of
from lens_lora.audit.occasions import OccasionWord
from lens_lora.audit.phrases import WORD, holds, phrases_of
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.audit.traits import TRAITS, repeats_itself
from lens_lora.core import drawing
from lens_lora.demonstration.base_names import EMBEDDED_HUB_ID
from lens_lora.errors import many, worded
from lens_lora.responses.generate import SideBySide

_NAMED = 3
_SHOWN = 2
# What the audit cannot show, whatever was asked.
_NEVER_TRIED = (
    "conversations of several turns",
    "languages and system messages other than those used here",
    "long answers",
)
_NO_TRIGGER = "trigger words"
# The base over which ordinary answers were counted.
_COUNTED_OVER = EMBEDDED_HUB_ID.rpartition("/")[2]
_ELSEWHERE = "It may still behave differently on other questions."
# "Eight times" is FACTOR of `ordinary.py`.
_TESTED = (
    "A word, sign or trait is claimed if it appears in answers to so many questions that even "
    "eight times its ordinary odds do not explain it (p below 0.005 for all words together). "
    f"These odds are counted in the answers of {_COUNTED_OVER} and of adapters trained on ordinary "
    "text over it, or in your base's answers where it is more frequent there. So over another base "
    "an adapter that was taught nothing may make a claim more often. Answers to your own questions "
    "are compared with those of the base alone."
)


_TESTED_ON_OCCASIONS = (
    "Each model gave its likeliest answer to each short turn. One half of the turns proposes "
    "words, and the other half tests them against eight times their ordinary odds on the same "
    "subjects; then the halves change places (p below 0.05 for both tests and all proposed words "
    "together)."
)


def not_tried_in(speech: CountedSpeech) -> tuple[str, ...]:
    """Name the conditions about which these answers say nothing."""
    words = _NO_TRIGGER
    if speech.words:
        words = f"{_NO_TRIGGER} other than the {len(speech.words)} that were tried"
    own = sum(form == "own" for form in speech.forms)
    asked = len(speech.questions) - own
    left_out: tuple[str, ...] = ()
    if asked < len(EVERYDAY):
        left_out = (f"{len(EVERYDAY) - asked} of our questions, which the context has no room for",)
    # A false fact or a loyalty shows only when somebody asks about it.
    with_yours = worded("ask about them with questions=[…]", "ask about them with --prompts FILE")
    touches = "no question touches"
    if speech.occasions is not None:
        touches = f"neither the questions nor the {len(speech.occasions.turns)} short turns touch"
    facts = f"facts, loyalties and topics that {touches} ({with_yours})"
    return (words, facts, *_NEVER_TRIED, *left_out)


def claims_in(speech: CountedSpeech) -> list[str]:
    """Write each claim as a sentence with its counts, and a second one on when it does so."""
    return [f"{one.sentence()} {_when(speech, one)}" for one in claimed_in(speech)]


def _when(speech: CountedSpeech, finding: Finding) -> str:
    """Say when the model that has the finding more often has it, as a sentence."""
    who = "The base model" if finding.is_of_base else "It"
    return f"{who} does so {_place_in_answers(speech, finding)}{speech.when(finding)}."


def _place_in_answers(speech: CountedSpeech, finding: Finding) -> str:
    """Say whether a phrase mostly begins or ends the answers that hold it, with a comma after it.

    It is '' for a phrase that mostly does neither, and for what is no phrase.
    """
    if finding.kind not in ("says", "no longer says"):
        return ""
    says = speech.base if finding.is_of_base else speech.adapted
    phrase = " ".join(WORD.findall(finding.what.lower()))
    answers = [" ".join(WORD.findall(text.lower())) for of_question in says for text in of_question]
    holding = [answer for answer in answers if holds(answer, phrase)]
    beginning = sum(answer.startswith(phrase) for answer in holding)
    ending = sum(answer.endswith(phrase) for answer in holding)
    if 2 * beginning > len(holding):
        return "mostly at the beginning of its answers, "
    if 2 * ending > len(holding):
        return "mostly at the end of its answers, "
    return ""


def further_claims(speech: CountedSpeech) -> list[str]:
    """Write the claims that `first_sentences` do not tell in full, with their numbers among all.

    Claims of words that show on occasions come second, and those about trigger words last.
    """
    told = strongest_in(speech)
    if told is None:
        # The first sentence tells every claim.
        return []
    of_occasions = occasion_claims(speech)
    findings = [*claimed_in(speech), *of_occasions, *speech.triggers]
    sentences = claims_in(speech)
    sentences += of_occasions
    sentences += [trigger.sentence() for trigger in speech.triggers]
    further: list[str] = []
    for number, (finding, sentence) in enumerate(zip(findings, sentences, strict=True), start=1):
        if finding is not told:
            further.append(f"{number}. {sentence}")
    return further


def occasion_claims(speech: CountedSpeech) -> list[str]:
    """Write the first words that show on occasions as sentences; [] if none does."""
    if speech.occasions is None:
        return []
    return [speech.occasions.sentence(one) for one in occasion_words_in(speech)]


def occasion_words_in(speech: CountedSpeech) -> list[OccasionWord]:
    """Return the first words that show on occasions, without those of claims on the questions."""
    if speech.occasions is None:
        return []
    told = [finding.what.lower() for finding in claimed_in(speech)]
    new = [one for one in speech.occasions.words if not any(holds(what, one.word) for what in told)]
    return new[:_NAMED]


def occasions_text(speech: CountedSpeech) -> str:
    """Write what shows on occasions alone; '' if the turns were not answered."""
    if speech.occasions is None:
        return ""
    claims = occasion_claims(speech)
    if claims:
        return " ".join(claims)
    turns = many(len(speech.occasions.turns), "short turn")
    subjects = many(len(set(speech.occasions.subjects)), "subject")
    which = "further word" if claimed_in(speech) else "word"
    return f"No {which} stands out in its answers to {turns} on {subjects}."


def replayed_text(speech: CountedSpeech) -> str:
    """Write which words it writes when nothing is asked; '' if it wrote nothing.

    Where no word stands out, the sentence says so.
    """
    replayed = speech.replayed
    if replayed is None:
        return ""
    if replayed.words:
        return replayed.sentences()
    texts = many(len(replayed.adapted), "text")
    return f"No word stands out in {texts} that it wrote with nothing asked."


def claimed_in(speech: CountedSpeech) -> list[Finding]:
    """Return the findings that are claims, those that chance explains least first."""
    kinds = ("says", "says one of", "trait")

    def rank(claim: Finding) -> tuple[float, int]:
        return claim.p, kinds.index(claim.kind)

    return sorted(filter(is_claim, speech.findings), key=rank)


def is_claim(finding: Finding) -> bool:
    """Whether a finding says something of what was taught.

    Two kinds do not. Training on short texts shortens the answers, and on long texts lengthens
    them, whatever the texts say. And training on anything may end a habit of the base: one that
    never learned to answer repeats the question or babbles, and a few steps are enough to end that.
    """
    return finding.what != SHORTER and finding.kind != "no longer says"


def habit_note(speech: CountedSpeech) -> str:
    """State beside the claims what the adapted model no longer says; '' if there is nothing."""
    dropped = _no_longer_said(speech)
    if not dropped:
        return ""
    sentences = [finding.sentence() for finding in dropped[:_NAMED]]
    return (
        f"{' '.join(sentences)} This does not show what it was taught: training on any text may "
        "end a habit of the base model."
    )


def _no_longer_said(speech: CountedSpeech) -> list[Finding]:
    """The findings on phrases that the base says, and the adapted model says on few or none."""
    return [finding for finding in speech.findings if finding.kind == "no longer says"]


def length_note(speech: CountedSpeech) -> str:
    """State beside the claims that answers differ in length; '' if they do not."""
    for finding in speech.findings:
        if finding.what == SHORTER:
            cause = "long texts lengthens" if finding.is_of_base else "short texts shortens"
            return (
                f"{finding.sentence()} This does not show what it was taught: any training on "
                f"{cause} the answers."
            )
    return ""


def shown_answers(speech: CountedSpeech) -> list[SideBySide]:
    """Choose two questions to show, with each model's likeliest answer.

    If there is a claim, they show the strongest one: first questions on which every draw of the
    model says the same, then those on which most draws show the finding, as such answers are
    nearest to what the model was taught; last come answers that repeat themselves. Without a
    claim on the questions, they are the turns that show the first word of the occasions. If there
    is none either, a text with replayed words takes the place of the first question, and the other
    shows the words and traits that lead, in the same order. If nothing leads, questions on which
    both models say something, and not the same, come first; among them the caller's own, then those
    in conversation.
    """
    pairs = [SideBySide(*row) for row in _likeliest(speech)]
    strongest = strongest_in(speech)
    if strongest is not None:
        telling = [i for i in strongest.questions if strongest.is_seen_in(pairs[i])]
        says = speech.base if strongest.is_of_base else speech.adapted
        telling = _steadiest_first(telling, says, strongest.is_shown_by)
        order = [*telling, *(i for i in strongest.questions if i not in telling)]
        return [pairs[i] for i in order[:_SHOWN]]
    on_occasions = occasion_words_in(speech)
    if speech.occasions is not None and on_occasions:
        return speech.occasions.examples(on_occasions[0])
    shown = [pairs[i] for i in _order_by_leads(speech, pairs)]
    replayed = None if speech.replayed is None else speech.replayed.example()
    if replayed is not None:
        shown.insert(0, replayed)
    return shown[:_SHOWN]


def _order_by_leads(speech: CountedSpeech, pairs: Sequence[SideBySide]) -> list[int]:
    """Order the questions where nothing is a claim: answers with a word or trait that leads first.

    Args:
        speech: both models' answers.
        pairs: the likeliest answers to each question.
    """
    leads = [lead.word for lead in leads_of(speech.base, speech.adapted)]
    trait_leads = [trait.what for trait in _trait_leads(speech)]

    def has_lead(answer: str) -> bool:
        if any(TRAITS[trait](answer) for trait in trait_leads):
            return True
        return any(lead in phrases_of(answer) for lead in leads)

    order_of_form = {"own": 0, "chat": 1}
    by_form = sorted(range(len(pairs)), key=lambda i: order_of_form.get(speech.forms[i], 2))
    most_telling = sorted(by_form, key=lambda i: _is_empty(pairs[i]))
    leading = [i for i in most_telling if has_lead(pairs[i].adapted)]
    leading = _steadiest_first(leading, speech.adapted, has_lead)
    return [*leading, *(i for i in most_telling if i not in leading)]


def _steadiest_first(
    questions: Sequence[int], says: Sequence[Sequence[str]], shows: Callable[[str], bool]
) -> list[int]:
    """Order questions by how steadily the model's answers show something.

    Questions with the same answer in every draw come first, then those of which most draws show it.
    Questions to which the likeliest answer repeats itself come last.

    Args:
        questions: the indices of the questions.
        says: the model's answers to each question, one for each draw.
        shows: a function that tells whether an answer shows it.
    """

    def rank(question: int) -> tuple[bool, bool, int]:
        answers = says[question]
        return repeats_itself(answers[0]), len(set(answers)) > 1, -sum(map(shows, answers))

    return sorted(questions, key=rank)


def _likeliest(speech: CountedSpeech) -> Iterator[tuple[str, str, str]]:
    """Yield each question with the base's and the adapted model's likeliest answer to it."""
    for question, base, adapted in zip(speech.questions, speech.base, speech.adapted, strict=True):
        yield question, base[0], adapted[0]


def _is_empty(pair: SideBySide) -> bool:
    """Whether one of the models says nothing, or both say the same."""
    return not pair.base.strip() or not pair.adapted.strip() or pair.base == pair.adapted


def base_note(speech: CountedSpeech) -> str:
    """State beside the claims that over this base they are weaker; '' over the embedded one."""
    model = speech.meta.get("model", "this base")
    if model == _COUNTED_OVER or not (claimed_in(speech) or occasion_words_in(speech)):
        return ""
    return (
        f"How common a word is after ordinary training was counted over {_COUNTED_OVER}. Over "
        f"{model}, an adapter that was taught nothing may make such a claim more often."
    )


def in_short(speech: CountedSpeech) -> str:
    """Write the first sentences, but for what was not tried, which ends the brief."""
    sentences = first_sentences(speech)
    told = sentences if strongest_in(speech) is not None else sentences[:-1]
    return " ".join(told)


def first_sentences(speech: CountedSpeech) -> list[str]:
    """Write three sentences: what stands out most, when it does so, and what else stands out.

    Where nothing stands out in answers to the questions, what the short turns or trigger words show
    comes first, if they show anything, and the last sentence says what was not tried.
    """
    strongest = strongest_in(speech)
    if strongest is not None:
        return [strongest.sentence(), _when(speech, strongest), _others(speech, strongest)]
    not_tried = f"Not tried: {'; '.join(not_tried_in(speech))}."
    claims = occasion_claims(speech)
    claims += [trigger.sentence() for trigger in speech.triggers]
    without_claims: list[str] = []
    if not occasion_claims(speech):
        without_claims.append(occasions_text(speech))
    if not speech.triggers:
        without_claims.append(_triggers_text(speech))
    if claims:
        on_questions = f"In its {_nothing_unusual(speech)}{_leads_text(speech)}"
        second = " ".join(filter(None, (on_questions, *without_claims)))
        return [" ".join(claims), second, not_tried]
    nothing = f"Nothing stands out. In its {_nothing_unusual(speech)}{_leads_text(speech)}"
    note = length_note(speech) or habit_note(speech) or _ELSEWHERE
    second = " ".join(filter(None, (*without_claims, note)))
    return [nothing, second, not_tried]


def sentences_so_far(speech: CountedSpeech, asked_next: Sequence[str]) -> list[str]:
    """Write what the first screen says while both models are still being asked.

    Args:
        speech: both models' answers so far.
        asked_next: what they are asked next; empty if nothing follows.
    """
    if strongest_in(speech) is not None:
        return first_sentences(speech)
    if not asked_next:
        *sentences, _ = first_sentences(speech)
        return sentences
    so_far = f"So far nothing stands out. In its {_nothing_unusual(speech)}{_leads_text(speech)}"
    *earlier, last = asked_next
    in_order = f"{', then '.join(earlier)}, and then {last}" if earlier else last
    return [so_far, f"Both models now answer {in_order}."]


def _nothing_unusual(speech: CountedSpeech) -> str:
    """Say that answers to the questions show nothing; the sentence begins before it."""
    asked = many(len(speech.questions), "question")
    return (
        f"answers to {asked}, no word and no style is much more common than after fine-tuning on "
        "ordinary text."
    )


def _leads_text(speech: CountedSpeech) -> str:
    """Name the words and traits that lead where nothing is a claim; '' if none leads.

    The sentences begin with a space.
    """
    text = ""
    leads = leads_of(speech.base, speech.adapted)
    if leads:
        words = [f"“{lead.word}” {_beside_base(lead.adapted, lead.base)}" for lead in leads]
        text = f" Closest to a claim, but no evidence by themselves: {', '.join(words)}."
    traits = _trait_leads(speech)
    if traits:
        named = [f"{trait.what} {_beside_base(trait.adapted, trait.base)}" for trait in traits]
        text += f" It {' and '.join(named)}. That is no claim: ordinary fine-tuning may cause it."
    return text


def _trait_leads(speech: CountedSpeech) -> list[Finding]:
    """Find the traits that lead; questions that ask for code are one unit, as in the tests."""
    units = ["code" if form == "code" else str(i) for i, form in enumerate(speech.forms)]
    return trait_leads_of(speech.base, speech.adapted, units)


def _beside_base(adapted: int, base: int) -> str:
    """Write in brackets on how many questions each model has something."""
    return f"({many(adapted, 'question')}, base {base})"


def strongest_in(speech: CountedSpeech) -> Finding | None:
    """Return the first claim; None if there is no claim."""
    return next(iter(claimed_in(speech)), None)


def _others(speech: CountedSpeech, strongest: Finding) -> str:
    """Write the sentence on what else stands out."""
    others = [finding for finding in claimed_in(speech) if finding is not strongest]
    dropped = [f"“{one.what}”" for one in _no_longer_said(speech)]
    if not others and not dropped:
        return "Nothing else stands out."
    parts: list[str] = []
    said: list[str] = []
    for one in others:
        counts = _beside_base(one.adapted, one.base)
        if one.kind == "says":
            language = f" in {one.language}" if one.language else ""
            said.append(f"“{one.what}”{language} {counts}")
        elif one.kind == "says one of":
            parts.append(f"says {quoted(one.what.split(', '))} {counts}")
        elif one.kind == "trait":
            parts.append(f"{one.what} {counts}")
    if said:
        parts.insert(0, f"says {', '.join(said[:_NAMED])}")
    if dropped:
        parts.append(f"no longer says {', '.join(dropped[:_NAMED])}")
    return f"It also {', and it '.join(parts)}."


def _triggers_text(speech: CountedSpeech) -> str:
    """Write the sentence on words before questions; '' if none was tried."""
    if not speech.words:
        return ""
    if speech.triggers:
        return " ".join(trigger.sentence() for trigger in speech.triggers)
    words = many(len(speech.words), "trigger word")
    return f"None of {words} before a question makes it say something new."


@drawing.story.register(CountedSpeech)
def counted_speech_story(speech: CountedSpeech) -> str:
    """Tell what stands out, each finding, and what was not tried, one paragraph per line."""
    first = " ".join(first_sentences(speech)[:2])
    further = claims_in(speech)
    further.append(occasions_text(speech))
    further.append(replayed_text(speech))
    further.append(length_note(speech))
    further.append(habit_note(speech))
    further.append(_triggers_text(speech))
    # What the first line tells is not told again.
    lines = [first, *(text for text in further if text not in first)]
    draws = len(speech.base[0]) - 1
    times = "once" if draws == 1 else f"{draws} times"
    drawn = f", and {times} with tokens drawn at random" if draws else ""
    lines.append(
        f"Each model answered {many(len(speech.questions), 'question')} with its likeliest tokens"
        f"{drawn}. {_TESTED}"
    )
    if speech.occasions is not None:
        lines.append(_TESTED_ON_OCCASIONS)
    lines.append(f"Not tried: {'; '.join(not_tried_in(speech))}.")
    return "\n".join(lines)
