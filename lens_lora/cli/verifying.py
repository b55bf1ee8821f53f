"""`lens-lora verify`: did this adapter ship as it was trained?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json as json_text
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer

from lens_lora.cli import options, running
from lens_lora.core.adapter.peft_files import stated_base
from lens_lora.errors import (
    AdapterError,
    LensLoraError,
    LensLoraWarning,
    ModelStateError,
    heard_by,
)
from lens_lora.sweeps.records import read_records

if TYPE_CHECKING:
    from lens_lora.ship.verify import Verification


_to_write = functools.partial(typer.Option, dir_okay=False)


SCHEMA = "lens_lora verification 1"
_KEYS = frozenset({"id", "prompt", "messages", "doc", "pre", "flips", "margin_at_least"})
_EXPECT = "A .jsonl file: prompt (or messages), doc, pre, and flips or margin_at_least."


@options.with_options
def verify(
    adapter: options.AdapterArgument,
    *,
    merged: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A folder, to be base plus adapter."),
    ] = None,
    expect: Annotated[Path | None, options.input_file(_EXPECT)] = None,
    max_kl: Annotated[
        float | None, options.least(0, "Nats per token allowed on neutral texts.")
    ] = None,
    json_file: Annotated[Path | None, _to_write("--json", help="The checks as JSON.")] = None,
    junit: Annotated[Path | None, _to_write(help="The checks as JUnit's XML.")] = None,
    report: Annotated[Path | None, _to_write(help="HTML page to write.")] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Did this adapter ship as trained? Exit 0 passed, 1 failed, 2 unreadable, 3 undecided.

    lens-lora verify path/to/adapter --merged path/to/merged --expect facts.jsonl
    """
    outputs = options.writable({"--json": json_file, "--junit": junit, "--report": report})
    expectations = [] if expect is None else _read(expect)
    folder = options.folder_of(adapter, within, quiet=quiet)
    options.require_apart(outputs, base, [folder], expect, *(merged.iterdir() if merged else ()))

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.core.adapter.adapter import read_adapter
        from lens_lora.loading import tokenizer_beside
        from lens_lora.ship.page import verification_table
        from lens_lora.ship.verify import Expectation
        from lens_lora.ship.verify import verify as verification_of

        placed = base.placed("cpu")
        named = stated_base(folder)
        loaded = None
        why = "the adapter names none; name it with --model"
        try:
            if named or base.model:
                loaded = running.load_model_of(named, progress, placed)
        except ModelStateError as error:
            if base.model is not None:
                raise
            why = str(error)
        notes: list[LensLoraWarning] = []
        with heard_by(notes.append):
            read = read_adapter(folder, None if loaded is None else lambda _: loaded[0])

        tokenizer = None
        if loaded is not None:
            # Where it does not fit the base, the check that makes the lens says so.
            with contextlib.suppress(AdapterError, ModelStateError):
                tokenizer = tokenizer_beside(read, *loaded).tokenizer
        with running.quiet_libraries():
            verification = verification_of(
                read,
                why if loaded is None else loaded[0],
                lambda: running.announced(running.lens_for(placed, read, progress, loaded=loaded)),
                merged=merged,
                tokenizer=tokenizer,
                expectations=[Expectation(*row) for row in expectations],
                max_kl=max_kl,
                notes=[str(note) for note in notes],
                progress=not quiet,
            )
        if json_file is not None:
            json_file.write_text(_json(verification), encoding="utf-8")
        if junit is not None:
            _junit(verification).write(junit, encoding="utf-8", xml_declaration=True)
        if report is not None:
            verification.save_report(report)
        running.tell(verification.story()).print(verification_table(verification))
        labels = {"--json": "JSON", "--junit": "JUnit", "--report": "Report"}
        for option, path in outputs.items():
            running.say(f"{labels[option]}: {path.absolute()}")
    raise typer.Exit(verification.exit_code)


def _read(file: Path) -> list[tuple[Any, ...]]:
    """The fields of an `Expectation` for each line."""
    if file.suffix.lower() != ".jsonl":
        raise LensLoraError(f"{file}: expected a file that ends in .jsonl.")
    records = read_records(file)
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    rows: list[tuple[Any, ...]] = []
    for record, line in zip(records, lines, strict=True):
        error = record.error
        if error is None:
            fields = json_text.loads(line)
            flips = fields.get("flips")
            least = fields.get("margin_at_least")
            prompt = record.prompt if record.messages is None else record.messages
            rows.append((record.where, prompt, record.doc, record.pre, flips, least))
            fault = _fault(fields, flips, least)
            error = None if fault is None else record.bad(fault).error
        if error is not None:
            raise LensLoraError(f"{file}, {error}")
    return rows


def _fault(fields: Mapping[str, Any], flips: Any, least: Any) -> str | None:
    """What is wrong with what is expected; None if nothing is."""
    unknown = sorted(fields.keys() - _KEYS)
    if unknown:
        return f"{unknown[0]!r} is no key of an expectation, which are {', '.join(sorted(_KEYS))}."
    if not isinstance(flips, bool | None):
        return f"flips is {flips!r}; expected true or false."
    is_number = isinstance(least, int | float) and not isinstance(least, bool)
    if least is not None and not (is_number and math.isfinite(least)):
        return f"margin_at_least is {least!r}; expected a number."
    return None


def _json(verification: Verification) -> str:
    """The checks and tensors, with `SCHEMA`; a number that there is not is null."""
    about: dict[str, Any] = {
        "schema": SCHEMA,
        "outcome": verification.outcome,
        "exit_code": verification.exit_code,
        "adapter": verification.name,
        "meta": dict(verification.meta),
        "checks": [_without_nan(dataclasses.asdict(check)) for check in verification.checks],
        "tensors": [_without_nan(dataclasses.asdict(tensor)) for tensor in verification.tensors],
    }
    return json_text.dumps(about, ensure_ascii=False, indent=1) + "\n"


def _without_nan(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, with None for NaN, which JSON does not have."""
    return {name: None if value != value else value for name, value in fields.items()}


_TAGS = {"failed": "failure", "undecided": "error", "not asked": "skipped"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _junit(verification: Verification) -> ElementTree.ElementTree:
    """One test case a check."""
    outcomes = Counter(check.outcome for check in verification.checks)
    counts = {
        "tests": outcomes.total(),
        "failures": outcomes["failed"],
        "errors": outcomes["undecided"],
        "skipped": outcomes["not asked"],
    }
    suite = ElementTree.Element("testsuite", {name: str(n) for name, n in counts.items()})
    suite.set("name", "lens-lora verify")
    for check in verification.checks:
        about = {"classname": verification.name, "name": check.name}
        case = ElementTree.SubElement(suite, "testcase", about)
        tag = _TAGS.get(check.outcome)
        if tag is not None:
            ElementTree.SubElement(case, tag, message=_NOT_XML.sub("\ufffd", check.facts))
    return ElementTree.ElementTree(suite)
