"""The two files of an adapter in PEFT's format: its config and its tensors.

PEFT reads both. Nothing is unpickled, and nothing is fetched: `formats/folders.py` finds the
folder. Switches that the installed PEFT does not know, and would ignore, are refused.

Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_lora.core.adapter import formats
from lens_lora.errors import AdapterError, UnsupportedAdapterError, warn
from lens_lora.families import FAMILIES

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor

CONFIG, WEIGHTS = formats.PEFT_FILES
MLX_WEIGHTS = "adapters.safetensors"
# A folder with any of these files has a tokenizer, or a chat template, of its own.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)
# The folders in which a trainer keeps the checkpoints of a run.
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# Layer numbers that a module path may hold. A folder with a larger number is no layer's namesake.
_LAYER_NUMBERS = 256


def name_of(folder: Path) -> str:
    """The name of an adapter that lies in this folder.

    The hub's cache keeps a repository as `models--owner--name/snapshots/commit`; an adapter at the
    top of one has the repository's name. Every run has a checkpoint-40, so the name of such a
    folder begins with that of its run.
    """
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    run = folder.absolute().parent
    if run.name and _CHECKPOINT.fullmatch(folder.name):
        return f"{name_of(run)}/{folder.name}"
    return folder.name or str(folder)


def own_tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer, or of the chat template alone, in an adapter's folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


# --- The config


def config_fields(folder: Path) -> dict[str, Any]:
    """The fields that `adapter_config.json` itself states, without PEFT's defaults.

    Raises:
        AdapterError: a file that is no JSON object.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"it holds {type(fields).__name__}, not an object")
    except Exception as error:
        raise _unreadable(folder, error) from error
    return fields


def read_config(folder: Path) -> PeftConfig:
    """An adapter's config, as PEFT reads it.

    Raises:
        AdapterError: a config that PEFT cannot read.
        UnsupportedAdapterError: a switch that the installed PEFT does not know.
    """
    from peft import PeftConfig

    fields = config_fields(folder)
    if "peft_type" not in fields:
        if (folder / MLX_WEIGHTS).is_file() or "lora_parameters" in fields:
            raise mlx_error(folder)
        raise AdapterError(
            f"{folder / CONFIG}: `peft_type` is missing, so PEFT cannot read it. If it is a LoRA "
            'that PEFT trained, add "peft_type": "LORA"; if another tool wrote it, convert it.'
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _unreadable(folder, error) from error
    _require_known_fields(folder, fields, config)
    return config


def _require_known_fields(folder: Path, fields: dict[str, Any], config: PeftConfig) -> None:
    for field, value in fields.items():
        is_set = value is True or (isinstance(value, list | dict) and value)
        if is_set and not hasattr(config, field):
            raise UnsupportedAdapterError(
                f"{folder / CONFIG}: {field}={value!r} is unknown to the installed peft, which "
                "would ignore it; upgrade peft to the version that saved the adapter "
                f"({fields.get('peft_version', 'not stated')})."
            )


def mlx_error(folder: Path) -> AdapterError:
    """The error for an adapter of MLX, whose config has the same name as PEFT's."""
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it: it is MLX's, which uses the same file name for "
        f"another format ({MLX_WEIGHTS} holds its weights); convert it to PEFT's format."
    )


def _unreadable(folder: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and other "
        "tools use the same file name with another format; convert it to PEFT's."
    )


# --- The tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by key, copied out of the mapped file.

    Raises:
        AdapterError: a file that is damaged or cut short.
    """
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        fact = f"not a whole safetensors file ({error!r})"
        raise AdapterError(f"{folder / WEIGHTS}: {fact}.") from error
    return {key: tensor.clone() for key, tensor in tensors.items()}


def warn_of_cuts(folder: Path, config: Any, paths: Collection[str]) -> None:
    """Warn if PEFT seems to have left modules out of the file.

    PEFT leaves out every module whose path contains the name of another adapter of the model. So
    the file may be cut if an adapter saved beside it is called like a part of a module's path, or
    if the config targets modules that the file lacks.

    Args:
        folder: the folder of the adapter.
        config: the configuration as PEFT reads it.
        paths: the paths of the modules that the file has.
    """
    namesake = _neighbour_called_like_a_module(folder, paths)
    lacking = _targets_without_factors(config, paths)
    if namesake is not None:
        reason = f"another adapter saved with it is called {namesake!r}, like a part of its paths"
    elif lacking:
        reason = f"the config targets {', '.join(lacking[:4])}, and the file has no factors there"
    else:
        return
    trained = "ll.Adapter.from_peft(peft_model, adapter_name)"
    warn(
        f"{folder}: modules may be missing from the file: {reason}. PEFT leaves out every module "
        "whose path contains another adapter's name.",
        remedy=f"Compare with the model that was trained: {trained}.",
        in_shell=f"In Python, save the model that was trained: {trained}.save(folder).",
    )


def _neighbour_called_like_a_module(folder: Path, paths: Collection[str]) -> str | None:
    """Another adapter in this folder, if its name is a part of module paths that are missing."""
    own = folder.resolve()
    configs = [*folder.glob(f"*/{CONFIG}"), *own.parent.glob(f"*/{CONFIG}")]
    neighbours = {config.parent.name for config in configs} - {own.name}
    present: set[str] = set()
    for path in paths:
        present.update(path.split("."))
    for name in sorted(neighbours & _parts_of_module_paths()):
        if name not in present:
            return name
    return None


def _parts_of_module_paths() -> set[str]:
    """'layers', '3', 'self_attn', 'q_proj', …: the parts of the paths of every known family."""
    parts = {str(number) for number in range(_LAYER_NUMBERS)}
    for family in FAMILIES:
        for linear in family.linears:
            parts.update(f"{family.layer}.{linear}".split("."))
    return parts


def _targets_without_factors(config: Any, paths: Collection[str]) -> list[str]:
    """The names among the config's targets with which no module of the file ends."""
    targets = config.target_modules
    if not isinstance(targets, set | list):
        return []
    without: list[str] = []
    for target in targets:
        has_factors = any(f".{path}".endswith(f".{target}") for path in paths)
        if not has_factors:
            without.append(target)
    return sorted(without)
