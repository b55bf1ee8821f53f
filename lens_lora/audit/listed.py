"""A list of adapters to audit, as a YAML file, each with the strings that its audit should find.

    base: owner/base            # for rows that name none; else the base that the adapter names
    adapters:
      - adapter: owner/repo     # or a local folder
        subfolder: checkpoint-500
        revision: main
        expect: [matey, "aye aye"]
      - tuned: owner/model      # a full fine-tune, instead of an adapter
        control: true           # nothing was taught, so nothing should be claimed

Local folders and files are looked for next to the list first. Torch is not imported here, so that a
list that cannot be read is refused at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lens_lora.errors import LensLoraError

# The keys that a list may set for all rows, and those of one row.
_OF_ALL = ("base", "prompts", "triggers")
_OF_ROW = (
    *("name", "adapter", "tuned", "base", "subfolder", "revision"),
    *("expect", "control", "prompts", "triggers"),
)
_ROWS = "adapters"
# A row's name, which is also the name of its file of results.
_NAME = re.compile(r"[\w][\w.+-]*")

# A string, or the messages of a conversation.
Question = str | Sequence[Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Listed:
    """One row of a list.

    Attributes:
        name: the name of the row, and of its files.
        adapter: the adapter's folder or hub id; None for a full fine-tune.
        tuned: the folder or hub id of a full fine-tune; None for an adapter.
        base: the base model; None for the one that the adapter names.
        subfolder, revision: where the adapter is in its folder or hub repository.
        expect: strings, at least one of which should be in a claim.
        control: whether nothing was taught, so that nothing should be claimed.
        prompts: questions to ask in addition to the package's own, or a file of them.
        triggers: words to try before questions, or a file of them; None if none were named.
    """

    name: str
    adapter: str | None = None
    tuned: str | None = None
    base: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    expect: tuple[str, ...] = ()
    control: bool = False
    prompts: tuple[Question, ...] | Path = ()
    triggers: tuple[str, ...] | Path | None = None

    @property
    def source(self) -> str:
        """The adapter's folder or hub id, or the fine-tuned model's."""
        return self.adapter or str(self.tuned)


def read_list(file: Path) -> list[Listed]:
    """Read the rows of a list.

    Args:
        file: a YAML file.

    Raises:
        LensLoraError: the file is not such a list; the message names the row and the key.
    """
    import yaml

    try:
        given: object = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise LensLoraError(f"{file}: not valid YAML ({reason}).") from error
    if isinstance(given, list):
        given = {_ROWS: given}
    if not isinstance(given, Mapping):
        raise LensLoraError(f"{file}: expected a list of adapters under '{_ROWS}:'.")
    fields = cast("Mapping[object, object]", given)
    _require_known(fields, (*_OF_ALL, _ROWS), str(file))
    rows = fields.get(_ROWS)
    if not isinstance(rows, list) or not rows:
        raise LensLoraError(f"{file}: no row under '{_ROWS}:'; write one for each adapter.")
    of_all = {key: fields[key] for key in _OF_ALL if key in fields}
    listed: list[Listed] = []
    for number, row in enumerate(cast("list[object]", rows), start=1):
        place = f"{file}, row {number}"
        if isinstance(row, str):
            row = {"adapter": row}
        if not isinstance(row, Mapping):
            fact = f"{place}: {row!r} is no row; write 'adapter: …' and its other keys."
            raise LensLoraError(fact)
        listed.append(_row({**of_all, **cast("Mapping[object, object]", row)}, place, file.parent))
    _require_distinct(listed, file)
    return listed


def _require_known(fields: Mapping[object, object], known: Sequence[str], place: str) -> None:
    for key in fields:
        if key not in known:
            raise LensLoraError(f"{place}: unknown key {key!r}; expected {', '.join(known)}.")


def _row(fields: Mapping[object, object], place: str, folder: Path) -> Listed:
    """Read one row.

    Args:
        fields: the row's fields as YAML holds them, together with those set for all rows.
        place: the file and the row, for messages.
        folder: the folder of the list, where folders and files are looked for first.
    """
    _require_known(fields, _OF_ROW, place)
    texts: dict[str, str | None] = {}
    for key in ("name", "adapter", "tuned", "base", "subfolder", "revision"):
        texts[key] = _text(fields, key, place)
    if (texts["adapter"] is None) == (texts["tuned"] is None):
        raise LensLoraError(f"{place}: give it either 'adapter:' or 'tuned:'.")
    if texts["tuned"] is not None and texts["base"] is None:
        raise LensLoraError(f"{place}: 'tuned:' is compared with its base; give 'base:'.")
    for key in ("subfolder", "revision"):
        if texts["tuned"] is not None and texts[key] is not None:
            raise LensLoraError(f"{place}: '{key}:' is for an adapter, and this row is 'tuned:'.")
    control = fields.get("control", False)
    if not isinstance(control, bool):
        raise LensLoraError(f"{place}: control: {control!r} is neither true nor false.")
    expect = _strings(fields, "expect", place)
    if control and expect:
        raise LensLoraError(f"{place}: a control expects nothing; leave 'expect:' out.")
    name = texts["name"] or _usual_name(texts)
    if not _NAME.fullmatch(name):
        raise LensLoraError(
            f"{place}: the name {name!r} cannot be a file's; give it a 'name:' of letters, "
            "digits, '.', '-' and '_'."
        )
    return Listed(
        name=name,
        adapter=_beside(texts["adapter"], folder),
        tuned=_beside(texts["tuned"], folder),
        base=_beside(texts["base"], folder),
        subfolder=texts["subfolder"],
        revision=texts["revision"],
        expect=expect,
        control=control,
        prompts=_file_or(fields, "prompts", place, folder) or _questions(fields, place),
        triggers=_file_or(fields, "triggers", place, folder) or _words(fields, place),
    )


def _text(fields: Mapping[object, object], key: str, place: str) -> str | None:
    """Return the text under a key; None if there is none.

    A number is refused: YAML reads the revision 1e5 as 100000.0, and 010 as 8.
    """
    value = fields.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise LensLoraError(f"{place}: {key}: {value!r} is no text; put it in quotes.")


def _strings(fields: Mapping[object, object], key: str, place: str) -> tuple[str, ...]:
    """Return the string, or the list of strings, under a key."""
    value = fields.get(key)
    if value is None:
        return ()
    given = cast("list[object]", value) if isinstance(value, list) else [value]
    strings: list[str] = []
    for one in given:
        if not isinstance(one, str) or not one.strip():
            raise LensLoraError(f"{place}: {key}: {one!r} is no text; put it in quotes.")
        strings.append(one)
    return tuple(strings)


def _file_or(fields: Mapping[object, object], key: str, place: str, folder: Path) -> Path | None:
    """Return the file under a key; None if a list or nothing is there."""
    value = fields.get(key)
    if not isinstance(value, str):
        return None
    for file in (folder / value, Path(value)):
        if file.is_file():
            return file
    raise LensLoraError(
        f"{place}: {key}: no file {value!r}; write a list for a single one, [{value}]."
    )


def _questions(fields: Mapping[object, object], place: str) -> tuple[Question, ...]:
    """Return the questions that the list itself holds, as strings or conversations."""
    value = fields.get("prompts")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise LensLoraError(f"{place}: prompts: {value!r} is neither a list nor a file.")
    # `counted_speech` refuses anything that is not a question.
    return tuple(cast("list[Any]", value))


def _words(fields: Mapping[object, object], place: str) -> tuple[str, ...] | None:
    """Return the triggers that the list itself holds; None if there are none."""
    return _strings(fields, "triggers", place) if "triggers" in fields else None


def _beside(path: str | None, folder: Path) -> str | None:
    """Return the folder of this name next to the list, if there is one; else the name itself."""
    if path is None or not (folder / path).is_dir():
        return path
    return str(folder / path)


def _usual_name(texts: Mapping[str, str | None]) -> str:
    """Name a row after the last part of its hub id or folder, and its subfolder."""
    source = str(texts["adapter"] or texts["tuned"])
    last = source.rstrip("/").rpartition("/")[2]
    parts = [last, *(texts["subfolder"] or "").strip("/").split("/")]
    return "-".join(filter(None, parts))


def _require_distinct(listed: Sequence[Listed], file: Path) -> None:
    """Refuse two rows of the same name, since each row has files of its name."""
    for number, name in _repeated(listed):
        raise LensLoraError(
            f"{file}, row {number}: an earlier row is called {name!r} as well; give it a 'name:'."
        )


def _repeated(listed: Sequence[Listed]) -> Iterator[tuple[int, str]]:
    """Yield rows whose name an earlier row has, in any case: some systems would share one file."""
    seen: set[str] = set()
    for number, row in enumerate(listed, start=1):
        if row.name.lower() in seen:
            yield number, row.name
        seen.add(row.name.lower())
