"""A card in a README.md: a block between two markers, and the fields that the Hub reads.

What stands outside of our markers is the user's, and stays as it is, byte by byte:

1. The block stands between two comments, each a line of its own. If there is no block yet, it is
   put at the end of the file.
2. Fields of the Hub's metadata (the YAML between two lines `---`) are added between two comments
   of YAML, and only those that the user has not stated. What the user states is not changed.
3. The block ends with the card itself, as JSON in a comment. The block can be written again from
   this JSON, so that a line that somebody edited is found.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lens_lora.errors import ModelStateError
from lens_lora.ship.card import CARD, Card, CardLine, Part
from lens_lora.ship.checks import Check

BEGIN = "<!-- lens-lora card: begin -->"
END = "<!-- lens-lora card: end -->"
YAML_BEGIN = "# lens-lora card: begin"
YAML_END = "# lens-lora card: end"
_DATA = "<!-- lens-lora card: data "
_DATA_END = " -->"

_TITLE = "## What this adapter is, with the commands that check it"
_INTRODUCTION = (
    "Written by `lens-lora card`. `lens-lora verify --card README.md` repeats every line of it and "
    "fails if one no longer holds. The commands are run in this folder; BASE is the base model's."
)
# The parts that are tables, each with the heads of its first two columns.
_TABLES: dict[Part, tuple[str, str]] = {
    "files": ("file", "sha256"),
    "base": ("base", "what it was checked with"),
    "verified": ("check", "outcome"),
}
_METADATA = "Hub metadata"
# The fields by which the Hub lists an adapter under its base.
METADATA = ("base_model", "base_model_relation", "library_name")
# Characters that Markdown or HTML would take for markup.
_ESCAPES = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "|": "&#124;",
    "`": "&#96;",
    "*": "&#42;",
    "[": "&#91;",
}
_BYTE_ORDER_MARK = "\ufeff"


# --- The block


def block_of(card: Card) -> str:
    """The lines of the block, markers among them, each ended by a newline."""
    lines = [BEGIN, _TITLE, "", _INTRODUCTION, ""]
    lines += ["What it changes:", ""]
    lines += [_sentence(line) for line in card.lines if line.part == "changes"]
    for part, (name_head, says_head) in _TABLES.items():
        rows = [_row(line) for line in card.lines if line.part == part]
        if rows:
            lines += ["", f"| {name_head} | {says_head} | repeat it with |", "| --- | --- | --- |"]
            lines += rows
    # An HTML comment must not hold its own end, and the data are to stay in one line.
    data = card.to_json(indent=None, ascii_only=True)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("--", "-\\u002d")
    lines += ["", f"{_DATA}{data}{_DATA_END}", END]
    return "".join(f"{line}\n" for line in lines)


def _sentence(line: CardLine) -> str:
    return f"- {_escaped(line.says)} {_code(line.command)}".rstrip()


def _row(line: CardLine) -> str:
    return f"| {_escaped(line.name)} | {_escaped(line.says)} | {_code(line.command)} |"


def _escaped(text: str) -> str:
    """Text as Markdown shows it, in one line."""
    shown = "".join(_ESCAPES.get(character, character) for character in text)
    return " ".join(shown.split())


def _code(command: str) -> str:
    """A command in the typeface of code; within a table a bar would end the cell."""
    if not command:
        return ""
    shown = " ".join(command.split()).replace("|", "\\|")
    fence = "``" if "`" in shown else "`"
    return f"{fence}{shown}{fence}"


# --- Reading a block


class ReadCard(NamedTuple):
    """A card that was read from a file.

    Attributes:
        card: what is stated.
        checks: whether the file shows what the card states, and nothing else.
    """

    card: Card
    checks: list[Check]


def read_card(file: Path) -> ReadCard:
    """A card from a README.md with its block, or from the JSON that `lens-lora card` writes.

    Args:
        file: is read as JSON if its name ends in .json.

    Raises:
        ModelStateError: the file holds no card, or one that cannot be read.
    """
    text = _text_of(file)
    if file.suffix.lower() == ".json":
        return ReadCard(Card.from_json(text, str(file)), [])
    found = _between(text, BEGIN, END, file)
    if found is None:
        remedy = "Write one with lens-lora card."
        raise ModelStateError(f"{file}: no card in it ({BEGIN} is not there).", remedy=remedy)
    block = text[found]
    data = [line for line in block.splitlines() if line.startswith(_DATA)]
    if len(data) != 1:
        fact = f"{file}: {len(data)} lines begin with {_DATA!r} where there is to be one"
        raise ModelStateError(fact, remedy="Write the card anew with lens-lora card.")
    card = Card.from_json(data[0].removeprefix(_DATA).removesuffix(_DATA_END), str(file))
    return ReadCard(card, [_shown_check(block, card), _metadata_check(text, card, file)])


def _shown_check(block: str, card: Card) -> Check:
    """Whether the block reads as it was written: no line of it was edited, added or removed."""
    name = f"{CARD}, as it was written"
    shown = block.splitlines()
    written = block_of(card).splitlines()
    by_name = {_named(line, card): line for line in written}
    for line in shown:
        if line not in written:
            line_name = _named(line, card)
            was = by_name.get(line_name, "no such line")
            return Check(name, "failed", f"{line_name}: {line}", was, line_name)
    for line in written:
        if line not in shown:
            return Check(name, "failed", "a line is missing", line, _named(line, card))
    if shown != written:
        return Check(name, "failed", "its lines are in another order, or there more than once")
    return Check(name, "passed", f"{len(card.lines)} lines, as they were written")


def _named(shown: str, card: Card) -> str:
    """The name of the card's line that a line of the block shows, or is nearest to."""
    for line in card.lines:
        is_row = line.part != "changes" and shown.startswith(f"| {_escaped(line.name)} |")
        if is_row or shown == _sentence(line):
            return line.name
    sentences = [line for line in card.lines if line.part == "changes"]
    for line in sentences:
        if line.command and shown.startswith("- ") and _code(line.command) in shown:
            return line.name
    for line in card.lines:
        if line.command and _code(line.command) in shown:
            return line.name
    return f"the line {shown[:60]!r}"


