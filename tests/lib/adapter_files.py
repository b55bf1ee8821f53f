"""Adapters that PEFT saved, ways to spoil them, and what PEFT makes of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import models
import peft
import torch
from safetensors.torch import load_file, save_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def peft_of(family: str = "llama", dtype: torch.dtype = torch.float64, **config) -> peft.PeftModel:
    """A random LoRA on a tiny model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return models.peft_model(family, models.hf_model(family, dtype=dtype), **config)


def saved(model: peft.PeftModel, folder: Path, **options) -> Path:
    """Let PEFT save the adapter; return the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def set_config(folder: Path, **fields) -> None:
    """Replace fields of the config."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **fields}))


def set_fields(file: Path, **fields) -> None:
    """Replace fields of a JSON file; those that are None are removed."""
    stated = {**json.loads(file.read_text()), **fields}
    kept = {name: value for name, value in stated.items() if value is not None}
    file.write_text(json.dumps(kept))


def rename_keys(folder: Path, rename) -> None:
    """Store every tensor under the key that `rename` gives it."""
    tensors = load_file(folder / WEIGHTS)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)


def deltas(model: torch.nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """PEFT's own ΔW by module path, [out, in]: the oracle."""
    found: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer) or name not in module.scaling:
            continue
        delta = module.get_delta_weight(name).detach()
        if type(module.base_layer).__name__ == "Conv1D":
            # Its weight is [in, out].
            delta = delta.T
        found[path.removeprefix("base_model.model.")] = delta
    return found


def assert_is(adapter, expected: dict[str, torch.Tensor]) -> None:
    """Check that the adapter has the same modules, and each the expected ΔW."""
    assert set(adapter.modules) == set(expected)
    for path, factors in adapter.modules.items():
        assert expected[path].abs().max() > 0.01
        torch.testing.assert_close(factors.materialise(), expected[path], rtol=0, atol=1e-12)
