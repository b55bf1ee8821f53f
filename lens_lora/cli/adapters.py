"""The commands about adapters as a whole: `inspect`, `compare`, `checkpoints` and `repair`.

Each command checks its options first, then reads files, and only then loads a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import files, options, running
from lens_lora.cli.questions import Question, Questions
from lens_lora.errors import ArgumentError, many, setting
from lens_lora.formats.folders import checkpoint_folders, stated_fields

if TYPE_CHECKING:
    # Some prompts, and the readout that gives their margin.
    _Margin = tuple[ll.results.Prompts, ll.Readout]

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
    """List an adapter's targets, ranks and scales, and the spectrum of each update."""
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
    # The summary is last, so that it is what remains on a small screen.
    console = Console()
    most_modules = None if every else top
    console.print(spectra_table(summary, most_modules))
    console.print(adapter_table(summary, stated_fields(folder)))


@options.with_options
def compare(
    adapter: options.AdapterArgument,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="The other adapter, of the same base.")
    ],
    *,
    texts: Annotated[
        Path | None,
        options.input_file("A .txt file, one text per line, on which both are run. Default: none."),
    ] = None,
    nulls: Annotated[
        int, options.least(0, "How many adapters in random directions to compare with.")
    ] = 10,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Compare two adapters: their weights site by site, and what both do on texts.

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
        second = ll.load_adapter(folders[1])
        if base.model is not None:
            # A named model is taken as the base of both adapters, whatever their files name. Signs
            # of another base are a warning, as for the first adapter.
            lens.with_adapter(second)
            second = dataclasses.replace(second, base_model=lens.adapter.base_model)
        with running.quiet_libraries():
            comparison = ll.compare_adapters(lens, second, lines, draws=nulls, progress=not quiet)
        if json is not None:
            files.write_json(json, [comparison])
        Console().print(comparison_table(comparison))
        running.tell(_comparison_story(comparison, nulls))
        if json is not None:
            running.say(f"\nJSON: {json.absolute()}")


def _comparison_story(comparison: ll.results.AdapterComparison, nulls: int) -> str:
    """Write what two adapters have in common, and what each changes alone.

    Args:
        comparison: the comparison of both.
        nulls: how many adapters in random directions they were compared with.
    """
    names = " and ".join(comparison.names)
    shared = many(len(comparison.sites), "site")
    story = [f"{names} both change {shared}."]
    cosine = comparison.summary().loc["cosine of ΔW"]
    likeness = f"Their changes of weights have a cosine of {_cosine_text(cosine['value'])}"
    if nulls:
        # The bound is rounded up: for random directions it may be as small as 0.0001.
        bound = _cosine_text(math.ceil(100 * cosine["null 97.5%"]) / 100)
        likeness += f"; of 97.5 % of adapters in random directions it is at most {bound}"
    story.append(f"{likeness} (1 is the same change, 0 nothing in common).")
    for sites, name in zip(comparison.only, comparison.names, strict=True):
        if sites:
            story.append(f"{name} alone changes {len(sites)} more.")
    if comparison.note:
        story.append(comparison.note)
    return " ".join(story)


def _cosine_text(cosine: float) -> str:
    """Write a cosine with two decimals and a true minus sign, but without one before zero."""
    rounded = round(cosine, 2)
    sign = "−" if rounded < 0 else ""
    return f"{sign}{abs(rounded):.2f}"


