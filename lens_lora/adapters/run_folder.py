"""A trainer's run folder: its `checkpoint-<step>` folders, by their steps. Loads no torch."""

from __future__ import annotations

import re
from pathlib import Path

from lens_lora.adapters.peft_files import require_files
from lens_lora.errors import AdapterError

__all__ = ["checkpoint_folders"]

_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folders(run: str | Path) -> dict[int, Path]:
    """{step: folder}, increasing. Other folders are left alone.

    Args:
        run: the folder that a trainer wrote.

    Raises:
        AdapterError: no such folder, fewer than two checkpoints, or one without an adapter's files.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder.")
    found = {
        int(match[1]): path
        for path in folder.iterdir()
        if path.is_dir() and (match := _NAME.fullmatch(path.name))
    }
    if len(found) < 2:
        raise AdapterError(
            f"{folder} holds {len(found)} folders checkpoint-<step>; a training is read from two "
            "or more (save_steps of transformers' TrainingArguments sets how many are written)."
        )
    for path in found.values():
        require_files(path)
    return dict(sorted(found.items()))
