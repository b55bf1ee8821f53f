"""The adapter of a live PeftModel: LoRA from its tensors, other methods by running their layers.

A folder of a method other than LoRA becomes a live PeftModel first: PEFT lays it over the base.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lens_lora.compat import is_memory_short, without_warnings
from lens_lora.core import ModuleUpdate
from lens_lora.core.adapter import (
    base_of,
    extensions,
    is_plain_lora,
    refuse_variants,
    refuse_without_delta,
    renamed,
)
from lens_lora.errors import AdapterError, ArgumentError, is_of_the_system, located, warn
from lens_lora.formats.live_layers import configs_and_base, updates_of_layers
from lens_lora.formats.measured import measured_updates, twin

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@extensions.live_updates.provide
def live_updates(
    peft_model: PeftModel, adapter_name: str
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """The updates of one adapter of a live model, and the base that it names."""
    return _updates_and_base(peft_model, adapter_name, base=None)


@extensions.updates_over_base.provide
def updates_over_base(
    folder: Path, config: PeftConfig, base_for: Callable[[str | None], nn.Module]
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """The updates of a folder that PEFT lays over its base, and the name of that base.

    `base_for` is called with the name in the config, once it is known that the method has a ΔW. The
    base is not changed: PEFT works on copies of its modules and parameters over the same memory.
    """
    with located(folder):
        refuse_without_delta(config)
        name = base_of(config)  # before PEFT writes the name of this base there
        base = base_for(name)
        _require_plain(base)
        model = _laid_over(folder, config, base)
        updates, _ = _updates_and_base(model, "default", base)
        return updates, name


def _updates_and_base(
    model: Any, adapter_name: str, base: Any
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """The updates by module path, and the base that the config names.

    Args:
        model: a model with the adapter live in it.
        adapter_name: one of its adapters.
        base: the true base; None for the base that the model holds.
    """
    configs, live = configs_and_base(model)
    if not isinstance(adapter_name, str) or adapter_name not in configs:
        names = sorted(configs)
        raise AdapterError(f"the PeftModel has no adapter {adapter_name!r}; it has {names}.")
    config = configs[adapter_name]
    source = f"PeftModel[{adapter_name!r}]"
    notes: list[str] = []
    with located(source):
        if is_plain_lora(config):
            refuse_variants(config)
            updates = updates_of_layers(live, adapter_name, config)
        else:
            updates = measured_updates(model, adapter_name, config, base)
        if not updates:
            raise AdapterError("no layer of the model has this adapter, or it changes nothing.")
        modules = renamed(updates, notes)
        base_name = base_of(config)
    for note in notes:
        warn(f"{source}: {note}.")
    return modules, base_name


# --- A folder over its base


def _require_plain(base: Any) -> None:
    """Refuse a base that PEFT or transformer-lens has changed, or that is no model."""
    inside = base.modules() if isinstance(base, nn.Module) else ()
    packages = {type(module).__module__.partition(".")[0] for module in inside}
    if not hasattr(base, "config") or packages & {"peft", "transformer_lens"}:
        raise ArgumentError(
            f"base is a {type(base).__name__}; expected a Hugging Face model that neither PEFT nor "
            "transformer-lens has changed: AutoModelForCausalLM.from_pretrained(name)."
        )


def _laid_over(folder: Path, config: PeftConfig, base: Any) -> Any:
    """A PeftModel of a copy of the base, which shares its memory, with the folder's tensors."""
    from peft import get_peft_model

    try:
        # PEFT draws random initial values before it loads the tensors of the file.
        with without_warnings(), torch.random.fork_rng([]):
            model = get_peft_model(twin(base), config)
            keys = model.load_adapter(str(folder), "default", torch_device="cpu")
    except Exception as error:
        if is_of_the_system(error) or is_memory_short(error):
            raise
        # PEFT raises these two if a module is missing or a shape differs.
        is_misfit = isinstance(error, ValueError | RuntimeError)
        remedy = "is that the base it was trained on?" if is_misfit else ""
        raise AdapterError(
            f"PEFT cannot lay it over this {type(base).__name__} ({type(error).__name__}: {error})",
            remedy=remedy,
        ) from error
    missing = _not_loaded(model, keys.missing_keys)
    unknown = keys.unexpected_keys
    if missing or unknown:
        raise AdapterError(
            f"{len(missing)} tensors are missing from the file, and {len(unknown)} in it "
            f"belong to no module of this base: {[*missing, *unknown][:3]}."
        )
    return model


def _not_loaded(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """The keys whose tensor was not loaded; a shared one may have been loaded under another key."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(parameter) for key, parameter in parameters.items() if key not in keys}
    return [key for key in keys if id(parameters.get(key)) not in loaded]