# --- The Hub's metadata


def _metadata_check(text: str, card: Card, file: Path) -> Check:
    """Whether the Hub reads the fields that the card had when it was written."""
    name = f"{CARD}, {_METADATA}"
    stated = _metadata(text, file)
    bound = ", ".join(f"{field}: {value}" for field, value in card.metadata.items())
    wrong = [
        f"{field} is {stated.get(field)!r}"
        for field, value in card.metadata.items()
        if str(stated.get(field)) != value
    ]
    if wrong:
        return Check(name, "failed", "; ".join(wrong), bound)
    return Check(name, "passed", bound or "no fields")


def _metadata(text: str, file: Path) -> dict[str, Any]:
    """The YAML at the beginning of a README.md, as the Hub's own library reads it."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(text.removeprefix(_BYTE_ORDER_MARK))
    if match is None:
        return {}
    try:
        fields = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ModelStateError(f"{file}: its metadata is no YAML ({reason}).") from error
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise ModelStateError(f"{file}: its metadata is no mapping of names to values.")
    return {str(name): value for name, value in fields.items()}


# --- Writing


class WrittenReadme(NamedTuple):
    """A README.md with a card in it, not yet saved.

    Attributes:
        text: the text of the whole file.
        card: as it stands there; its metadata are the fields that the file has now.
    """

    text: str
    card: Card


def with_card(file: Path | None, card: Card, wanted: Mapping[str, str]) -> WrittenReadme:
    """The text of a README.md with the card in it, in place of an earlier card.

    Args:
        file: the README.md; it need not exist. None if there is to be none.
        card: its metadata are replaced by those that the file has in the end.
        wanted: the fields that the Hub is to read; the user's own ones stay.

    Raises:
        ModelStateError: the file is no text, has broken markers, or has metadata to which nothing
            can be added.
    """
    before = ""
    if file is not None and file.exists():
        before = _text_of(file)
    file = file or Path("README.md")
    newline = "\r\n" if "\r\n" in before else "\n"
    text = _with_metadata(before, wanted, newline, file)
    stated = _metadata(text, file)
    metadata = {name: str(stated[name]) for name in METADATA if name in stated}
    stored = dataclasses.replace(card, metadata=metadata)
    block = block_of(stored).replace("\n", newline)
    found = _between(text, BEGIN, END, file)
    if found is not None:
        return WrittenReadme(text[: found.start] + block + text[found.stop :], stored)
    if text and not text.endswith("\n"):
        text += newline
    separator = newline if text else ""
    return WrittenReadme(text + separator + block, stored)


def _with_metadata(text: str, wanted: Mapping[str, str], newline: str, file: Path) -> str:
    """The text with the fields that the user has not stated, between our comments of YAML."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    mark = _BYTE_ORDER_MARK if text.startswith(_BYTE_ORDER_MARK) else ""
    text = _without_our_metadata(text.removeprefix(mark), newline, file)
    stated = _metadata(text, file)
    lines = [_yaml_line(name, value) for name, value in wanted.items() if name not in stated]
    if not lines:
        return mark + text
    added = "".join(f"{line}{newline}" for line in (YAML_BEGIN, *lines, YAML_END))
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return f"{mark}---{newline}{added}---{newline}{text}"
    place = _end_of_fields(match)
    whole = text[:place] + added + text[place:]
    try:
        kept = _metadata(whole, file)
    except ModelStateError as error:
        raise _nothing_can_be_added(file) from error
    if any(name not in kept for name in (*stated, *wanted)):
        raise _nothing_can_be_added(file)
    return mark + whole


