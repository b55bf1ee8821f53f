"""Commands about adapters as a whole: `inspect`, `diff`, `compare`, `checkpoints`, `repair`."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import files, options, running
from lens_lora.cli.forecast import Work
from lens_lora.cli.questions import Prompt, Question, Questions
from lens_lora.errors import many
from lens_lora.formats.folders import checkpoint_folders, stated_fields

# With SmolLM2-135M-Instruct on one core; see `forecast`.
_SECONDS_OF_DIFF = 90.0
_SECONDS_OF_DIFF_FAST = 40.0

# An option that names a file to write.
_to_write = functools.partial(typer.Option, dir_okay=False)


@dataclasses.dataclass(frozen=True)
class ModelBeside(options.ModelOptions):
    """A base model that is loaded only if it is named."""

    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, a folder or hub id, or 'embedded' for SmolLM2-135M-Instruct: adds "
            "the sites and ‖ΔW‖/‖W‖. Default: none."
        ),
    ] = None


@options.with_options
def inspect(
    adapter: options.AdapterArgument,
    *,
    top: Annotated[int, typer.Option(min=1, help="How many of the largest modules to list.")] = 10,
    every: Annotated[bool, typer.Option("--all", help="List every module.")] = False,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: ModelBeside,
) -> None:
    """What an adapter is: its targets, ranks and scales, and the spectrum of each update."""
    outputs = files.writable({"--json": json})
    folder = files.folder_of(adapter, within, quiet=quiet)
    files.require_apart(outputs, base, [folder])
    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.directions.spectra import summarise
        from lens_lora.directions.summary_tables import adapter_table, spectra_table

        loaded = ll.load_adapter(folder)
        lens = None
        if base.model is not None:
            lens = running.lens_for(base, loaded, progress, leaves_out=True)
        summary = summarise(loaded, lens)
        if json is not None:
            files.write_json(json, [summary])
    console = Console()
    console.print(adapter_table(summary, stated_fields(folder)))
    console.print()
    console.print(spectra_table(summary, None if every else top))


@options.with_options
def diff(
    adapter: options.AdapterIfOther = None,
    *,
    tuned: options.TunedModel,
    texts: Annotated[
        Path | None,
        options.input_file("A .txt, a text a line. Default: neutral sentences and conversations."),
    ] = None,
    prompts: Annotated[
        Path | None,
        options.input_file("Your own questions, asked beside forty everyday ones: .txt or .jsonl."),
    ] = None,
    triggers: Annotated[
        Path | None,
        options.input_file("A .txt with a word a line, tried before questions beside twenty more."),
    ] = None,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(help="An adapter trained for something else, as a control; may be repeated."),
    ] = None,
    nulls: Annotated[
        int, options.least(0, "How many controls of the adapter's own updates at other modules.")
    ] = 2,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Fewer texts, no split by module, no trigger words but your own."
        ),
    ] = False,
    report: options.ReportOption = Path("lens_lora_diff.html"),
    save: Annotated[
        Path | None,
        _to_write(help="Also write the numbers: as a table (.csv), or all (.safetensors)."),
    ] = None,
    json: Annotated[Path | None, _to_write(help="Also write the brief, for a program.")] = None,
    jacobian: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the base's Jacobian, by which more is read; kept for next time.",
        ),
    ] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """What was this fine-tune taught? What it says that the base does not, counted, comes first.

    lens-lora diff path/to/adapter --report diff.html

    lens-lora diff --tuned path/to/model --model path/to/base
    """
    if adapter is None and tuned.tuned is None:
        raise typer.BadParameter(
            "name one, or a fine-tuned model with --tuned.", param_hint="ADAPTER"
        )
    if save is not None and save.suffix not in (".csv", ".safetensors"):
        raise typer.BadParameter(f"{save}: a .csv or .safetensors file.", param_hint="--save")
    outputs = files.writable({"--report": report, "--json": json, "--save": save})
    lines = None if texts is None else files.texts_of(texts)
    asked: list[Prompt] = []
    if prompts is not None:
        questions = Questions(prompts=prompts).checked(answered=False)
        asked = [question.prompt for question in questions]
    words = None if triggers is None else files.texts_of(triggers)
    if words is None and not fast:
        words = []
    folder = files.folder_or_tuned(adapter, within, tuned, base, quiet=quiet)
    controls = [files.folder_of(control, quiet=quiet) for control in unrelated or []]
    files.require_apart(outputs, base, [folder, *controls], texts, prompts, triggers)

    seconds = _SECONDS_OF_DIFF_FAST if fast else _SECONDS_OF_DIFF
    does = "ask both models everyday questions, print what only the fine-tuned one says, "
    work = Work(f"{does}then look at texts and modules, and write {report.name}", seconds)
    with running.at_work(base, quiet=quiet, work=work, adapter=folder) as progress:
        from lens_lora.audit.counted_speech import with_triggers
        from lens_lora.audit.page import brief_tables, what_changed_tables
        from lens_lora.audit.speech_page import first_screen
        from lens_lora.audit.speech_words import first_sentences

        others = [ll.load_adapter(control) for control in controls]
        lens = running.announced(running.lens_of(base, folder, tuned, progress))
        console = Console()
        speech = None
        try:
            with running.quiet_libraries():
                speech = ll.counted_speech(lens, asked, progress=not quiet)
        except ll.errors.PromptError:
            # Without a tokenizer, or in a short context, none of the package's questions is asked.
            if asked:
                raise
        if speech is not None:
            console.print()
            console.print(first_screen(speech))
        if speech is not None and words is not None:
            with running.quiet_libraries():
                speech = with_triggers(lens, speech, words, progress=not quiet)
        with running.quiet_libraries():
            changes = ll.what_changed(
                lens,
                lines,
                others,
                nulls=nulls,
                fast=fast,
                speech=speech,
                jacobian=jacobian,
                progress=not quiet,
            )
        brief = changes.brief()
        changes.save_report(report)
        if json is not None:
            json.write_text(brief.to_json(), encoding="utf-8")
        if save is not None and save.suffix == ".csv":
            changes.to_frame().to_csv(save, index=False)
        elif save is not None:
            changes.save(save)
        console.print(brief_tables(changes))
        console.print(what_changed_tables(changes))
        if speech is not None:
            # What was printed first has left a screen of few rows.
            running.tell(f"In short: {' '.join(first_sentences(speech))}")
        running.say(f"\nReport: {report.absolute()}")
        if save is not None:
            running.say(f"Numbers: {save.absolute()}")
        if json is not None:
            running.say(f"Brief: {json.absolute()}")


@options.with_options
def compare(
    adapter: options.AdapterArgument,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The other adapter, of the same base.")
    ],
    *,
    texts: Annotated[
        Path | None,
        options.input_file("A .txt, a text a line, on which both are run. Default: none."),
    ] = None,
    nulls: Annotated[
        int, options.least(0, "How many adapters in random directions to compare with.")
    ] = 10,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Are two adapters the same change? Their weights site by site, and on prompts what both do.

    lens-lora compare path/to/one path/to/other
    """
    outputs = files.writable({"--json": json})
    lines = None if texts is None else files.texts_of(texts)
    folders = [
        files.folder_of(adapter, within, quiet=quiet),
        files.folder_of(other, quiet=quiet),
    ]
    files.require_apart(outputs, base, folders, texts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import comparison_table

        lens = running.announced(running.lens_for(base, folders[0], progress))
        with running.quiet_libraries():
            comparison = ll.compare_adapters(
                lens, folders[1], lines, draws=nulls, progress=not quiet
            )
        if json is not None:
            files.write_json(json, [comparison])
        one, two = comparison.names
        shared = many(len(comparison.sites), "site")
        story = [f"{one} and {two} both change {shared}."]
        cosine = comparison.summary().loc["cosine of ΔW"]
        likeness = f"Their changes of weights have a cosine of {cosine['value']:.2g}"
        if nulls:
            likeness += f"; of adapters in random directions it is at most {cosine.iloc[-1]:.1g}"
        story.append(f"{likeness} (1 is the same change, 0 nothing in common).")
        for sites, name in zip(comparison.only, comparison.names, strict=True):
            if sites:
                story.append(f"{name} alone changes {len(sites)} more.")
        if comparison.note:
            story.append(comparison.note)
        Console().print(comparison_table(comparison))
        running.tell(" ".join(story))
        if json is not None:
            running.say(f"\nJSON: {json.absolute()}")


@options.with_options
def checkpoints(
    run_folder: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A trainer's folder or hub id, with checkpoint-<step> folders in it.",
        ),
    ],
    *,
    asked: Questions,
    report: options.ReportOption = Path("lens_lora_checkpoints.html"),
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    found = checkpoint_folders(run_folder, within.revision, within.subfolder)
    folders = list(found.values())
    last = folders[-1]
    outputs = files.writable({"--report": report, "--json": json})
    files.require_apart(outputs, base, folders, asked.prompts)
    questions = asked.checked()

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import checkpoints_table

        running.warn_of_spaces(questions)
        lens = running.announced(running.lens_for(base, ll.load_adapter(last), progress))
        prompts, readout = running.margin_of(lens.model, questions, lens.prepend_bos)
        with running.quiet_libraries():
            training = ll.checkpoints(
                lens,
                run_folder,
                prompts,
                readout,
                revision=within.revision,
                subfolder=within.subfolder,
                progress=not quiet,
            )
        training.save_report(report)
        if json is not None:
            files.write_json(json, [training])
        Console().print(checkpoints_table(training))
        running.tell(training.story())
        running.say(f"\nReport: {report.absolute()}")


