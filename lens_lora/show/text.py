"""How numbers, tokens and prompts are written, the same in every picture, table and page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from markupsafe import escape

from lens_lora.core import SIGMAS, PromptTokens

_WHITESPACE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
# The largest number of characters of a quoted text, by where it stands.
_BESIDE_A_PICTURE = 18
_IN_A_HEADING = 80
_ANSWER_IN_A_SENTENCE = 120
_IN_A_PARAGRAPH = 240
_SPECIAL_TOKEN = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")


def magnitude(value: float) -> str:
    """A size without its sign: two decimals, or two significant digits of a small one."""
    if not math.isfinite(value):
        return "—"
    size = abs(value)
    if size == 0 or size >= 0.0995:
        return f"{size:.2f}"
    return f"{size:.2g}"


def signed(value: float) -> str:
    """A number with its sign, + or −."""
    if not math.isfinite(value) or value == 0:
        return magnitude(value)
    sign = "−" if value < 0 else "+"
    return sign + magnitude(value)


def log_p_text(value: float) -> str:
    """A log-probability: two decimals, and a minus sign."""
    return f"{value:.2f}".replace("-", "−")


def first_of(names: Sequence[str], k: int) -> str:
    """'a, b, …': the first k of them."""
    more = ["…"] if len(names) > k else []
    return ", ".join([*names[:k], *more])


def layers_text(layers: Sequence[int]) -> str:
    """Layers in one line, with runs of three or more as ranges: 'layers 20, 24 and 26–29'."""
    distinct = sorted(set(layers))
    runs: list[list[int]] = []
    for layer in distinct:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    shown: list[str] = []
    for run in runs:
        if len(run) < 3:
            shown += [str(layer) for layer in run]
        else:
            shown.append(f"{run[0]}–{run[-1]}")
    if len(distinct) == 1:
        return f"layer {shown[0]}"
    *others, last = shown
    return f"layers {', '.join(others)} and {last}" if others else f"layers {last}"


def percent(share: float) -> str:
    """A share as a percentage; '—' where it is not finite, as of a shift of zero."""
    if not math.isfinite(share):
        return "—"
    size = 100 * abs(share)
    if size >= 10:
        digits = f"{size:.0f}"
    elif size >= 0.1:
        digits = f"{size:.1f}"
    else:
        digits = f"{size:.1g}"
    sign = "−" if share < 0 else ""
    return f"{sign}{digits}%"


def points(change: float) -> str:
    """A change of a probability: '+12 points', in percentage points."""
    if not math.isfinite(change):
        return "—"
    sign = "−" if change < 0 else "+"
    number = percent(abs(change)).removesuffix("%")
    return f"{sign}{number} points"


def position_text(position: int | str) -> str:
    """A position in words, such as 'position 3', or the positions that a mean is taken over.

    A minus sign stands before a position that is counted from the end.
    """
    if position in ("prompt", "response"):
        return f"mean over the {position}"
    if position == "all":
        return "mean over all tokens but the first"
    is_single = str(position).removeprefix("-").isdigit()
    words = f"position {position}" if is_single else f"mean over positions {position}"
    return words.replace("-", "−")


def share_text(share: float) -> str:
    """A share of the shift in words: '43% of the shift', '12 times the shift'."""
    if abs(share) < 2:
        return f"{percent(share)} of the shift"
    return f"{share:.3g} times the shift"


def visible(token: str) -> str:
    """A token with its white space and control characters made visible."""
    shown = "".join(_visible_character(character) for character in token)
    return shown or "∅"


def _visible_character(character: str) -> str:
    if character in _WHITESPACE:
        return _WHITESPACE[character]
    return character if character.isprintable() else ascii(character)[1:-1]


def readable(text: str) -> str:
    """Text with control characters made visible, such as those that reverse its direction."""
    return "".join(_readable_character(character) for character in text)


def _readable_character(character: str) -> str:
    return character if character.isprintable() else visible(character)


def label(text: str) -> str:
    """Text escaped for plotly, which would read tags, `$…$` as TeX and `%{…}` as a variable."""
    return str(escape(text)).replace("$", "&#36;").replace("%{", "&#37;{")


def prompt_text(tokens: Sequence[str]) -> str:
    """A prompt as one line, without the special token that a tokenizer puts in front.

    An answer that follows the prompt in the same row is left out. Of a conversation this is the
    user's last message, without the template.
    """
    prompt = PromptTokens.of(tokens)
    if prompt.said is not None:
        return readable(prompt.said)
    asked = prompt.asked
    shown = asked[1:] if len(asked) > 1 and _SPECIAL_TOKEN.fullmatch(asked[0]) else asked
    return readable("".join(shown))


def short_prompt(tokens: Sequence[str]) -> str:
    """The end of a prompt, or of a user's message, as one line for a heading."""
    prompt = PromptTokens.of(tokens)
    said = prompt.said
    if said is None:
        plain = [" " if _is_special(token) else token for token in prompt.asked]
        said = "".join(plain)
    printable = [character if character.isprintable() else " " for character in said]
    one_line = " ".join("".join(printable).split())
    return _end_of(one_line, _IN_A_HEADING, "… ")


def _is_special(token: str) -> bool:
    """Whether a token looks like a special one: '<s>', '[CLS]'."""
    return _SPECIAL_TOKEN.fullmatch(token) is not None


def context_of(tokens: Sequence[str], at: int, width: int) -> str:
    """The token at this position in ⟦ ⟧, with `width` tokens on either side.

    Args:
        tokens: the tokens of a text.
        at: the position.
        width: how many tokens are shown on either side.
    """
    before = "".join(tokens[max(at - width, 0) : at])
    after = "".join(tokens[at + 1 : at + 1 + width])
    return f"{before}⟦{tokens[at]}⟧{after}"