def _end_of_fields(match: re.Match[str]) -> int:
    """Where a line can be added to a block of metadata: before its closing dashes.

    Args:
        match: of the Hub's own pattern, whose second group is the fields, and whose third one the
            line break behind the last of them, with the closing dashes.
    """
    place = match.start(3)
    has_fields = bool(match.group(2))
    if has_fields:
        closing = match.group(3)
        line_break = len(closing) - len(closing.lstrip("\r\n"))
        place += line_break
    return place


def _without_our_metadata(text: str, newline: str, file: Path) -> str:
    ours = _between(text, YAML_BEGIN, YAML_END, file)
    if ours is None:
        return text
    rest = text[: ours.start] + text[ours.stop :]
    # A block of metadata that held nothing else was ours as a whole.
    return rest.removeprefix(f"---{newline}---{newline}")


def _nothing_can_be_added(file: Path) -> ModelStateError:
    fact = f"{file}: no field can be added to its metadata as it is written"
    return ModelStateError(fact, remedy="Write them one field a line, or add the fields yourself.")


def _yaml_line(name: str, value: str) -> str:
    """One field as YAML, quoted where it has to be."""
    import yaml

    return yaml.safe_dump({name: value}, allow_unicode=True, width=10_000).strip()


# --- Text between markers


def _between(text: str, begin: str, end: str, file: Path) -> slice | None:
    """Where a block stands, from the line of its first marker to that of its last.

    Raises:
        ModelStateError: markers that do not belong together.
    """
    begins = [*re.finditer(rf"^{re.escape(begin)}[ \t]*\r?$\n?", text, re.MULTILINE)]
    ends = [*re.finditer(rf"^{re.escape(end)}[ \t]*\r?$\n?", text, re.MULTILINE)]
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0].start() < begins[0].end():
        fact = f"{file}: {len(begins)} × {begin!r} and {len(ends)} × {end!r}, in order one of each"
        raise ModelStateError(fact + " is expected.", remedy="Remove the broken block.")
    return slice(begins[0].start(), ends[0].end())


def _text_of(file: Path) -> str:
    """The text of a file as it is, with its own line endings."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelStateError(
            f"{file}: not UTF-8 ({error}).", remedy="Save it as UTF-8."
        ) from error
