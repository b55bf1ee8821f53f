"""Saved adapters, to be spoiled, and what PEFT makes of them."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import models
import peft
import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_of(family: str = "llama", dtype: torch.dtype = torch.float64, **config) -> peft.PeftModel:
    """A random LoRA on a tiny model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.peft_model(family, models.hf_model(family, dtype=dtype), **config)


def saved(model: peft.PeftModel, folder: Path) -> Path:
    """The folder, as PEFT writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def set_config(folder: Path, **fields) -> None:
    """Fields of the config replaced."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rename_keys(folder: Path, rename) -> None:
    """Every tensor under the key that `rename` gives it."""
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def deltas(model: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own ΔW by module path, [out, in]: the oracle."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and name in module.scaling:
            delta = module.get_delta_weight(name)
            is_conv = type(module.base_layer).__name__ == "Conv1D"
            found[path.removeprefix("base_model.model.")] = (delta.T if is_conv else delta).detach()
    return found


def assert_is(adapter, expected: dict[str, torch.Tensor]) -> None:
    """The adapter's ΔW are the expected ones, of the same modules."""
    assert set(adapter.modules) == set(expected)
    for path, factors in adapter.modules.items():
        assert expected[path].abs().max() > 0.01
        torch.testing.assert_close(factors.materialise(), expected[path], rtol=0, atol=1e-12)


def applied_by_peft(folder: Path, family: str = "llama") -> set[str]:
    """The modules that PEFT gives an update when it loads the folder."""
    base = models.hf_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    return {path for path, delta in deltas(model).items() if bool(delta.any())}
