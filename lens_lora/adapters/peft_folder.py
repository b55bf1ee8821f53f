"""An adapter's folder: where it lies, and what its two files hold.

PEFT reads the files. Pickled weights are refused, nothing is unpickled; a folder of another kind is
refused by name of what it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens_lora.adapters.peft_files import (
    CONFIG,
    MLX_WEIGHTS,
    WEIGHTS,
    mlx,
    refuse_pointer,
    require_files,
    stated_fields,
    unreadable,
)
from lens_lora.adapters.peft_variants import refuse_other_kinds
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.families import FAMILIES

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["read_files", "warn_of_cuts"]


def read_files(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """(config, tensors by key) of an adapter on disk, as PEFT reads them.

    Args:
        folder: with the two files.

    Raises:
        AdapterError: a file is missing, pickled, cut short or of another format.
        UnsupportedAdapterError: not LoRA, or a switch that the installed PEFT does not know.
    """
    require_files(folder)
    return _read_config(folder), _read_tensors(folder)


def warn_of_cuts(folder: Path, config: Any, paths: Iterable[str]) -> None:
    """Warn where PEFT seems to have left modules out of the file when it was saved.

    Of a model with several adapters PEFT saves no module whose path contains another one's name.

    Args:
        folder: of the adapter.
        config: PEFT's config of it.
        paths: the modules that the file has.
    """
    parts = {part for path in paths for part in path.split(".")}
    cut = [name for name in _neighbours(folder) if name in _module_parts() and name not in parts]
    targets = config.target_modules if isinstance(config.target_modules, set | list) else ()
    empty = sorted(
        target
        for target in targets
        if not any(path == target or path.endswith(f".{target}") for path in paths)
    )
    if cut:
        why = f"another adapter saved with it is called {cut[0]!r}, as a part of module paths is"
    elif empty:
        why = f"the config targets {', '.join(empty[:4])}, and the file has no factors there"
    else:
        return
    warnings.warn(
        f"{folder}: modules may be missing from the file: {why}. PEFT leaves out every module "
        "whose path contains another adapter's name. Compare with the model that was trained: "
        "ll.Adapter.from_peft(peft_model, adapter_name).",
        stacklevel=4,
    )


def _neighbours(folder: Path) -> list[str]:
    """Names of the adapters that PEFT saved with this one: in folders beside it, or inside."""
    lies = (*folder.glob(f"*/{CONFIG}"), *folder.resolve().parent.glob(f"*/{CONFIG}"))
    return sorted({path.parent.name for path in lies} - {folder.resolve().name})


def _module_parts() -> set[str]:
    """Every name that stands between two dots in some family's module paths; layers by number."""
    paths = [f"{family.layer}.{name}" for family in FAMILIES for name in family.linears]
    return {part for path in paths for part in path.split(".")} | {str(n) for n in range(256)}


def _read_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    refuse_pointer(folder / CONFIG)
    fields = stated_fields(folder)
    if "peft_type" not in fields:
        if (folder / MLX_WEIGHTS).is_file() or "lora_parameters" in fields:
            raise mlx(folder)
        raise AdapterError(
            f"{folder / CONFIG}: `peft_type` is missing, so PEFT cannot read it. If it is a LoRA "
            'that PEFT trained, add "peft_type": "LORA"; if another tool wrote it, convert it.'
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise unreadable(folder, error) from error
    refuse_other_kinds(config, str(folder))
    for field, value in fields.items():
        is_set = value is True or (isinstance(value, list | dict) and value)
        if is_set and not hasattr(config, field):
            raise UnsupportedAdapterError(
                f"{folder / CONFIG}: {field}={value!r} is unknown to the installed peft, which "
                "would ignore it; upgrade peft to the version that saved the adapter "
                f"({fields.get('peft_version', 'not stated')})."
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise AdapterError(
            f"{folder / WEIGHTS}: not a whole safetensors file ({type(error).__name__}: {error})."
        ) from error
    return {key: tensor.clone() for key, tensor in tensors.items()}  # not the mapped file itself
