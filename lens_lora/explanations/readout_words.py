"""An explained readout in plain words, of one prompt or of several.

The sentences on first order, trust and limits are those of a margin (`words.py`, `views/words.py`).
What is said of two answers has no place here: nothing is preferred, and nothing flips.
"""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.errors import many
from lens_lora.explanations.explanation import ReadoutExplanation
from lens_lora.explanations.words import (
    MODULES_IN_HEADLINE,
    Headline,
    limits,
    readout_numbers,
    where_and_trust,
)
from lens_lora.show import text
from lens_lora.show.text import below_noise, percent, short_prompt, signed
from lens_lora.views.attribution_words import caution_text, top_sites
from lens_lora.views.words import (
    ReadoutNumbers,
    conclusion_text,
    joined,
    largest_text,
    predicted_text,
)

# How many prompts a story names one by one.
_MOST_PROMPTS = 20
_REACH = (
    "All this is of this readout alone; it says how much the modules move it, not by what "
    "mechanism, and not what the model will say."
)


@drawing.story.register(ReadoutExplanation)
def readout_story(e: ReadoutExplanation) -> str:
    """One paragraph per line; for several prompts the mean, and then each with its headline."""
    count = len(e.prompts)
    if count == 1:
        return _one_story(e)
    lines = [" ".join(mean_texts(e))]
    for index in range(min(count, _MOST_PROMPTS)):
        sentences = " ".join(readout_headline(e.of_prompt(index)).sentences)
        lines.append(f"{index + 1}. “{short_prompt(e.prompts[index])}”: {sentences}")
    if count > _MOST_PROMPTS:
        lines.append(f"… and {many(count - _MOST_PROMPTS, 'more prompt')}")
    return "\n".join(lines)


def _one_story(e: ReadoutExplanation) -> str:
    """The paragraphs: what happened, first order, what it leaves, where, trust, limits."""
    numbers = readout_numbers(e)
    predicted = f"a value of {signed(numbers.m0 + numbers.first_order)}"
    paragraphs = [
        moved_text(e.readout, numbers, f"On the prompt “{numbers.prompt}” the"),
        predicted_text(numbers, predicted),
        *where_and_trust(e, numbers),
        limits(e, f"{_REACH} It is of one prompt."),
        text.reading_text(e.first_order.meta),
    ]
    return "\n".join(filter(None, paragraphs))


def moved_text(readout: str, numbers: ReadoutNumbers, begin: str = "The") -> str:
    """How far the adapter moves the readout, from which value to which.

    Args:
        readout: its label.
        numbers: its values on the prompt.
        begin: how the sentence begins, before 'adapter'.
    """
    moved = f"{begin} adapter moves {readout} by {signed(numbers.shift)} {numbers.units}"
    if not numbers.has_shift:
        return (
            f"{moved}, {below_noise(numbers.floor)}: that cannot be told from rounding, so this "
            "run shows no effect of the adapter."
        )
    return f"{moved}, from {signed(numbers.m0)} in the base model to {signed(numbers.m)}."


def mean_texts(e: ReadoutExplanation) -> list[str]:
    """The sentences on what the adapter does in the mean over prompts, and by which modules."""
    first = e.first_order
    base = float(e.base.double().mean())
    adapted = float(e.adapted.double().mean())
    shift = float(e.shift.double().mean())
    total = float(first.total.double().mean())
    sentences = [
        f"In the mean over {many(len(e.prompts), 'prompt')} the adapter moves {e.readout} by "
        f"{signed(shift)} {e.units}, from {signed(base)} in the base model to {signed(adapted)}.",
        f"The modules' first-order parts sum to {signed(total)}.",
    ]
    tops = top_sites(first, MODULES_IN_HEADLINE)
    largest = ", ".join(f"{top.site} {top.value}" for top in tops)
    sentences.append(f"The largest of {many(len(first.sites), 'module')} are {largest}.")
    return sentences


def readout_headline(e: ReadoutExplanation) -> Headline:
    """Three sentences of one prompt's story and four numbers, for a reader in a hurry."""
    numbers = readout_numbers(e)
    where = largest_text(e.first_order, numbers, MODULES_IN_HEADLINE)
    sentences = [
        moved_text(e.readout, numbers),
        conclusion_text(numbers),
        joined(where, caution_text(e.first_order)),
    ]
    left = percent(numbers.verdict.share) if numbers.has_shift else "noise"
    numbers = (
        (signed(numbers.m0), f"{numbers.units}, {e.readout} in the base model"),
        (signed(numbers.m), f"{numbers.units}, with the adapter"),
        (numbers.share(numbers.first_order), "of the shift is in the first-order parts"),
        (left, "of the shift is missed by first order at ε = 1"),
    )
    return Headline(sentences, numbers)