def context_text(tokens: Sequence[str], at: int, width: int = 8) -> str:
    """A token in ⟦ ⟧ among its neighbours, without special tokens.

    In a conversation the neighbours are mostly the template's, so the user's message is quoted in
    their place.
    """
    said = PromptTokens.of(tokens).said
    if said is not None:
        message = _end_of(said, _IN_A_HEADING)
        return readable(f"to “{message}”: {context_of(tokens, at, 1)}")
    plain = ["" if _is_special(token) else token for token in tokens]
    plain[at] = tokens[at]
    return readable(context_of(plain, at, width).strip())


def numbered(prompts: Sequence[Sequence[str]]) -> list[str]:
    """A number and the end of each prompt, short enough to stand beside a picture."""
    labels: list[str] = []
    for number, prompt in enumerate(prompts, start=1):
        end = _end_of(short_prompt(prompt), _BESIDE_A_PICTURE)
        labels.append(label(f"{number}. {end}"))
    return labels


def _end_of(text: str, width: int, cut: str = "…") -> str:
    """A text, or its last words where it is longer."""
    if len(text) <= width:
        return text
    end = text[-width:]
    _, _, whole_words = end.partition(" ")
    return f"{cut}{whole_words or end}"


def cut_in_the_middle(text: str, width: int) -> str:
    """The text, or its beginning and its end around '…'."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def beginning_of(text: str, width: int) -> str:
    """A text, or its first words where it is longer."""
    if len(text) <= width:
        return text
    beginning = text[:width]
    whole_words, _, _ = beginning.rpartition(" ")
    return f"{whole_words or beginning} …"


@runtime_checkable
class Answered(Protocol):
    """A prompt, and what both models answer to it."""

    @property
    def prompt(self) -> str:
        """The prompt, as text."""
        ...

    @property
    def base(self) -> str:
        """The base model's answer."""
        ...

    @property
    def adapted(self) -> str:
        """The adapted model's answer."""
        ...


def answers_text(pair: Answered) -> str:
    """Both models' answers as the end of a sentence that begins with 'Asked …, '.

    A long answer is quoted from its beginning.
    """
    base = _quoted_answer(pair.base)
    adapted = _quoted_answer(pair.adapted)
    if pair.base == pair.adapted:
        return f"both models answer {base}."
    return f"the base model answers {base}, and with the adapter {adapted}."


def _quoted_answer(answer: str) -> str:
    one_line = " ".join(answer.split())
    return f"“{beginning_of(one_line, _ANSWER_IN_A_SENTENCE)}”"


def reading_text(meta: Mapping[str, str]) -> str:
    """How the prompts became token ids, as a sentence; '' where a result does not say."""
    said = meta.get("prompts")
    return f"Prompts were read as {said}." if said else ""


def shortened(text: str) -> str:
    """The text; a long one is cut between words to its beginning and its end."""
    if len(text) <= _IN_A_PARAGRAPH:
        return text
    begin = text[: _IN_A_PARAGRAPH // 2]
    end = text[-_IN_A_PARAGRAPH // 2 :]
    first_words, _, _ = begin.rpartition(" ")
    _, _, last_words = end.partition(" ")
    return f"{first_words or begin} … {last_words or end}"


# How the keys of attributions and effects (`key_of`) are written; another key is written as it is.
_KEYS = {
    "path": "path integral",
    "add_one": "adding one at a time",
    "leave_one_out": "leaving one out at a time",
    "weight_norm": "‖ΔW‖",
    "update_norm": "‖δz‖",
    "signed_weight_norm": "sign(a) · ‖ΔW‖",
    "norm_product": "‖δz‖ · ‖Jᵀu‖",
    "signed_random": "random, with the sign of a",
}
_REPLACED = {"mean": ", replaced by its mean", "resample": ", replaced by another text's"}
_RULES = {"identity": "identity rule", "half": "half rule"}
_GATED = re.compile(r"(first_order|second_order|curvature|edges)(?:/([a-z_+]+))?@(.+)")


def key_text(key: str) -> str:
    """'first order at ε = 0', 'path integral', '‖ΔW‖'; a name that the caller gave as it is."""
    match = _GATED.fullmatch(key)
    if match is None:
        how, _, replace = key.partition("/")
        if how in _KEYS and replace in _REPLACED:
            return _KEYS[how] + _REPLACED[replace]
        return _KEYS.get(key, key)
    method, rules, at = match.groups()
    qualified = f" ({_qualified(rules)})" if rules else ""
    return f"{method.replace('_', ' ')}{qualified} at ε = {at}"


def _qualified(rules: str) -> str:
    """'patterns and norm scales fixed, identity rule', or the question of a second order."""
    if rules in _KEYS:
        return _KEYS[rules]
    names = rules.split("+")
    fixed = [name.replace("_", " ") for name in names if name not in _RULES]
    phrases: list[str] = []
    if fixed:
        phrases.append(f"{' and '.join(fixed)} fixed")
    phrases += [_RULES[name] for name in names if name in _RULES]
    return ", ".join(phrases)


def below_noise(floor: float) -> str:
    """'below 3 noise floors (0.02)'."""
    return f"below {SIGMAS:g} noise floors ({magnitude(floor)})"


def below_text(what: str, value: float, floor: float) -> str:
    """'below the noise: the shift 0.01 is within rounding (0.02)'."""
    return f"below the noise: the {what} {value:.2g} is within rounding ({floor:.2g})"
