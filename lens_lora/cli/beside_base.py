"""An adapter that is verified: read over its base if that is at hand, with the lens over it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lens_lora.cli import options, running
from lens_lora.errors import AdapterError, LensLoraWarning, ModelStateError, heard_by
from lens_lora.formats.folders import stated_base

if TYPE_CHECKING:
    from rich.console import Console

    from lens_lora.cli.running import Loaded
    from lens_lora.core import Adapter, LoraLens


class Given(NamedTuple):
    """The adapter that is verified, and the base that it names.

    Attributes:
        adapter: as it was read.
        notes: what reading it warned of.
        loaded: the base and its tokenizer; None if there is none.
        why_no_base: the reason if there is none.
    """

    adapter: Adapter
    notes: list[str]
    loaded: Loaded | None
    why_no_base: str


def read_given(folder: Path, base: options.ModelOptions, progress: Console) -> Given:
    """Read the adapter, over its base if there is one; only a base that was asked for must load."""
    from lens_lora.core import load_adapter

    named = stated_base(folder)
    loaded = None
    why_no_base = "the adapter names none; name it with --model"
    try:
        if named or base.model:
            loaded = running.load_model_of(named, progress, base)
    except ModelStateError as error:
        if base.model is not None:
            raise
        why_no_base = str(error)

    notes: list[LensLoraWarning] = []
    with heard_by(notes.append):
        adapter = load_adapter(folder, base=None if loaded is None else loaded[0])
    return Given(adapter, [str(note) for note in notes], loaded, why_no_base)


def training_tokenizer(given: Given) -> Any:
    """The tokenizer that the adapter was trained with; None if it is not at hand."""
    from lens_lora.loading import tokenizer_beside

    if given.loaded is None:
        return None
    # Where it does not fit the base, the check that makes the lens says so.
    with contextlib.suppress(AdapterError, ModelStateError):
        return tokenizer_beside(given.adapter, *given.loaded).tokenizer
    return None


class LensMade:
    """Makes the lens when it is called, announces it, and keeps it.

    Attributes:
        lens: None before it is made, and if it cannot be made.
    """

    def __init__(
        self,
        base: options.ModelOptions,
        given: Given,
        progress: Console,
        *,
        is_announced: bool = True,
    ) -> None:
        self.lens: LoraLens | None = None
        self._is_announced = is_announced
        self._base = base
        self._given = given
        self._progress = progress

    def __call__(self) -> LoraLens:
        """Make the lens."""
        loaded = self._given.loaded
        lens = running.lens_for(self._base, self._given.adapter, self._progress, loaded=loaded)
        self.lens = running.announced(lens) if self._is_announced else lens
        return self.lens