@options.with_options
def checkpoints(
    run_folders: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A trainer's folder or hub id, with checkpoint-<step> folders in it; several, "
            "such as one recipe from several seeds, are shown beside one another.",
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
    """Find when in training it was learnt: a margin at every checkpoint, and which modules move."""
    _require_each_once(run_folders)
    questions = asked.checked()
    outputs = files.writable({"--report": report, "--json": json})
    checkpoints_of_runs = [
        checkpoint_folders(run, within.revision, within.subfolder) for run in run_folders
    ]
    runs = _runs_by_name(run_folders, checkpoints_of_runs)
    folders: list[Path] = []
    for folder_by_step in runs.values():
        folders += folder_by_step.values()
    last_checkpoint = folders[-1]
    files.require_apart(outputs, base, folders, asked.prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import checkpoints_table, trainings_table

        running.warn_of_spaces(questions)
        adapter = ll.load_adapter(last_checkpoint)
        lens = running.announced(running.lens_for(base, adapter, progress))
        margin = running.margin_of(lens.model, questions, lens.prepend_bos)
        with running.quiet_libraries():
            if len(runs) == 1:
                training = _one_training(lens, run_folders[0], margin, within, quiet=quiet)
            else:
                training = _several_trainings(lens, runs, margin, quiet=quiet)
        training.save_report(report)
        if json is not None:
            files.write_json(json, [training])
        if isinstance(training, ll.results.Trainings):
            Console().print(trainings_table(training))
        else:
            Console().print(checkpoints_table(training))
        running.tell(training.story())
        running.say(f"\nReport: {report.absolute()}")


# The folder of each checkpoint of a run under its step, in increasing order.
_Run = Mapping[int, Path]


def _one_training(
    lens: ll.LoraLens, run: str, margin: _Margin, within: options.Within, *, quiet: bool
) -> ll.results.Checkpoints:
    """Follow the margin through the checkpoints of one run."""
    prompts, readout = margin
    return ll.checkpoints(
        lens,
        run,
        prompts,
        readout,
        revision=within.revision,
        subfolder=within.subfolder,
        progress=not quiet,
    )


def _several_trainings(
    lens: ll.LoraLens, runs: Mapping[str, _Run], margin: _Margin, *, quiet: bool
) -> ll.results.Trainings:
    """Follow the margin through the checkpoints of several runs, given by their names."""
    prompts, readout = margin
    folder_by_name = {name: _run_folder(run) for name, run in runs.items()}
    return ll.checkpoints(lens, folder_by_name, prompts, readout, progress=not quiet)


def _require_each_once(run_folders: Sequence[str]) -> None:
    """Refuse a run that is given twice."""
    if len(set(run_folders)) < len(run_folders):
        raise typer.BadParameter("a run is named twice; name each once.")


def _runs_by_name(arguments: Sequence[str], runs: Sequence[_Run]) -> dict[str, _Run]:
    """Name each run by its folder, or by its argument if two folders have the same name.

    Args:
        arguments: the runs as the user wrote them, each once.
        runs: the checkpoints of each run.
    """
    names = [_run_folder(run).name for run in runs]
    if len(set(names)) < len(names):
        names = list(arguments)
    return dict(zip(names, runs, strict=True))


def _run_folder(run: _Run) -> Path:
    """Return the folder that holds the checkpoints of a run."""
    first_checkpoint, *_ = run.values()
    return first_checkpoint.parent


@options.with_options
def repair(
    adapter: options.AdapterIfOther = None,
    *,
    asked: Questions,
    drop: Annotated[
        Path,
        options.input_file(
            "A file of texts, one per line, on which the model should behave like the base."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Folder for the repaired adapter, in PEFT's format."),
    ],
    test_prompt: Annotated[
        list[str] | None,
        typer.Option(help="A prompt on which only the result is judged; may be repeated."),
    ] = None,
    test_prompts: Annotated[
        Path | None,
        options.input_file("A file like --prompts, on which only the result is judged."),
    ] = None,
    test_drop: Annotated[
        Path | None, options.input_file("Held-out texts, on which what is dropped is judged.")
    ] = None,
    keep_share: Annotated[
        float, typer.Option(help="Share of the margin's shift that must be kept.")
    ] = 0.9,
    of: Annotated[
        Literal["rank", "site"], typer.Option(help="Whether to keep single ranks or whole sites.")
    ] = "rank",
    steps: Annotated[int, options.least(1, "Number of optimiser steps.")] = 40,
    report: options.ReportOption = Path("lens_lora_repair.html"),
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Keep a margin and drop what else the adapter does, compared with scaling the adapter."""
    _require_share(keep_share)
    questions = asked.checked()
    test_questions = _test_questions(asked, test_prompt, test_prompts)
    files.require_place(out / "adapter_config.json", "--out")
    written = files.writable({"--report": report, "--json": json})
    texts = files.texts_of(drop)
    test_texts = files.texts_of(test_drop) if test_drop else []
    _require_both_or_neither(test_questions, test_texts)
    folder = files.folder_of(adapter, within, quiet=quiet)
    outputs = {"--out": out, **written}
    files.require_apart(outputs, base, [folder], drop, test_drop, asked.prompts, test_prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.two_adapters.page import repair_table

        running.warn_of_spaces([*questions, *test_questions])
        lens = running.announced(running.lens_for(base, folder, progress))
        keep = _margins(lens, questions)
        test_keep = _margins(lens, test_questions)
        with running.quiet_libraries():
            repaired = ll.repair(
                lens,
                keep=keep,
                drop=_divergences(texts),
                keep_share=keep_share,
                of=of,
                test_keep=test_keep,
                test_drop=_divergences(test_texts),
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


def _require_share(keep_share: float) -> None:
    """Refuse a share outside (0, 1], as `ll.repair` does."""
    if not 0 < keep_share <= 1:
        given = setting("keep_share", keep_share)
        raise ArgumentError(f"{given}: expected a share above 0, at most 1.")


def _test_questions(
    asked: Questions, prompts: list[str] | None, file: Path | None
) -> list[Question]:
    """Return the questions on which only the result is judged; [] if there are none.

    Args:
        asked: the questions on which the margin is kept. The answers are the same.
        prompts: the prompts of --test-prompt.
        file: the file of --test-prompts.
    """
    if not prompts and not file:
        return []
    return dataclasses.replace(asked, prompt=prompts, prompts=file, chat=None).checked()


def _require_both_or_neither(questions: Sequence[Question], texts: Sequence[str]) -> None:
    """Refuse held-out questions without held-out texts, and the reverse."""
    if bool(questions) != bool(texts):
        raise typer.BadParameter(
            "--test-prompt(s) and --test-drop go together: a repair is judged on both kinds."
        )


def _margins(lens: ll.LoraLens, questions: Sequence[Question]) -> list[_Margin]:
    """Return a list of one margin, that of all these questions; [] if there are none."""
    if not questions:
        return []
    return [running.margin_of(lens.model, questions, lens.prepend_bos)]


def _divergences(texts: list[str]) -> list[tuple[list[str], ll.Readout]]:
    """Return a list of one divergence from the base, on all these texts; [] if there are none."""
    if not texts:
        return []
    return [(texts, ll.KL())]
