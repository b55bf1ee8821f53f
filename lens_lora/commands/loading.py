"""What the commands share once their options are checked: loading a model and an adapter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lens_lora.adapters.adapter import Adapter
from lens_lora.commands.options import Subject
from lens_lora.commands.terminal import say
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import LensLoraError
from lens_lora.lens import LoraLens
from lens_lora.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lens_lora.loading import Kind

__all__ = [
    "announce",
    "lens_for",
    "lens_over",
    "load_model",
    "load_model_of",
    "shipped_adapter",
    "step",
]

EMBEDDED = "embedded"


@contextlib.contextmanager
def step(message: str, progress: Console) -> Generator[None]:
    """A spinner on a terminal, else one line; the libraries' own output is hidden."""
    from lens_lora.loading import quiet_libraries

    if not progress.is_terminal:
        progress.print(message)
    with progress.status(message), quiet_libraries():
        yield


def load_model(
    model: str | None, progress: Console, how: Placement | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of this hub id or folder; the embedded model for None or 'embedded'."""
    from lens_lora.base_model import load_base
    from lens_lora.demonstration.embedded import EMBEDDED_NAME, embedded_model_folder

    if model not in (None, EMBEDDED):
        with step(f"Loading {model}", progress):
            return load_base(model, how)
    folder = embedded_model_folder(quiet=progress.quiet)
    with step(f"Loading {EMBEDDED_NAME}", progress):
        return load_base(str(folder), how)


def load_model_of(
    adapter: Adapter, model: str | None, progress: Console, how: Placement | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model asked for, else the base that the adapter names, else the embedded model.

    Raises:
        LensLoraError: as loading raises it; for the base that the adapter names, with a remedy.
    """
    from lens_lora.demonstration.embedded import EMBEDDED_HUB_ID

    named = adapter.base_model
    if model is not None:
        _note_other_base(EMBEDDED_HUB_ID if model == EMBEDDED else model, named, progress)
        return load_model(model, progress, how)
    if named in (None, EMBEDDED_HUB_ID):
        return load_model(None, progress, how)
    try:
        return load_model(named, progress, how)
    except LensLoraError as error:
        raise type(error)(
            f"{error} The adapter names it as its base; name another with --model."
        ) from error


def _note_other_base(model: str, named: str | None, progress: Console) -> None:
    """A note where the last parts of the two names differ: weights do not show a wrong base."""
    if named and Path(named).name.lower() != Path(model).name.lower():
        note = f"Note: the adapter names the base {named}, and --model is {model}; is that meant?"
        progress.print(Text(note, style="yellow"), soft_wrap=True)


def lens_over(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    progress: Console,
    *,
    kind: Kind | None = None,
    attn: str = "eager",
) -> LoraLens:
    """The lens over a hooked model of the base.

    Args:
        kind: the hooked model's class; by default HookedTransformer if TransformerLens has it. The
            numbers printed in the documentation were computed with it.
        attn: 'sdpa' for a TransformerBridge without attention patterns.
    """
    from lens_lora.loading import base_beside, hooked_model, hooked_transformer_if_there

    with step("Building the hooked model", progress):
        chosen = kind or hooked_transformer_if_there()
        model, made = hooked_model(hf_model, tokenizer, kind=chosen, attn=attn)
    return LoraLens(model, adapter, hf_model=base_beside(made, hf_model, adapter))


def lens_for(subject: Subject, adapter: Adapter, device: str, progress: Console) -> LoraLens:
    """The lens over the model that the options name.

    Args:
        subject: what the options name.
        adapter: the adapter, read.
        device: where to run if the options name no device.
        progress: where progress is shown.

    Raises:
        LensLoraError: what loading the model or making the lens raises.
    """
    how, kind = subject.how, None if subject.model_class is None else subject.model_class.value
    if how.says_how_to_load:
        kind = kind or "TransformerBridge"
    if how.device is None and how.device_map is None:
        how = dataclasses.replace(how, device=device)
    base, tokenizer = load_model_of(adapter, subject.model, progress, how)
    lens = lens_over(base, tokenizer, adapter, progress, kind=kind, attn=how.attn)
    return lens.within(subject.max_memory)


def announce(lens: LoraLens) -> None:
    """Print which model and which adapter are used."""
    from lens_lora.loading import transformer_lens_version

    about, adapter = lens.describe(), lens.adapter
    say(
        f"Model:   {about['model']} as {lens.class_name} of transformer-lens "
        f"{transformer_lens_version()}, {about['dtype']}"
    )
    ranks = ", ".join(str(r) for r in sorted({site.rank for site in lens.sites}))
    base = f", trained on {adapter.base_model}" if adapter.base_model else ""
    say(f"Adapter: {adapter.name}, {len(adapter)} modules of rank {ranks}{base}")
