"""The first steps of `verify` and `card`: an adapter, its base if there is one, and their lens.

1. `read_given` reads the adapter. Its base is loaded if it is at hand, and must be if it was named
   by option.
2. `verification_of` verifies the adapter and what else was given. Files are compared before the
   lens is made (`LensMade`), because a lens may take the base over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lens_lora.cli import options, running
from lens_lora.cli.expecting import ExpectedMargin
from lens_lora.errors import AdapterError, LensLoraWarning, ModelStateError, heard_by
from lens_lora.formats.folders import stated_base

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from lens_lora.cli.running import Loaded
    from lens_lora.core import Adapter, LoraLens
    from lens_lora.ship.checks import Check
    from lens_lora.ship.verify import Verification


class Given(NamedTuple):
    """The adapter to be verified, and its base.

    Attributes:
        adapter: the adapter.
        notes: the warnings from reading it.
        loaded: the base and its tokenizer; None if there is no base.
        why_no_base: the reason, if there is no base.
    """

    adapter: Adapter
    notes: list[str]
    loaded: Loaded | None
    why_no_base: str


class Inputs(NamedTuple):
    """Everything that is verified besides the adapter itself.

    Attributes:
        merged: a folder or .gguf file that should be base plus adapter; None if none was given.
        lora: a .gguf file that should be the adapter; None if none was given.
        expectations: the margins that should hold.
        max_kl: the largest mean KL on neutral texts, in nats per token; None if there is no bound.
    """

    merged: Path | None
    lora: Path | None
    expectations: Sequence[ExpectedMargin]
    max_kl: float | None


def read_given(folder: Path, base: options.ModelOptions, progress: Console) -> Given:
    """Read the adapter, and its base if there is one; only a base named by option must load."""
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
        hf_model = None
        if loaded is not None:
            hf_model, _ = loaded
        adapter = load_adapter(folder, base=hf_model)
    if loaded is not None:
        _resize(loaded, adapter)
    return Given(adapter, [str(note) for note in notes], loaded, why_no_base)


def _resize(loaded: Loaded, adapter: Adapter) -> None:
    """Resize the base's embedding to the tokens that the adapter adds, as its training did.

    This is done only if the adapter decides every new row: it brings its own embedding and head,
    and a tokenizer in which every token of the base keeps its id.
    """
    from lens_lora.formats.tokenizers import rows_brought

    base: Any
    base, tokenizer = loaded
    paths = {id(module): name for name, module in base.named_modules()}
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    rows = rows_brought(adapter.modules, paths.get(id(embedding)))
    known = len(embedding.weight)
    if rows <= known:
        return
    is_tied = head is None or head.weight is embedding.weight
    if not is_tied and rows_brought(adapter.modules, paths[id(head)]) != rows:
        return
    if not _extends(adapter, tokenizer):
        return
    with running.quiet_libraries():
        base.resize_token_embeddings(rows, mean_resizing=False)
    running.say(f"Base:    resized from {known} to {rows} tokens, as the adapter brings them")


def _extends(adapter: Adapter, tokenizer: Any) -> bool:
    """Whether the adapter's own tokenizer has every token of the base's, with the same id."""
    from lens_lora.ship.merged_tokenizer import read_tokenizer

    if adapter.tokenizer_folder is None:
        return False
    own = read_tokenizer(adapter.tokenizer_folder)
    if own is None:
        return False
    return tokenizer.get_vocab().items() <= own.get_vocab().items()


def training_tokenizer(given: Given) -> Any:
    """Return the tokenizer with which the adapter was trained; None if it is not available."""
    from lens_lora.loading import tokenizer_beside

    if given.loaded is None:
        return None
    # If it does not fit the base, the check that makes the lens reports that.
    with contextlib.suppress(AdapterError, ModelStateError):
        return tokenizer_beside(given.adapter, *given.loaded).tokenizer
    return None


class LensMade:
    """A function that makes the lens and announces it; afterwards it has the lens as `lens`.

    Attributes:
        lens: the lens; None before it is made, and if it cannot be made.
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


# --- The checks


def verification_of(
    given: Given,
    lens_over: LensMade,
    inputs: Inputs,
    *,
    ask_server: Callable[[LoraLens], Sequence[Check]] | None = None,
    compare_parts: Callable[[LoraLens], Sequence[Check]] | None = None,
    progress: bool,
) -> Verification:
    """Verify the adapter, and everything else that was given.

    Args:
        given: the adapter and its base.
        lens_over: a function that makes the lens over both.
        inputs: what is verified besides the adapter.
        ask_server: a function that asks a server, which should answer as the lens does; None if
            there is no server.
        compare_parts: a function that compares the adapter with the parts of which it was combined;
            None if it is not a combination.
        progress: whether to show bars.
    """
    from lens_lora.ship.expectations import Expectation
    from lens_lora.ship.verify import verify

    base: PreTrainedModel | str = given.why_no_base
    if given.loaded is not None:
        base, _ = given.loaded
    with running.quiet_libraries():
        return verify(
            given.adapter,
            base,
            lens_over,
            merged=inputs.merged,
            lora=inputs.lora,
            tokenizer=training_tokenizer(given),
            expectations=[Expectation(*row) for row in inputs.expectations],
            max_kl=inputs.max_kl,
            notes=given.notes,
            ask_server=ask_server,
            compare_parts=compare_parts,
            progress=progress,
        )
