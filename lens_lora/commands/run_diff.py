"""What `lens-lora diff` does once its options are checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import load_adapter
from lens_lora.analyses.what_changed import what_changed
from lens_lora.commands.loading import announce, lens_for, shipped_adapter
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say
from lens_lora.loading import quiet_libraries
from lens_lora.show.tables.what_changed import what_changed_tables

__all__ = ["run"]


def run(
    subject: Subject,
    unrelated: Sequence[Path],
    texts: Sequence[str] | None,
    out: tuple[Path, Path | None],
    progress: Console,
    *,
    nulls: int,
    split: bool,
) -> None:
    """Print a summary, and write the page and the numbers.

    Args:
        subject: the adapter and the model.
        unrelated: folders of other adapters.
        texts: the caller's; None for those that come with the package.
        out: the page, and the numbers.
        progress: where progress is shown.
        nulls, split: as for `what_changed`.
    """
    started = time.perf_counter()
    adapter = load_adapter(subject.adapter or shipped_adapter())
    others = [load_adapter(folder) for folder in unrelated]
    lens = lens_for(subject, adapter, "cpu", progress)
    announce(lens)
    with quiet_libraries():
        found = what_changed(
            lens,
            None if texts is None else list(texts),
            others,
            nulls=nulls,
            split=split,
            progress=not progress.quiet,
        )
    console = Console()
    for paragraph in found.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    console.print(what_changed_tables(found))
    report, numbers = out
    say(f"\nReport: {found.save_report(report).absolute()}")
    if numbers is not None:
        if numbers.suffix == ".csv":
            found.to_frame().to_csv(numbers, index=False)
        else:
            found.save(numbers)
        say(f"Numbers: {numbers.absolute()}")
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)
