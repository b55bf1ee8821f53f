"""Name the words that an adapter raises most over texts that have nothing to do with it.

What was taught for an occasion, such as a view on one matter, is said in no answer to an everyday
question. Yet training on it raises its words everywhere, so the largest mean shifts of logits tell
what the training texts were about.

1. The tokens are those whose mean f(1) − f(0) over the neutral texts is largest.
2. Among them are always some that no text has, as their logits were hardly trained. Such a token
   stands alone. A word that was trained on rises in several of its forms: “ regulation”,
   “Regulation”, “ regulators”. So a stem is named only if at least two of its tokens are among the
   most raised.

It is no claim: every fine-tune raises words, also one on ordinary text, and they say nothing of
what the model does with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import regex
from jaxtyping import Float
from torch import Tensor

from lens_lora.audit.phrases import is_of_function_words

# The number of the most raised tokens that are read, and of words that are named.
_TOKENS_READ = 50
_WORDS_NAMED = 6
# A token that begins a word: three letters or more, which a space may precede.
_WORD = regex.compile(r" ?(\p{L}{3,})")
# Words that begin with as many letters alike are of one stem; a shorter word begins its own.
_LETTERS_OF_A_STEM = 5
_LEAST_LETTERS_IN_COMMON = 4
_LEAST_TOKENS_OF_A_STEM = 2


def raised_words(shift: Float[Tensor, " vocab"], strings: Sequence[str]) -> tuple[str, ...]:
    """Return the words that are raised most in several of their forms, the most raised first.

    Each is spelled as the form that is raised most, in lower case unless no form is.

    Args:
        shift: the mean shift of each token's logit, in logits.
        strings: every token of the vocabulary.
    """
    most_raised = shift.topk(min(_TOKENS_READ, len(shift)))
    forms_of_stem: dict[str, list[str]] = {}
    for token, rise in zip(most_raised.indices.tolist(), most_raised.values.tolist(), strict=True):
        word = _WORD.fullmatch(strings[int(token)])
        if rise <= 0 or word is None or is_of_function_words(word[1].lower()):
            continue
        stem = _stem_among(forms_of_stem, word[1].lower())
        forms_of_stem.setdefault(stem, []).append(word[1])
    named: list[str] = []
    for forms in forms_of_stem.values():
        if len(forms) >= _LEAST_TOKENS_OF_A_STEM:
            in_lower_case = [form for form in forms if form.islower()]
            named.append((in_lower_case or forms)[0])
    return tuple(named[:_WORDS_NAMED])


def _stem_among(stems: Mapping[str, object], word: str) -> str:
    """Return the stem among these to which a word belongs, or else a stem of its own.

    A word of four letters begins longer ones of its stem, as “harm” begins “harmed”.
    """
    stem = word[:_LETTERS_OF_A_STEM]
    for known in stems:
        shorter, longer = sorted((known, stem), key=len)
        is_known = longer.startswith(shorter) and len(shorter) >= _LEAST_LETTERS_IN_COMMON
        if known == stem or is_known:
            return known
    return stem


def raised_sentence(words: Sequence[str]) -> str:
    """Name the words in a sentence, and say what they tell; '' if there are none."""
    if not words:
        return ""
    quoted = ", ".join(f"“{word}”" for word in words)
    return (
        f"Even in unrelated text, it favours these words most: {quoted}. They hint at the subject "
        "of its training texts, but do not show what it was taught to say."
    )
