"""An adapter as a whole: `inspect`, `diff`, `checkpoints` of a training, `repair`, `verify`."""

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
from typing import TYPE_CHECKING, Annotated, Any, Literal
from xml.etree import ElementTree

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import options, running
from lens_lora.core.adapter.peft_files import checkpoint_folders, stated_base, stated_fields
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


@dataclasses.dataclass(frozen=True)
class ModelBeside(options.ModelOptions):
    """A base model that is loaded only if it is named."""

    model: Annotated[
        str | None,
        "Base model, a folder or hub id, or 'embedded' for SmolLM2-135M-Instruct: adds "
        "the sites and ‖ΔW‖/‖W‖. Default: none.",
    ] = None


@options.with_options
def inspect(
    adapter: options.AdapterArgument,
    *,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest to list.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="List every one.")] = False,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: ModelBeside,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    folder = options.folder_of(adapter, within, quiet=quiet)
    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.directions.spectra import summarise
        from lens_lora.directions.summary_tables import adapter_table, spectra_table

        loaded, lens = ll.load_adapter(folder), None
        if base.model is not None:
            lens = running.lens_for(base, loaded, progress, leaves_out=True)
        summary = summarise(loaded, lens)
    console = Console()
    console.print(adapter_table(summary, stated_fields(folder)))
    console.print()
    console.print(spectra_table(summary, None if every else top))


