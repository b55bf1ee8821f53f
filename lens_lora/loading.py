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
from lens_lora.base_model import load_base, moved
from lens_lora.demonstration import shipped_adapter
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.hooked.host_build import (
    Kind,
    bridge_if_there,
    hooked_model,
    hooked_transformer_if_there,
    transformer_lens_version,
)
from lens_lora.hooked.host_check import refuse_unusable
from lens_lora.lens import LoraLens
from lens_lora.placement import Attention, DeviceMap, Placement
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
    "quiet_libraries",
    "transformer_lens_version",
]


def load(
    model: str | Path | PreTrainedModel | None,
    adapter: str | Path | Adapter,
    *,
    kind: Kind | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn: Attention = "eager",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoraLens:
    """The lens over a base model and an adapter, each by name or already loaded.

    Two short forward passes verify the hooked model against the base.

    Args:
        model: a hub id, a folder, or a loaded Hugging Face model, which you must not change
            afterwards; None for the base that the adapter names.
        adapter: a hub id, a folder, or an `Adapter`.
        kind: the class of hooked model; by default TransformerBridge if it is installed. What is
            quantised or lies on several devices needs a TransformerBridge.
        dtype: of the weights: a torch dtype, its name, or 'auto' for the checkpoint's own. By
            default a loaded model's own, float32 on the CPU, and 'auto' elsewhere.
        device: such as 'cuda'; by default the CPU, or the device of a loaded model.
        device_map: 'auto', 'balanced', or {module: device}: over several devices, by accelerate.
        load_in_4bit: linear modules quantised to NF4 by bitsandbytes (`docs/your_model.md`).
        load_in_8bit: … to 8 bit.
        attn: 'eager'; or 'sdpa', which keeps no [head, query, key] and shows no patterns.
        tokenizer: by default the one saved with the model.

    Raises:
        ArgumentError: options that exclude each other, or a loaded model beside `device_map`,
            `load_in_4bit`, `load_in_8bit` or `attn`.
        AdapterError: the adapter cannot be read, or its shapes do not fit the model.
        SiteError: the adapter names a module that the model lacks.
        ModelStateError: the model cannot be loaded, or no exact lens is possible; names the remedy.
    """
    chosen = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    how = Placement(
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        device=None if device is None else str(device),
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        attn=attn,
    )
    base, own = _base(model, chosen, how, tokenizer)
    hooked, made = hooked_model(base, own, kind=kind or bridge_if_there(), attn=attn)
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
    how: Placement,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, in evaluation mode, and its tokenizer."""
    if isinstance(model, str | Path):
        return load_base(str(model), how)
    if model is None:
        return _named_base(adapter, how)
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ModelStateError(
            f"the model is a {type(model).__name__}; pass a hub id, a folder or a loaded Hugging "
            "Face model. For a hooked model: LoraLens(model, adapter)."
        )
    if how.says_how_to_load:
        raise ArgumentError(
            "device_map, load_in_4bit, load_in_8bit and attn say how a model is loaded, and this "
            "one is loaded already; pass its name, or load it so yourself: "
            "AutoModelForCausalLM.from_pretrained(name, device_map=…)."
        )
    base = cast("PreTrainedModel", model.eval())
    refuse_unusable(base)
    dtype = None if how.dtype in (None, "auto") else getattr(torch, how.dtype)
    return moved(base, how.device, dtype), tokenizer or _tokenizer_of(base)


def _named_base(
    adapter: Adapter, how: Placement
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if adapter.base_model is None:
        raise ModelStateError(
            f"the adapter {adapter.name} names no base model; pass it as the first argument."
        )
    try:
        return load_base(adapter.base_model, how)
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
