"""A base model from its name: a causal language model of Hugging Face and its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lens_lora.errors import ModelStateError
from lens_lora.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_base", "moved"]


def load_base(
    name: str, how: Placement | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder, or a hub id.
        how: its dtype, devices, quantisation and attention; by default float32 on the CPU.

    Raises:
        ModelStateError: no such folder, id or device, a model that transformers cannot read, or
            bitsandbytes or accelerate is needed and not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = how or Placement()
    _require_packages(how)
    if how.device is not None:
        moved(torch.empty(0), how.device)
    try:
        _ask_once(name)
        model = AutoModelForCausalLM.from_pretrained(name, **_options(how))
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelStateError(
            f"{name}: neither a folder nor a reachable hub id of a causal language model that "
            f"transformers can read ({error})."
        ) from error
    is_placed = how.device_map is not None or how.is_quantised
    return (model.eval() if is_placed else moved(model.eval(), how.device)), tokenizer


def moved(model: Any, device: str | torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """The model itself, on this device and in this dtype.

    Args:
        model: a Hugging Face model, or a tensor.
        device: such as 'cuda'; None for the device that it is on.
        dtype: None for its own.

    Raises:
        ModelStateError: this machine has no such device, or the model cannot be moved.
    """
    if device is None and dtype is None:
        return model
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch, or transformers
        asked = " and ".join(str(of) for of in (device, dtype) if of is not None)
        what = f"the device {str(device)!r} cannot be used" if dtype is None else f"not to {asked}"
        raise ModelStateError(f"{what}: {str(error).splitlines()[0]}") from error


def _options(how: Placement) -> dict[str, Any]:
    dtype = how.weights
    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "attn_implementation": how.attn,
    }
    if how.device_map is not None or how.is_quantised:
        options["device_map"] = how.device_map or {"": how.device or "cpu"}
    if how.is_quantised:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=how.load_in_4bit,
            load_in_8bit=how.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if dtype == "auto" else options["dtype"],
        )
    return options


def _ask_once(name: str) -> None:
    """Fetch the config of a hub id, at one attempt; transformers makes several for each file.

    Raises:
        OSError, ValueError: the hub cannot be reached, or has no such model.
    """
    from huggingface_hub import snapshot_download

    if not Path(name).exists():
        snapshot_download(name, allow_patterns=["config.json"])


def _require_packages(how: Placement) -> None:
    needed = {
        "bitsandbytes": ("load_in_4bit and load_in_8bit", how.is_quantised),
        "accelerate": ("device_map", how.device_map is not None or how.is_quantised),
    }
    for package, (what, is_needed) in needed.items():
        if is_needed and importlib.util.find_spec(package) is None:
            raise ModelStateError(
                f"{what} needs the package {package}, which is not installed: "
                f"pip install {package}."
            )
