"""`lens-lora repair`: the part of an adapter that keeps one fact and drops what it spills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

import lens_lora as ll
from lens_lora.commands.options import (
    AdapterOption,
    BaseModel,
    DocOption,
    PreOption,
    QuietOption,
    folder_of,
    require_apart,
    require_different,
    require_place,
    texts_of,
    with_base,
)
from lens_lora.commands.running import announce, lens_for, say


@with_base
def repair(
    prompt: Annotated[
        list[str], typer.Option(help="On which the margin is kept; may be repeated.")
    ],
    doc: DocOption,
    pre: PreOption,
    drop: Annotated[
        Path,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file with a text a line, on which the model is to stay the base.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The repaired adapter's folder, in PEFT's format.")],
    base: BaseModel,
    test_prompt: Annotated[
        list[str] | None, typer.Option(help="Held out, to judge what is kept; may be repeated.")
    ] = None,
    test_drop: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Held-out texts, to judge what is left."),
    ] = None,
    keep_share: Annotated[float, typer.Option(help="Of the margin's shift, that must stay.")] = 0.9,
    of: Annotated[Literal["rank", "site"], typer.Option(help="What is kept or not.")] = "rank",
    steps: Annotated[int, typer.Option(min=1, help="Of the optimiser.")] = 40,
    adapter: AdapterOption = None,
    quiet: QuietOption = False,
) -> None:
    """Keep a fact, drop what else the adapter does; judged beside scaling the whole adapter."""
    require_different(doc, pre)
    require_place(out / "adapter_config.json", "--out")
    texts, held_out = texts_of(drop), texts_of(test_drop) if test_drop else []
    if bool(test_prompt) != bool(held_out):
        raise typer.BadParameter(
            "--test-prompt and --test-drop go together: a repair is judged on both kinds."
        )
    folder = folder_of(adapter)
    require_apart({"--out": out}, base, [folder], drop, test_drop)

    from lens_lora.loading import quiet_libraries
    from lens_lora.readouts.answers import margin_between
    from lens_lora.show.trainings import repair_table

    lens = lens_for(base, folder, Console(stderr=True, quiet=quiet))
    announce(lens)

    def kept(questions: Sequence[str] | None) -> list[Any]:
        if not questions:
            return []
        prompts = lens.prompts(list(questions))
        return [(prompts, margin_between(lens.model, doc, pre, prompts))]

    with quiet_libraries():
        repaired = ll.repair(
            lens,
            keep=kept(prompt),
            drop=[(texts, ll.KL())],
            keep_share=keep_share,
            of=of,
            test_keep=kept(test_prompt),
            test_drop=[(held_out, ll.KL())] if held_out else [],
            steps=steps,
            progress=not quiet,
        )
    repaired.adapter.save(out)
    console = Console()
    console.print(Text(f"\n{repaired.story()}\n"))
    console.print(repair_table(repaired))
    kept_gates = f"{int(repaired.kept.sum())} of {repaired.gate_count} {of}s"
    say(f"\nAdapter: {out.absolute()}, {kept_gates}")
