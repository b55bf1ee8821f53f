"""`lens-lora checkpoints`, a fine-tune through its training, and `repair`, what stays of a fact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.adapters.peft_files import checkpoint_folders
from lens_lora.commands import options, running


@options.with_options
def checkpoints(
    run_folder: Annotated[
        Path, typer.Argument(help="A trainer's folder, with checkpoint-<step> folders in it.")
    ],
    *,
    asked: options.Questions,
    report: options.ReportOption = Path("lens_lora_checkpoints.html"),
    quiet: options.QuietOption = False,
    base: options.BaseModel,
) -> None:
    """A margin, its first order and flip at every checkpoint, and which modules move when."""
    *_, last = folders = list(checkpoint_folders(run_folder).values())
    options.require_writable(report, "--report")
    options.require_apart({"--report": report}, base, folders, asked.prompts)
    questions = asked.listed()

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.loading import quiet_libraries
        from lens_lora.show.adapters import checkpoints_table

        running.note_spaces(questions, progress)
        lens = running.announced(running.lens_for(base, ll.load_adapter(last), progress))
        prompts, readout = running.margin_of(lens.model, questions)
        with quiet_libraries():
            training = ll.checkpoints(lens, run_folder, prompts, readout, progress=not quiet)
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
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 40,
    report: options.ReportOption = Path("lens_lora_repair.html"),
    quiet: options.QuietOption = False,
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
        raise typer.BadParameter(
            "--test-prompt(s) and --test-drop go together: a repair is judged on both kinds."
        )
    folder = options.folder_of(adapter, quiet=quiet)
    outputs = {"--out": out, "--report": report}
    options.require_apart(outputs, base, [folder], drop, test_drop, asked.prompts, test_prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.loading import quiet_libraries
        from lens_lora.show.adapters import repair_table

        running.note_spaces([*questions, *tests], progress)
        lens = running.announced(running.lens_for(base, folder, progress))
        with quiet_libraries():
            repaired = ll.repair(
                lens,
                keep=[running.margin_of(lens.model, questions)],
                drop=[(texts, ll.KL())],
                keep_share=keep_share,
                of=of,
                test_keep=[running.margin_of(lens.model, tests)] if tests else [],
                test_drop=[(test_texts, ll.KL())] if test_texts else [],
                steps=steps,
                progress=not quiet,
            )
        repaired.adapter.save(out)
        repaired.save_report(report)
        running.tell(running.in_options(repaired.story(), repair)).print(repair_table(repaired))
        kept_gates = f"{int(repaired.kept.sum())} of {repaired.gate_count} {of}s"
        running.say(f"\nAdapter: {out.absolute()}, {kept_gates}")
        running.say(f"Report: {report.absolute()}")
