"""What `lens-lora repair` does once its options are checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.repair import repair
from lens_lora.commands.loading import announce, lens_for, shipped_adapter
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say
from lens_lora.loading import quiet_libraries
from lens_lora.readouts.answers import margin_between
from lens_lora.readouts.divergence import KL
from lens_lora.show.tables.parts import filled_table
from lens_lora.show.text import percent

__all__ = ["Behaviours", "run"]


class Behaviours(NamedTuple):
    """What is kept and what is dropped, given and held out."""

    prompts: Sequence[str]
    doc: str
    pre: str
    texts: Sequence[str]
    test_prompts: Sequence[str]
    test_texts: Sequence[str]


def run(
    subject: Subject,
    asked: Behaviours,
    out: Path,
    keep_share: float,
    of: Literal["rank", "site"],
    steps: int,
    progress: Console,
) -> None:
    """Repair, print what it kept and left, and save the adapter.

    Args:
        subject: the adapter and the model.
        asked: what is kept and dropped.
        out, keep_share, of, steps: as the options of the same names.
        progress: where progress is shown.
    """
    lens = lens_for(subject, load_adapter(subject.adapter or shipped_adapter()), "cpu", progress)
    announce(lens)

    def keeps(prompts: Sequence[str]) -> list[Any]:
        ready = lens.prompts(list(prompts))
        return [(ready, margin_between(lens.model, asked.doc, asked.pre, ready))]

    has_tests = bool(asked.test_prompts)
    with quiet_libraries():
        found = repair(
            lens,
            keep=keeps(asked.prompts),
            drop=[(list(asked.texts), KL())],
            keep_share=keep_share,
            of=of,
            test_keep=keeps(asked.test_prompts) if has_tests else [],
            test_drop=[(list(asked.test_texts), KL())] if has_tests else [],
            steps=steps,
            progress=not progress.quiet,
        )
    console = Console()
    console.print(Text(f"\n{found.story()}\n"))
    frame: list[dict[str, Any]] = found.to_frame().to_dict("records")
    rows = [
        (
            str(row["question"]),
            f"{row['kind']}{', held out' if row['held out'] else ''}",
            str(row["adapter"]),
            f"{row['value']:.3g}",
            percent(row["share"]),
        )
        for row in frame
    ]
    heads = ("question", "kind", "adapter", "value", "kept or left")
    console.print(filled_table("What stays of each", heads, rows, texts=(0, 1, 2)))
    found.adapter.save(out)
    say(f"\nAdapter: {out.absolute()}, {int(found.kept.sum())} of {found.gate_count} {of}s")