@options.with_options
def diff(
    adapter: options.AdapterArgument,
    *,
    texts: Annotated[
        Path | None,
        options.input_file("A .txt, a text a line. Default: neutral sentences and conversations."),
    ] = None,
    unrelated: Annotated[
        list[str] | None, "An adapter trained for something else, as a control; may be repeated."
    ] = None,
    nulls: Annotated[int, options.least(0, "Controls in random directions, of its KL.")] = 2,
    fast: Annotated[bool, "Fewer texts and words, without the split by module."] = False,
    report: options.ReportOption = Path("lens_lora_diff.html"),
    save: Annotated[
        Path | None, _to_write(help="Also the numbers: a table (.csv), or all (.safetensors).")
    ] = None,
    json: Annotated[Path | None, _to_write(help="Also the brief, for a program.")] = None,
    jacobian: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder that keeps the base's Jacobian, for readings."),
    ] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """What was this fine-tune taught? Nothing asked: its own words first, with controls beside.

    lens-lora diff path/to/adapter --report diff.html
    """
    if save is not None and save.suffix not in (".csv", ".safetensors"):
        raise typer.BadParameter(f"{save}: a .csv or .safetensors file.", param_hint="--save")
    outputs = options.writable({"--report": report, "--json": json, "--save": save})
    lines = None if texts is None else options.texts_of(texts)
    folder = options.folder_of(adapter, within, quiet=quiet)
    controls = [options.folder_of(control, quiet=quiet) for control in unrelated or []]
    options.require_apart(outputs, base, [folder, *controls], texts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.audit.page import what_changed_tables

        others = [ll.load_adapter(control) for control in controls]
        lens = running.announced(running.lens_for(base, folder, progress))
        with running.quiet_libraries():
            how: Any = {"nulls": nulls, "fast": fast, "jacobian": jacobian, "progress": not quiet}
            changes = ll.what_changed(lens, lines, others, **how)
        brief = changes.brief()
        changes.save_report(report)
        if json is not None:
            json.write_text(brief.to_json(), encoding="utf-8")
        if save is not None and save.suffix == ".csv":
            changes.to_frame().to_csv(save, index=False)
        elif save is not None:
            changes.save(save)
        running.tell(str(brief)).print(what_changed_tables(changes))
        for name, file in (("\nReport", report), ("Numbers", save), ("Brief", json)):
            if file is not None:
                running.say(f"{name}: {file.absolute()}")


@options.with_options
def checkpoints(
    run_folder: Annotated[
        str,
        typer.Argument(help="A trainer's folder or hub id, with checkpoint-<step> folders in it."),
    ],
    *,
    asked: options.Questions,
    report: options.ReportOption = Path("lens_lora_checkpoints.html"),
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    found = checkpoint_folders(run_folder, within.revision, within.subfolder)
    *_, last = folders = list(found.values())
    options.require_writable(report, "--report")
    options.require_apart({"--report": report}, base, folders, asked.prompts)
    questions = asked.listed()

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import checkpoints_table

        running.warn_of_spaces(questions)
        lens = running.announced(running.lens_for(base, ll.load_adapter(last), progress))
        prompts, readout = running.margin_of(lens.model, questions, lens.prepend_bos)
        with running.quiet_libraries():
            training = ll.checkpoints(lens, last.parent, prompts, readout, progress=not quiet)
        training.save_report(report)
        Console().print(checkpoints_table(training))
        running.say(f"\nReport: {report.absolute()}")


@options.with_options
def repair(
    adapter: options.AdapterIfOther = None,
    *,
    asked: options.Questions,
    drop: Annotated[
        Path,
        options.input_file("A file with a text a line, on which the model is to stay the base."),
    ],
    out: Annotated[Path, "The repaired adapter's folder, in PEFT's format."],
    test_prompt: Annotated[
        list[str] | None, "Held out, to judge what is kept; may be repeated."
    ] = None,
    test_prompts: options.PromptsFile = None,
    test_drop: Annotated[
        Path | None, options.input_file("Held-out texts, to judge what is left.")
    ] = None,
    keep_share: Annotated[float, "Of the margin's shift, that must stay."] = 0.9,
    of: Annotated[Literal["rank", "site"], "What is kept or not."] = "rank",
    steps: Annotated[int, options.least(1, "Of the optimiser.")] = 40,
    report: options.ReportOption = Path("lens_lora_repair.html"),
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Keep a margin, drop what else the adapter does; judged beside scaling the whole adapter."""
    questions = asked.listed()
    held_out = dataclasses.replace(asked, prompt=test_prompt, prompts=test_prompts, chat=None)
    tests = held_out.listed() if test_prompt or test_prompts else []
    options.require_place(out / "adapter_config.json", "--out")
    options.require_writable(report, "--report")
    texts, test_texts = options.texts_of(drop), options.texts_of(test_drop) if test_drop else []
    if bool(tests) != bool(test_texts):
        why = "a repair is judged on both kinds"
        raise typer.BadParameter(f"--test-prompt(s) and --test-drop go together: {why}.")
    folder = options.folder_of(adapter, within, quiet=quiet)
    outputs = {"--out": out, "--report": report}
    options.require_apart(outputs, base, [folder], drop, test_drop, asked.prompts, test_prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import repair_table

        running.warn_of_spaces([*questions, *tests])
        lens = running.announced(running.lens_for(base, folder, progress))
        kept = running.margin_of(lens.model, questions, lens.prepend_bos)
        held_out_kept = [running.margin_of(lens.model, tests, lens.prepend_bos)] if tests else []
        with running.quiet_libraries():
            repaired = ll.repair(
                lens,
                keep=[kept],
                drop=[(texts, ll.KL())],
                keep_share=keep_share,
                of=of,
                test_keep=held_out_kept,
                test_drop=[(test_texts, ll.KL())] if test_texts else [],
                steps=steps,
                progress=not quiet,
            )
        repaired.adapter.save(out)
        repaired.save_report(report)
        running.tell(repaired.story()).print(repair_table(repaired))
        kept_gates = f"{int(repaired.kept.sum())} of {repaired.gate_count} {of}s"
        running.say(f"\nAdapter: {out.absolute()}, {kept_gates}")
        running.say(f"Report: {report.absolute()}")


# --- Did it ship as it was trained?

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
        named, loaded = stated_base(folder), None
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
    return json_text.dumps(about, ensure_ascii=False, indent=1) + "\n"


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