@options.with_options
def repair(
    adapter: options.AdapterIfOther = None,
    *,
    asked: Questions,
    drop: Annotated[
        Path,
        options.input_file("A file with a text a line, on which the model is to stay the base."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the repaired adapter, in PEFT's format.")],
    test_prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt held out, to judge what is kept; may be repeated."),
    ] = None,
    test_prompts: options.PromptsFile = None,
    test_drop: Annotated[
        Path | None, options.input_file("Held-out texts, to judge what is dropped.")
    ] = None,
    keep_share: Annotated[
        float, typer.Option(help="Share of the margin's shift that must stay.")
    ] = 0.9,
    of: Annotated[
        Literal["rank", "site"], typer.Option(help="Whether single ranks or whole sites are kept.")
    ] = "rank",
    steps: Annotated[int, options.least(1, "Number of optimiser steps.")] = 40,
    report: options.ReportOption = Path("lens_lora_repair.html"),
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Keep a margin, drop what else the adapter does; judged beside scaling the whole adapter."""
    questions = asked.checked()
    tests: list[Question] = []
    if test_prompt or test_prompts:
        held_out = dataclasses.replace(asked, prompt=test_prompt, prompts=test_prompts, chat=None)
        tests = held_out.checked()
    files.require_place(out / "adapter_config.json", "--out")
    written = files.writable({"--report": report, "--json": json})
    texts = files.texts_of(drop)
    test_texts = files.texts_of(test_drop) if test_drop else []
    if bool(tests) != bool(test_texts):
        why = "a repair is judged on both kinds"
        raise typer.BadParameter(f"--test-prompt(s) and --test-drop go together: {why}.")
    folder = files.folder_of(adapter, within, quiet=quiet)
    outputs = {"--out": out, **written}
    files.require_apart(outputs, base, [folder], drop, test_drop, asked.prompts, test_prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import repair_table

        running.warn_of_spaces([*questions, *tests])
        lens = running.announced(running.lens_for(base, folder, progress))
        kept = running.margin_of(lens.model, questions, lens.prepend_bos)
        test_keep: list[tuple[ll.results.Prompts, ll.Readout]] = []
        if tests:
            test_keep.append(running.margin_of(lens.model, tests, lens.prepend_bos))
        with running.quiet_libraries():
            repaired = ll.repair(
                lens,
                keep=[kept],
                drop=[(texts, ll.KL())],
                keep_share=keep_share,
                of=of,
                test_keep=test_keep,
                test_drop=[(test_texts, ll.KL())] if test_texts else [],
                steps=steps,
                progress=not quiet,
            )
        repaired.adapter.save(out)
        repaired.save_report(report)
        if json is not None:
            files.write_json(json, [repaired])
        Console().print(repair_table(repaired))
        running.tell(repaired.story())
        kept_gates = f"{int(repaired.kept.sum())} of {repaired.gate_count} {of}s"
        running.say(f"\nAdapter: {out.absolute()}, {kept_gates}")
        running.say(f"Report: {report.absolute()}")
