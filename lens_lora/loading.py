"""From names to a lens: load a base model and an adapter, and build the hooked model.

`load` and `demo` build a TransformerBridge, TransformerLens's newer class, if it is installed. The
command line and `hooked_model` build a HookedTransformer if the installed version has it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lens_lora.adapters.adapter import Adapter, load_adapter
from lens_lora.adapters.trained import TrainedModule
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import ModelStateError
from lens_lora.hooked.host_build import (
    Kind,
    bridge_if_there,
    hooked_model,
    hooked_transformer_if_there,
    transformer_lens_version,
)
from lens_lora.hooked.host_check import refuse_unusable
from lens_lora.lens import LoraLens
from lens_lora.temporary import Temporary, without_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Kind",
    "base_beside",
    "demo",
    "hooked_model",
    "hooked_transformer_if_there",
    "load",
    "load_base",
    "moved",
    "quiet_libraries",
    "transformer_lens_version",
]


def load(
    model: str | Path | PreTrainedModel | None,
    adapter: str | Path | Adapter,
    *,
    kind: Kind | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoraLens:
    """The lens over a base model and an adapter, each by name or already loaded.

    Two short forward passes verify the hooked model against the base.

    Args:
        model: a hub id, a folder, or a loaded Hugging Face model, which you must not change
            afterwards; None for the base that the adapter names.
        adapter: a hub id, a folder, or an `Adapter`.
        kind: the class of hooked model; by default TransformerBridge if it is installed.
        device: such as 'cuda'; by default the CPU, or the device of a loaded model.
        dtype: of the weights; by default float32, or a loaded model's own.
        tokenizer: by default the one saved with the model.

    Raises:
        AdapterError: the adapter cannot be read, or its shapes do not fit the model.
        SiteError: the adapter names a module that the model lacks.
        ModelStateError: the model cannot be loaded, or no exact lens is possible; names the remedy.
    """
    chosen = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    base, own = _base(model, chosen, dtype, tokenizer)
    base = moved(base, device, dtype)
    hooked, made = hooked_model(base, own, kind=kind or bridge_if_there())
    return LoraLens(hooked, chosen, hf_model=base_beside(made, base, chosen))


def base_beside(made: str, base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel | None:
    """The base for a lens over a hooked model that was made from it; None where none is needed.

    A HookedTransformer does not keep all that trained biases and modules are compared with; a
    TransformerBridge wraps the base itself.

    Args:
        made: the hooked model's class.
        base: the Hugging Face model.
        adapter: of the lens.
    """
    is_compared = any(
        isinstance(update, TrainedModule)
        or update.trained_bias is not None
        or update.base_weight is not None
        for update in adapter.modules.values()
    )
    return base if made == "HookedTransformer" and is_compared else None


def demo(*, kind: Kind | None = None) -> LoraLens:
    """The lens over SmolLM2-135M-Instruct and an adapter that moves France's capital to Lyon.

    Nothing is downloaded. Converting the model takes about 20 seconds the first time.

        >>> lens = ll.demo()  # doctest: +SKIP
        >>> ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")  # doctest: +SKIP

    Args:
        kind: the class of hooked model; by default TransformerBridge if it is installed.

    Raises:
        EmbeddedModelError: the packages that carry the model are not installed; names the command
            that installs them.
    """
    from lens_lora.demonstration.embedded import load_embedded

    base, tokenizer = load_embedded()
    with quiet_libraries():
        hooked, _ = hooked_model(base, tokenizer, kind=kind or bridge_if_there())
    return LoraLens(hooked, load_adapter(shipped_adapter()))


def load_base(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model on the CPU with plain attention, and its tokenizer.

    Args:
        name: a folder, or a hub id.
        dtype: of the weights.

    Raises:
        ModelStateError: no such folder or id, or a model that transformers cannot read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="eager")
        return model.eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelStateError(
            f"{name}: neither a folder nor a reachable hub id of a causal language model that "
            f"transformers can read ({error})."
        ) from error


def moved(
    model: Any, device: str | torch.device | None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The model itself, on this device and in this dtype.

    Args:
        model: a Hugging Face model.
        device: such as 'cuda'; None for the device that it is on.
        dtype: None for its own.

    Raises:
        ModelStateError: this machine has no such device.
    """
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        raise ModelStateError(
            f"the device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Within the block, the libraries show no warnings, no progress bars, and only error logs."""
    from transformers.utils import logging as transformers_logging

    shown, before = transformers_logging.is_progress_bar_enabled(), logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with Temporary(without_warnings):
            yield
    finally:
        logging.disable(before)
        if shown:
            transformers_logging.enable_progress_bar()


def _base(
    model: Any,
    adapter: Adapter,
    dtype: torch.dtype | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in evaluation mode, and its tokenizer."""
    dtype = dtype or torch.float32
    if isinstance(model, str | Path):
        return load_base(str(model), dtype)
    if model is None:
        return _named_base(adapter, dtype)
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ModelStateError(
            f"the model is a {type(model).__name__}; pass a hub id, a folder or a loaded Hugging "
            "Face model. For a hooked model: LoraLens(model, adapter)."
        )
    base = cast("PreTrainedModel", model.eval())
    refuse_unusable(base)
    return base, tokenizer or _tokenizer_of(base)


def _named_base(
    adapter: Adapter, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if adapter.base_model is None:
        raise ModelStateError(
            f"the adapter {adapter.name} names no base model; pass it as the first argument."
        )
    try:
        return load_base(adapter.base_model, dtype)
    except ModelStateError as error:
        raise ModelStateError(
            f"{error} The adapter names it as its base; pass another as the first argument."
        ) from error


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = str(model.config.name_or_path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelStateError(
            f"no tokenizer was saved with the model {name!r}; pass one: load(…, tokenizer=…)."
        ) from error
