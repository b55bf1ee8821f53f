"""PEFT's adapter format: a folder, or a config and its state dictionary → updates by module path.

1. Every tensor key is accounted for (`peft_paths`): factors, or parameters of a module that was
   trained whole (`peft_trained`). Tensors that the config says nothing of, which PEFT would leave
   out, are refused, as are tensors that it promises and that are not there.
2. The scale of each module is PEFT's: s = α/r, or α/√r for rsLoRA, with r and α from the patterns.
3. What would be read wrongly as s·B·A (PiSSA, aLoRA, X-LoRA, …) is refused with a remedy
   (`peft_variants`).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_files import local_folder
from lens_lora.adapters.peft_folder import read_files, warn_of_cuts
from lens_lora.adapters.peft_paths import by_module, model_paths, saved_keys
from lens_lora.adapters.peft_patterns import Patterns
from lens_lora.adapters.peft_saved import require_saved
from lens_lora.adapters.peft_trained import trained_modules, unknown_keys
from lens_lora.adapters.peft_variants import classifier_note, refuse_variants
from lens_lora.adapters.trained import ModuleUpdate
from lens_lora.errors import AdapterError
from lens_lora.families import HEADS

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["base_of", "factors_of", "module_factors", "read_folder", "renamed"]


def read_folder(
    path: str | Path, revision: str | None, subfolder: str | None
) -> tuple[dict[str, ModuleUpdate], str | None, str]:
    """(updates by module path, the base it names, the folder's name) of an adapter on disk or hub.

    Args:
        path: folder or hub id.
        revision: of the hub repository.
        subfolder: where the adapter lies in the folder or repository.

    Raises:
        AdapterError: see `lens_lora.load_adapter`.
        UnsupportedAdapterError: see `lens_lora.load_adapter`.
    """
    folder = local_folder(path, revision, subfolder)
    config, tensors = read_files(folder)
    updates, base = factors_of(config, tensors, str(folder))
    warn_of_cuts(folder, config, updates)
    return renamed(updates, str(folder)), base, folder.name or str(path)


def factors_of(
    config: PeftConfig, state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """(updates by the file's module paths, the base it names) of a config and its state dictionary.

    Args:
        config: PEFT's LoraConfig.
        state: tensors by key, as PEFT saves them.
        source: the adapter's file, for messages.

    Raises:
        AdapterError: config and tensors do not say the same.
        UnsupportedAdapterError: not plain LoRA.
    """
    refuse_variants(config, source)
    state, notes = saved_keys(state, source)
    tensors, left_over = by_module(state)
    trained = {path: own for path, own in tensors.items() if "A" not in own and "B" not in own}
    names = model_paths(tensors, source)
    left_over += unknown_keys(names, trained)
    if left_over:
        raise _left_over_error(left_over, source, classifier_note(config))
    if not tensors:
        raise AdapterError(f"{source}: no lora_A / lora_B tensors.")
    patterns = Patterns(config, source)
    factors = {path: own for path, own in tensors.items() if path not in trained}
    _require_targets(config, _untargeted(config, patterns, factors), source)
    modules: dict[str, ModuleUpdate] = {
        path: _factors(config, patterns, path, found, source) for path, found in factors.items()
    }
    whole = [names[path] for path, own in trained.items() if {"weight", "bias"} & set(own)]
    require_saved(config, names.values(), whole, source)
    modules |= trained_modules(config, trained, source)
    for note in notes:
        _note(f"{source}: its {note}")
    return modules, base_of(config, source)


def renamed(modules: Mapping[str, ModuleUpdate], source: str) -> dict[str, ModuleUpdate]:
    """The modules by their paths in the causal language model; warns where these are others.

    Args:
        modules: updates by the path that the file or live model has.
        source: the adapter's file or model, for messages.

    Raises:
        AdapterError: two paths are one module.
    """
    paths = model_paths(modules, source)
    changed = [path for path, new in paths.items() if path != new]
    if changed:
        _note(
            f"{source}: {len(changed)} module paths are those of a wrapped or headless model: "
            f"{changed[0]} is read as {paths[changed[0]]}"
        )
    return {paths[path]: factors for path, factors in modules.items()}


def module_factors(
    path: str, tensors: Mapping[str, Tensor], scale: float, source: str
) -> LoRAFactors:
    """One module's factors from its tensors by role.

    Args:
        path: the module's.
        tensors: by role, 'A', 'B' and what may stand beside them.
        scale: s.
        source: the adapter's file or model, for messages.

    Raises:
        AdapterError: a half is missing, or the tensors do not fit together.
    """
    missing = {"A", "B"} - set(tensors)
    if missing:
        (half,) = missing
        raise AdapterError(
            f"{source}, module {path}: lora_{'A' if half == 'B' else 'B'} is there and "
            f"lora_{half} is missing; the file is incomplete."
        )
    try:
        return LoRAFactors(**cast(dict[str, Any], tensors), scale=scale)
    except AdapterError as error:
        raise AdapterError(f"{source}, module {path}: {error}") from error


def base_of(config: Any, source: str) -> str | None:
    """The base model that a config names.

    Args:
        config: PEFT's config.
        source: the adapter's file or model, for messages.

    Raises:
        AdapterError: something else than a name stands there.
    """
    base = config.base_model_name_or_path or None
    if not isinstance(base, str | None):
        raise AdapterError(f"{source}: base_model_name_or_path={base!r}; expected a name.")
    return base


def _note(what: str) -> None:
    warnings.warn(f"{what}.", stacklevel=6)


def _untargeted(
    config: Any, patterns: Patterns, factors: Mapping[str, Mapping[str, Tensor]]
) -> list[str]:
    """A head that `ensure_weight_tying` ties to its embedding's LoRA is not among the targets."""
    is_tied = bool(getattr(config, "ensure_weight_tying", False))
    paths = patterns.untargeted(factors)
    return [p for p in paths if not (is_tied and p.rpartition(".")[2] in HEADS)]


def _require_targets(config: Any, untargeted: list[str], source: str) -> None:
    if not untargeted:
        return
    fields = ("target_modules", "layers_to_transform", "exclude_modules")
    values = ((field, getattr(config, field)) for field in fields)
    said = ", ".join(
        f"{field}={sorted(value, key=str) if isinstance(value, set) else value!r}"
        for field, value in values
        if value not in (None, [], set())
    )
    raise AdapterError(
        f"{source}: the file has factors of {len(untargeted)} modules that the config leaves out "
        f"({', '.join(untargeted[:3])}; {said or 'no target_modules'}), and PEFT would ignore "
        "them. One of the two files belongs to another adapter or was edited: correct the config "
        "if they were trained, or take them out of the file."
    )


def _factors(
    config: Any, patterns: Patterns, path: str, tensors: Mapping[str, Tensor], source: str
) -> LoRAFactors:
    factors = module_factors(path, tensors, 1.0, source)
    for field, role, key in (
        ("use_dora", "magnitude", "lora_magnitude_vector"),
        ("lora_bias", "lora_bias", "lora_B.bias"),
    ):
        if bool(getattr(config, field)) != (role in tensors):
            has = "has" if role in tensors else "has no"
            raise AdapterError(
                f"{source}, module {path}: {field}={getattr(config, field)}, and the file {has} "
                f"{key}; the two files do not belong together."
            )
    return dataclasses.replace(factors, scale=_scale(config, patterns, path, factors.rank, source))


def _left_over_error(keys: list[str], source: str, note: str) -> AdapterError:
    shown = ", ".join(sorted(keys)[:5]) + (" …" if len(keys) > 5 else "")
    return AdapterError(
        f"{source}: {len(keys)} tensors are no LoRA factors, nor parameters of a module that is "
        f"known here: {shown}. Fully trained modules (modules_to_save) are read where they are "
        "linear modules, embeddings, heads or norms of a supported language model. Other tensors "
        f"are not dropped silently; save the adapter without them.{note}"
    )


def _scale(config: Any, patterns: Patterns, path: str, rank: int, source: str) -> float:
    """PEFT's scale: α/r, or α/√r for rsLoRA, with r and α from the patterns."""
    configured = patterns.value("rank_pattern", path, config.r)
    if configured != rank:
        raise AdapterError(
            f"{source}, module {path}: the config says rank {configured}, the tensors have rank "
            f"{rank}; one of the two files belongs to another adapter."
        )
    alpha = patterns.value("alpha_pattern", path, config.lora_alpha)
    if isinstance(alpha, str):
        raise AdapterError(
            f"{source}, module {path}: lora_alpha is {alpha!r}, a string; write the number into "
            "adapter_config.json without quotation marks."
        )
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
