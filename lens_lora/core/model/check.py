"""Refuse a hooked model over which an adapter cannot be laid exactly.

`refuse_unusable` requires a decoder with a head, no random numbers, no adapter in the model
already, no code that was compiled in place, and every weight within reach. Weights that are split
over processes or quantised are judged by `extensions.refuse_unusable_weights`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lens_lora import compat
from lens_lora.compat import activation_checkpointing
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import extensions
from lens_lora.core.model.modules import modules_of
from lens_lora.errors import AdapterError, ArgumentError, ModelStateError

SKIP = "Pass check=False to go on without this check, at your own risk."

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# What the names of rates contain: attn_pdrop, layerdrop, router_jitter_noise, moe_jitter_eps, …
_PARTS_OF_RATES = ("drop", "jitter")


def refuse_unusable(model: nn.Module, modules: Mapping[nn.Module, str] | None = None) -> None:
    """Refuse a model over which no lens can be laid exactly.

    Args:
        model: a hooked model, or a Hugging Face model.
        modules: its `modules_of`, where they are known: a large model has thousands, and a walk
            over them takes milliseconds.

    Raises:
        ModelStateError: an encoder; random numbers in training; an adapter inside the model;
            compiled code; or weights that are out of reach, split over processes, or quantised by
            an unknown library.
    """
    _refuse_other_tasks(model)
    if modules is None:
        modules = modules_of(model)
    refuse_random_numbers(model, modules)
    compat.refuse_out_of_reach(modules)
    for module, name in modules.items():
        if type(module).__module__.startswith("peft."):
            raise ModelStateError(
                f"{name or type(module).__name__} already carries a PEFT adapter, which would be "
                "applied twice",
                remedy="let ll.load(peft_model) build it, and the PeftModel stays as it is.",
                in_shell="name the base alone with --model, not a folder that holds an adapter.",
            )
    refuse_compiled(modules)
    extensions.refuse_unusable_weights(model, modules)
    is_bridge = hasattr(model, "original_model")
    if is_bridge:
        extensions.refuse_unusable_bridge(model, modules)


def _refuse_other_tasks(model: nn.Module) -> None:
    """Refuse any model but a decoder with a language-model head."""
    hf_model: Any = getattr(model, "original_model", model)
    config = getattr(hf_model, "config", None)
    can_generate = getattr(hf_model, "can_generate", lambda: True)
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif not can_generate():
        kind = "no causal language model with a head"
    else:
        return
    raise ModelStateError(
        f"{type(hf_model).__name__} is {kind}, and a lens explains next-token logits of a decoder.",
        remedy="Pass a decoder: AutoModelForCausalLM.from_pretrained(base).",
        in_shell="Name a decoder with --model.",
    )


def refuse_compiled(modules: Mapping[nn.Module, str]) -> None:
    """Refuse modules that were compiled in place: compiled code runs the hooks of its first pass.

    `torch.compile(model)` does not do that: it leaves the model as it is, and returns a wrapper.
    """
    for module, name in modules.items():
        if compat.is_compiled_in_place(module):
            raise ModelStateError(
                f"{name or type(module).__name__} was compiled in place (compile()), and compiled "
                "code does not run hooks that are put on later.",
                remedy="Make the lens of a model that is not compiled; ll.load(hf_model, adapter) "
                "sets the compiled code aside.",
            )


def refuse_random_numbers(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Refuse a model in training mode that draws random numbers, so that no two runs agree.

    They may come from dropout, from noise on a router's input, or from experts or slopes that are
    drawn. The rate may be in a module of its own, in the module that draws, or only in the
    configuration.

    Raises:
        ModelStateError: such a model; the error names the module or the setting.
    """
    # A bridge stays in evaluation mode when `train` is called on a part, or on what it wraps.
    in_training = {module: name for module, name in modules.items() if module.training}
    if not in_training:
        return
    for module, name in in_training.items():
        # A module without a name is the model itself.
        place = f"{name}: " if name else ""
        if compat.samples_experts(module):
            raise _not_repeatable(f"{place}the choice of experts by chance")
        if isinstance(module, nn.RReLU):
            raise _not_repeatable(f"{place}a slope by chance")
        if isinstance(module, _DROPOUTS):
            if module.p > 0:
                raise _not_repeatable(f"{place}dropout {module.p}")
        else:
            _refuse_rates(place, vars(module))
    config = getattr(getattr(model, "original_model", None), "config", None)
    if config is not None:
        _refuse_rates("", config.to_dict())


def _refuse_rates(place: str, settings: Mapping[str, object]) -> None:
    """Refuse a rate above zero among these settings."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value > 0 and any(part in name for part in _PARTS_OF_RATES):
            raise _not_repeatable(f"{place}{name}={value}")


def _not_repeatable(what: str) -> ModelStateError:
    return ModelStateError(f"{what} is active, so no two runs agree; call model.eval().")


def refuse_checkpointing(modules: Iterable[nn.Module], *, once: bool) -> None:
    """Refuse blocks that transformers runs again in a backward pass, where that does harm.

    Reentrant checkpointing cuts the graph at each block, so that a derivative by something within
    it is zero. Any other one runs the block again, under the hooks that are on it then: a first
    derivative survives that, and no second one and none of several values at once.

    Args:
        modules: the model's.
        once: whether the graph is walked back once, for a first derivative, with hooks still on.

    Raises:
        ModelStateError: gradient checkpointing is on, and the model in training mode.
    """
    how = activation_checkpointing(modules)
    if how is None or (once and how != "reentrant"):
        return
    raise ModelStateError(
        f"gradient checkpointing ({how}) is on and the model in training mode, so blocks are run "
        "again on the way back, which these derivatives do not survive",
        remedy="Call model.eval(), in which no block is run again. lens.within(max_memory=…) "
        "bounds the memory of a backward pass.",
    )


# --- A lens's arguments


def require_kinds(adapter: object, hf_model: object) -> None:
    """Check the types of a lens's arguments."""
    require_adapter(adapter)
    if hf_model is not None and not isinstance(hf_model, nn.Module):
        raise ModelStateError(
            f"hf_model is a {type(hf_model).__name__}; pass the loaded base model: "
            "AutoModelForCausalLM.from_pretrained(base)."
        )


def require_check(check: object) -> None:
    """Refuse what is not True, False or None, such as 0, which is not read as False.

    Raises:
        ArgumentError: naming what was given.
    """
    if check is not None and not isinstance(check, bool):
        raise ArgumentError(f"check is {check!r}; expected True, False or None.")


def require_adapter(adapter: object) -> None:
    """Check that a lens can be made of it.

    Raises:
        AdapterError: it is no `Adapter`, naming what makes one of it.
    """
    if not isinstance(adapter, Adapter):
        remedy = "ll.Adapter.from_peft(…)"
        if isinstance(adapter, str | os.PathLike):
            remedy = f"ll.load_adapter({str(adapter)!r})"
        elif isinstance(getattr(adapter, "adapter", None), Adapter):
            remedy = "pass its own, result.adapter"
        raise AdapterError(
            f"the adapter is a {type(adapter).__name__}; LoraLens takes an ll.Adapter: {remedy}."
        )
