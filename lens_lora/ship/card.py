"""A card of an adapter: lines that anybody can repeat, each with the command that repeats it.

A card says which files the adapter is, which base it is for, what it changes, and what was
verified. It is compared with one that is made anew, line by line:

1. A line holds if its words are the same and its numbers are close: integers and hashes exactly,
   other numbers within 5 %, or one unit of the last decimal place of the longer one if both have
   decimals.
2. A line that could not be repeated, as the base or a file is not at hand, is undecided.
3. Any other line fails, with both texts.

`card_readme` writes a card into a README.md, and `card_lines` makes its lines.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, get_args

from lens_lora.errors import ModelStateError
from lens_lora.ship.checks import Check, Outcome

SCHEMA = "lens_lora card 1"
# What a check of a card's line is called, before the name of the line.
CARD = "card"

Part = Literal["files", "base", "changes", "verified"]

# A number that stands alone, and is not part of a word, a hash or a version.
_NUMBER = re.compile(r"(?<![\w.])[+\-−]?\d+(?:\.\d+)?(?:e[+\-]?\d+)?(?![\w]|\.\d)")
# Two numbers are close if they differ by at most this part of the larger one.
_CLOSE = Decimal("0.05")
_UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class CardLine:
    """One statement of a card.

    Attributes:
        name: what it is about, once in a card.
        says: the statement.
        command: repeats it, in the adapter's folder; '' if no command does.
        part: the part of the card in which it stands.
    """

    name: str
    says: str
    command: str
    part: Part


@dataclasses.dataclass(frozen=True)
class Card:
    """The statements on an adapter, and all that it takes to repeat them.

    Attributes:
        adapter: its name.
        lines: the lines in order, each with a name of its own.
        inputs: what was given beside the adapter, by option: paths from the adapter's folder
            ('merged', 'lora', 'expect'), a number ('max_kl'), the name of a base ('model'), a
            claim's 'context' and 'says'.
        metadata: the fields by which the Hub knows the adapter.
        made_with: versions of the software, which are not compared.
    """

    adapter: str
    lines: tuple[CardLine, ...]
    inputs: Mapping[str, str]
    metadata: Mapping[str, str]
    made_with: Mapping[str, str]

    def to_json(self, *, indent: int | None = 1, ascii_only: bool = False) -> str:
        """The fields as JSON of `SCHEMA`.

        Args:
            indent: None for one line.
            ascii_only: write other characters as their numbers.
        """
        fields = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(fields, ensure_ascii=ascii_only, indent=indent)

    @classmethod
    def from_json(cls, text: str, place: str) -> Card:
        """A card as `to_json` writes it.

        Args:
            text: JSON.
            place: where it is from, for the error.

        Raises:
            ModelStateError: the text is no such card.
        """
        try:
            fields = json.loads(text)
            if fields.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            _require_text(fields)
            lines = tuple(CardLine(**line) for line in fields.pop("lines"))
            card = cls(lines=lines, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            fact = f"{place}: no card of the schema {SCHEMA!r} ({error})"
            raise ModelStateError(fact, remedy="Write it anew with lens-lora card.") from error
        return card


def _require_text(fields: dict[str, Any]) -> None:
    """Raise ValueError unless each field of a card, as JSON holds it, is text of its kind."""
    texts: list[Any] = [fields["adapter"]]
    for line in fields["lines"]:
        if line["part"] not in get_args(Part):
            raise ValueError(f"{line['part']!r} is no part of a card")
        texts += line.values()
    for name in ("inputs", "metadata", "made_with"):
        texts += fields[name].values()
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a field that is no text")
    names = [line["name"] for line in fields["lines"]]
    if len(set(names)) < len(names):
        raise ValueError("two lines of one name")


# --- Whether a card holds


def card_checks(card: Card, today: Card, missing: Mapping[str, str]) -> list[Check]:
    """One check for each line of a card: does it hold today?

    Args:
        card: as it was written.
        today: made anew, with the same inputs.
        missing: why a line cannot be repeated today, by the line's name.
    """
    lines_today = {line.name: line for line in today.lines}
    checks: list[Check] = []
    for line in card.lines:
        name = f"{CARD}, {line.name}"
        again = lines_today.get(line.name)
        if line.name in missing:
            checks.append(Check(name, "undecided", missing[line.name], line.says))
        elif again is None:
            checks.append(Check(name, "failed", "nothing of the kind is found today", line.says))
        else:
            checks.append(_line_check(name, line, again))
    known = {line.name for line in card.lines}
    for line in today.lines:
        if line.name not in known:
            found = f"the card has no such line; today: {line.says}"
            checks.append(Check(f"{CARD}, {line.name}", "failed", found))
    return checks


def _line_check(name: str, line: CardLine, again: CardLine) -> Check:
    if line.command != again.command:
        found = f"its command is now {again.command!r}"
        return Check(name, "failed", found, f"the card's {line.command!r}")
    outcome: Outcome = "passed"
    if not says_the_same(line.says, again.says):
        was_decided = not line.says.startswith(_UNDECIDED)
        is_open = was_decided and again.says.startswith(_UNDECIDED)
        outcome = "undecided" if is_open else "failed"
    return Check(name, outcome, again.says, line.says)


def says_the_same(text: str, other: str) -> bool:
    """Whether two statements have the same words, and numbers that are close."""
    if _NUMBER.sub("", text) != _NUMBER.sub("", other):
        return False
    ours = _NUMBER.findall(text)
    theirs = _NUMBER.findall(other)
    return all(_is_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _is_close(text: str, other: str) -> bool:
    if text == other:
        return True
    if text.isdigit() and other.isdigit():
        return False
    a = Decimal(text.replace("−", "-"))
    b = Decimal(other.replace("−", "-"))
    # The finer of the two, which is 0 for a whole number: then the 5 % alone decide.
    unit = min(_last_place(a), _last_place(b))
    return abs(a - b) <= max(unit, _CLOSE * max(abs(a), abs(b)))


def _last_place(number: Decimal) -> Decimal:
    """One unit of the last decimal place that is written: 0.01 of 1.25; 0 of a whole number."""
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)  # the pattern matches no NaN and no infinity
    return Decimal(1).scaleb(exponent) if exponent < 0 else Decimal(0)
