"""`lens-lora verify`: did this adapter ship as it was trained? An exit code for a pipeline.

0 every check passed, 1 one failed, 2 something cannot be read, 3 something could not be decided.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from xml.etree import ElementTree

import typer

from lens_lora.adapters.peft_files import stated_fields
from lens_lora.commands import options, running
from lens_lora.errors import LensLoraError, ModelStateError
from lens_lora.sweeps.records import read_records

if TYPE_CHECKING:
    from lens_lora.evaluation.verify import Verification

SCHEMA = "lens_lora verification 1"
_KEYS = frozenset({"id", "prompt", "messages", "doc", "pre", "flips", "margin_at_least"})
_EXPECT = "A .jsonl file: prompt (or messages), doc, pre, and flips or margin_at_least."
_to_write = functools.partial(typer.Option, dir_okay=False)


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
    base: options.BaseModel,
) -> None:
    """Did this adapter ship as trained? Exit 0 passed, 1 failed, 2 unreadable, 3 undecided.

    lens-lora verify path/to/adapter --merged path/to/merged --expect facts.jsonl
    """
    outputs = options.writable({"--json": json_file, "--junit": junit, "--report": report})
    expectations = [] if expect is None else _read(expect)
    folder = options.folder_of(adapter, quiet=quiet)
    options.require_apart(outputs, base, [folder], expect, *(merged.iterdir() if merged else ()))

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.adapters.adapter import read_adapter
        from lens_lora.evaluation.verify import Expectation
        from lens_lora.evaluation.verify import verify as verification_of
        from lens_lora.loading import quiet_libraries
        from lens_lora.show.report import verification_table

        placed = base.placed("cpu")
        named = stated_fields(folder).get("base_model_name_or_path")
        loaded, why = None, "the adapter names none; name it with --model"
        try:
            if named or base.model:
                loaded = running.load_model_of(named, progress, placed)
        except ModelStateError as error:
            if base.model is not None:
                raise
            why = str(error)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            read = read_adapter(folder, None if loaded is None else lambda _: loaded[0])

        with quiet_libraries():
            verification = verification_of(
                read,
                why if loaded is None else loaded[0],
                lambda: running.announced(running.lens_for(placed, read, progress, loaded=loaded)),
                merged=merged,
                expectations=[Expectation(*row) for row in expectations],
                max_kl=max_kl,
                notes=[str(note.message) for note in notes if note.category is UserWarning],
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
            fields = json.loads(line)
            flips, least = fields.get("flips"), fields.get("margin_at_least")
            prompt = record.prompt if record.messages is None else record.messages
            rows.append((record.where, prompt, record.doc, record.pre, flips, least))
            error = record.bad(fault).error if (fault := _fault(fields, flips, least)) else None
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
    about: dict[str, Any] = {"schema": SCHEMA, "outcome": verification.outcome}
    about |= {"exit_code": verification.exit_code, "adapter": verification.name}
    about["meta"] = dict(verification.meta)
    for name, rows in (("checks", verification.checks), ("tensors", verification.tensors)):
        fields = [dataclasses.asdict(row).items() for row in rows]
        about[name] = [{k: None if v != v else v for k, v in pairs} for pairs in fields]
    return json.dumps(about, ensure_ascii=False, indent=1) + "\n"


_TAGS = {"failed": "failure", "undecided": "error", "not asked": "skipped"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _junit(verification: Verification) -> ElementTree.ElementTree:
    """One test case a check."""
    outcomes = Counter(check.outcome for check in verification.checks)
    counts = {"tests": outcomes.total(), "failures": outcomes["failed"]}
    counts |= {"errors": outcomes["undecided"], "skipped": outcomes["not asked"]}
    suite = ElementTree.Element("testsuite", {name: str(n) for name, n in counts.items()})
    suite.set("name", "lens-lora verify")
    for check in verification.checks:
        about = {"classname": verification.name, "name": check.name}
        case = ElementTree.SubElement(suite, "testcase", about)
        if tag := _TAGS.get(check.outcome):
            ElementTree.SubElement(case, tag, message=_NOT_XML.sub("\ufffd", check.facts))
    return ElementTree.ElementTree(suite)
