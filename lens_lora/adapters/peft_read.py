"""PEFT's adapter format: files and state dictionaries → factors by module path.

1. PEFT reads the files (config and tensors); pickled weights are refused, nothing is unpickled.
2. Every tensor key is accounted for: tensor keys are trusted, the config's claims are not.
3. The scale of each module is PEFT's: s = α/r, or α/√r for rsLoRA, with r and α from the patterns.
4. What would be read wrongly as s·B·A (PiSSA, aLoRA, X-LoRA, …) is refused with a remedy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_files import CONFIG, WEIGHTS, adapter_folder
from lens_lora.errors import AdapterError, UnsupportedAdapterError

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["factors_of", "read_folder"]

_PREFIX = "base_model.model."
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.bias": "trained_bias",
    ".base_layer.weight": "base_weight",
}


def read_folder(
    path: str | Path, revision: str | None, subfolder: str | None
) -> tuple[dict[str, LoRAFactors], str | None, str]:
    """(factors by module path, the base it names, the folder's name) of an adapter on disk or hub.

    Raises:
        AdapterError, UnsupportedAdapterError: see `lens_lora.load_adapter`.
    """
    folder = adapter_folder(path, revision, subfolder)
    config = _read_config(folder)
    factors, base = factors_of(config, _read_tensors(folder), str(folder))
    return factors, base, folder.name or str(path)


def factors_of(
    config: PeftConfig, state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, LoRAFactors], str | None]:
    """(factors by module path, the base it names) of a PEFT config and its state dictionary."""
    _refuse_variants(config, source)
    tensors, left_over = _by_module(state)
    if left_over:
        raise _left_over_error(left_over, source)
    modules = {path: _factors(config, path, found, source) for path, found in tensors.items()}
    if not modules:
        raise AdapterError(f"{source}: no lora_A / lora_B tensors.")
    base = config.base_model_name_or_path or None
    if not isinstance(base, str | None):
        raise AdapterError(f"{source}: base_model_name_or_path={base!r}; expected a name.")
    return modules, base


def _read_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
        fields = json.loads((folder / CONFIG).read_text())
    except Exception as error:
        raise AdapterError(
            f"{folder / CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and "
            "other tools use the same file name with another format; convert it to PEFT's."
        ) from error
    _refuse_other_kinds(config, str(folder))
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


def _by_module(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module path → its tensors by role, and the keys that have none."""
    found: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        suffix = next((s for s in _SUFFIXES if key[len(_PREFIX) :].endswith(s)), None)
        if suffix is None or not key.startswith(_PREFIX):
            left_over.append(key)
            continue
        tensors = found.setdefault(key[len(_PREFIX) : -len(suffix)], {})
        if _SUFFIXES[suffix] in tensors:
            left_over.append(key)
        tensors[_SUFFIXES[suffix]] = tensor
    bare = [path for path, tensors in found.items() if not {"A", "B"} & set(tensors)]
    left_over += [f"{_PREFIX}{path}.{role}" for path in bare for role in found[path]]
    return {path: tensors for path, tensors in found.items() if path not in bare}, left_over


def _factors(config: Any, path: str, tensors: Mapping[str, Tensor], source: str) -> LoRAFactors:
    missing = {"A", "B"} - set(tensors)
    if missing:
        (half,) = missing
        raise AdapterError(
            f"{source}, module {path}: lora_{'A' if half == 'B' else 'B'} is there and "
            f"lora_{half} is missing; the file is incomplete."
        )
    if config.use_dora != ("magnitude" in tensors):
        has = "has" if "magnitude" in tensors else "has no"
        raise AdapterError(
            f"{source}, module {path}: use_dora={config.use_dora}, and the file {has} "
            "lora_magnitude_vector; the two files do not belong together."
        )
    try:
        factors = LoRAFactors(**cast(dict[str, Any], tensors))
    except AdapterError as error:
        raise AdapterError(f"{source}, module {path}: {error}") from error
    return dataclasses.replace(factors, scale=_scale(config, path, factors.rank, source))


def _left_over_error(keys: list[str], source: str) -> AdapterError:
    shown = ", ".join(sorted(keys)[:5]) + (" …" if len(keys) > 5 else "")
    return AdapterError(
        f"{source}: {len(keys)} tensors are no LoRA factors of a linear module: {shown}. Fully "
        "trained modules (modules_to_save) and other formats are not LoRA and are not dropped "
        "silently; save the adapter without them."
    )


def _scale(config: Any, path: str, rank: int, source: str) -> float:
    """PEFT's scale: α/r, or α/√r for rsLoRA, with r and α from the patterns."""
    configured = _by_pattern(config, "rank_pattern", path, config.r, source)
    if configured != rank:
        raise AdapterError(
            f"{source}, module {path}: the config says rank {configured}, the tensors have rank "
            f"{rank}; one of the two files belongs to another adapter."
        )
    alpha = _by_pattern(config, "alpha_pattern", path, config.lora_alpha, source)
    try:
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    except (TypeError, OverflowError):
        scale = math.nan
    if scale == 0 or not math.isfinite(scale):
        raise AdapterError(
            f"{source}, module {path}: lora_alpha is {alpha!r} and the rank {rank}, so s = α/r is "
            "zero or no finite number; the config is not the one the adapter was trained with."
        )
    return scale


def _by_pattern(config: Any, field: str, path: str, default: Any, source: str) -> Any:
    """The value of the first pattern that PEFT matches with the path, else the default."""
    from peft.utils.other import get_pattern_key

    pattern = getattr(config, field) or {}
    try:
        return pattern.get(get_pattern_key(list(pattern), path), default)
    except Exception as error:
        raise AdapterError(
            f"{source}: {field}={pattern!r} does not map patterns of module names to numbers "
            f"({error})."
        ) from error


_CONVERT_REMEDY = (
    "Its B·A is relative to base weights that the initialisation changed. Save it converted: "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
)
_READ_VARIANTS = ("use_dora",)
_REFUSALS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "bias",
        lambda v: v not in (None, "none", "lora_only"),
        "Biases trained outside the adapted modules are not read; use bias='lora_only' or 'none'.",
    ),
    ("modules_to_save", bool, "Fully trained modules are not LoRA; train without them."),
    ("trainable_token_indices", bool, "Trained token rows are not LoRA; train without them."),
    (
        "target_parameters",
        bool,
        "No hook point of transformer-lens shows an expert's own input (the tokens routed to it), "
        "so LoRA on bare expert parameters cannot be laid over it; target linear modules.",
    ),
    ("alora_invocation_tokens", bool, "aLoRA depends on the position; train a plain LoRA."),
    ("use_qalora", bool, "QA-LoRA pools the input of A; train with use_qalora=False."),
    ("layer_replication", bool, "Replicated layers change the base model; train without them."),
    ("megatron_config", bool, "Megatron's parallel linears are not read; save a plain LoRA."),
    ("init_lora_weights", lambda v: v not in _HARMLESS_INITS, _CONVERT_REMEDY),
)


def _refuse_other_kinds(config: Any, source: str) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UnsupportedAdapterError(f"{source}: a {kind} adapter; only LoRA is read.")


def _refuse_variants(config: Any, source: str) -> None:
    _refuse_other_kinds(config, source)
    for field, is_unsupported, remedy in _REFUSALS:
        value = getattr(config, field, None)
        if is_unsupported(value):
            raise UnsupportedAdapterError(f"{source}: {field}={value!r}. {remedy}")
    for field in dataclasses.fields(config):
        is_variant = field.metadata.get("is_lora_variant") and field.name not in _READ_VARIANTS
        if is_variant and getattr(config, field.name):
            raise UnsupportedAdapterError(
                f"{source}: {field.name}={getattr(config, field.name)!r} makes this a LoRA "
                "variant that plain s·B·A would misread; train a plain LoRA."
            )
