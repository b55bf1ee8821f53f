"""Read PEFT's adapter format: from a config and its tensors to updates by module path.

1. Every tensor key is accounted for: which module it belongs to, and in which role (`peft_keys`).
   A tensor that PEFT would leave out is refused, and so is a file that lacks one which the config
   promises.
2. The paths become those of the causal language model (`module_paths`).
3. The factors have s = α/r, or α/√r for rsLoRA, with r and α from the config's patterns
   (`peft_patterns`).
4. A parameter of `target_parameters` has factors of its own. PEFT stores the parameters of one
   module as nested wrappers, the first one innermost, and orders the columns of B by rank, then by
   expert.
5. Modules that were trained whole, rows of tokens and biases are read by `peft_trained`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens_lora.core.adapter import peft_files, peft_variants
from lens_lora.core.adapter.dense import as_dense
from lens_lora.core.adapter.factors import LoRAFactors, ModuleUpdate
from lens_lora.core.adapter.module_paths import is_known, model_paths, renamed
from lens_lora.core.adapter.peft_keys import (
    FACTORS,
    LORA_KEYS,
    PREFIX,
    Roles,
    by_module,
    saved_keys,
)
from lens_lora.core.adapter.peft_patterns import Patterns
from lens_lora.core.adapter.peft_trained import ends_in_head, require_copies, trained_modules
from lens_lora.errors import AdapterError, located, warn

if TYPE_CHECKING:
    from peft import PeftConfig

WRAPPED = ".base_layer"
# The parameters that PEFT may find in one module, in the order in which transformers defines them.
_IN_ORDER = ("gate_up_proj", "up_proj", "down_proj")


def read_folder(folder: Path, config: PeftConfig) -> tuple[dict[str, ModuleUpdate], str | None]:
    """Read the updates of a folder, by module path, and the base that its config names."""
    tensors = peft_files.read_tensors(folder)
    with located(folder):
        peft_variants.refuse_variants(config)
        state, notes = saved_keys(tensors)
        updates = updates_of(config, state)
        modules = renamed(updates, notes)
        base = base_of(config)
    for note in notes:
        warn(f"{folder}: {note}.")
    peft_files.warn_of_cuts(folder, config, updates)
    return modules, base


def base_of(config: Any) -> str | None:
    """The base model that a config names.

    Raises:
        AdapterError: something that is not a name.
    """
    base = config.base_model_name_or_path or None
    if not isinstance(base, str | None):
        raise AdapterError(f"base_model_name_or_path={base!r}; expected a name.")
    return base


def updates_of(config: PeftConfig, state: Mapping[str, Tensor]) -> dict[str, ModuleUpdate]:
    """Make updates, by the file's module paths, of a config and its tensors by PEFT's keys.

    Raises:
        AdapterError: tensors are left over or missing, or do not belong to the config.
    """
    modules, left_over = by_module(state)
    file = _with_parameters(config, modules)
    paths = model_paths(file.roles)

    factors: dict[str, Roles] = {}
    trained: dict[str, Roles] = {}
    for path, roles in file.roles.items():
        if FACTORS & set(roles):
            factors[path] = roles
            continue
        trained[path] = roles
        if not is_known(paths[path]):
            left_over += [f"{PREFIX}{path}.{role}" for role in roles]
    _require_nothing_left_over(config, left_over)
    if not file.roles:
        raise AdapterError("no lora_A / lora_B tensors.")

    patterns = Patterns(config)
    of_linear_maps = [path for path in factors if path not in file.parameters]
    _require_targets(config, patterns.untargeted(of_linear_maps))
    updates: dict[str, ModuleUpdate] = {}
    for path, roles in factors.items():
        with located(f"module {path}"):
            parameter = file.parameters.get(path)
            updates[path] = _file_factors(config, patterns, path, roles, parameter)
    copied = {paths[path] for path, roles in trained.items() if {"weight", "bias"} & set(roles)}
    require_copies(config, [*paths.values()], copied)
    return updates | trained_modules(config, trained)


def _require_nothing_left_over(config: Any, left_over: list[str]) -> None:
    if not left_over:
        return
    shown = ", ".join(sorted(left_over)[:5])
    if len(left_over) > 5:
        shown += " …"
    raise AdapterError(
        f"{len(left_over)} tensors are no LoRA factors, nor parameters of a module that is "
        f"known here: {shown}. Fully trained modules (modules_to_save) are read if they are "
        "linear modules, embeddings, heads or norms of a supported language model. Others are "
        f"not dropped silently; save it without them.{peft_variants.classifier_note(config)}"
    )


def _require_targets(config: Any, untargeted: list[str]) -> None:
    """Refuse factors of modules that the config does not target.

    A head may have factors if `ensure_weight_tying` ties it to the LoRA of its embedding.
    """
    if getattr(config, "ensure_weight_tying", False):
        untargeted = [path for path in untargeted if not ends_in_head(path)]
    if not untargeted:
        return
    stated: list[str] = []
    for field in ("target_modules", "layers_to_transform", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, set):
            value = sorted(value, key=str)
        if value not in (None, []):
            stated.append(f"{field}={value!r}")
    raise AdapterError(
        f"the file has factors of {len(untargeted)} modules that the config leaves out "
        f"({', '.join([*untargeted[:3], *stated])}), and PEFT would ignore them. One of the files "
        "is another adapter's or was edited: correct the config if they were trained, or take them "
        "out of the file."
    )


# --- Factors


def lora_factors(roles: Roles, scale: float) -> LoRAFactors:
    """The factors of one module.

    Args:
        roles: its tensors, by role.
        scale: s of the note.

    Raises:
        AdapterError: one of the two factors is missing, or they do not fit together.
    """
    for half, other in ("AB", "BA"):
        if half not in roles:
            raise AdapterError(f"lora_{other} is there and lora_{half} is missing from the file.")
    tensors: dict[str, Any] = dict(roles)
    dense = as_dense(roles["A"], roles["B"])
    if dense is not None:
        tensors["A"], tensors["B"] = dense
    return LoRAFactors(**tensors, scale=scale)


def of_experts(factors: LoRAFactors, experts: int) -> LoRAFactors:
    """Reorder the factors of a parameter of all experts, so that each expert's ranks are together.

    PEFT orders the columns of B by rank, and then by expert.

    Args:
        factors: the factors as PEFT stores them.
        experts: the number of experts.
    """
    of_all = dataclasses.replace(factors, experts=experts)  # Refuses a number that does not fit.
    by_rank = of_all.B.unflatten(1, (-1, experts))
    return dataclasses.replace(of_all, B=by_rank.mT.flatten(1))


def _file_factors(
    config: Any, patterns: Patterns, path: str, roles: Roles, parameter: str | None
) -> LoRAFactors:
    """The factors of a module, checked against the rank and the scale in the config."""
    rank = patterns.value("rank_pattern", parameter or path, config.r)
    alpha = patterns.value("alpha_pattern", parameter or path, config.lora_alpha)
    is_count = isinstance(rank, int) and rank > 0
    valid_rank = rank if is_count else 1  # Anything but a count is refused below.
    scale = _scale(alpha, valid_rank, config.use_rslora)
    factors = lora_factors(roles, scale)
    _require_tensor_of_field(config, "use_dora", roles, "magnitude")
    _require_tensor_of_field(config, "lora_bias", roles, "lora_bias")
    if parameter is not None and is_count and factors.rank % rank == 0:
        return of_experts(factors, factors.rank // rank)
    if rank != factors.rank:
        fact = f"the config says rank {rank}, the tensors have rank {factors.rank}"
        raise AdapterError(f"{fact}; one of the two files belongs to another adapter.")
    return factors


def _require_tensor_of_field(config: Any, field: str, roles: Roles, role: str) -> None:
    """Check that the module has this tensor if and only if the config's switch is on."""
    is_there = role in roles
    if bool(getattr(config, field)) != is_there:
        has = "has" if is_there else "has no"
        raise AdapterError(
            f"{field}={not is_there}, and the file {has} {LORA_KEYS[role][1:]}; they do not belong "
            "together."
        )


def _scale(alpha: Any, rank: int, use_rslora: bool) -> float:
    """The scale s as PEFT has it: α/r, or α/√r for rsLoRA."""
    if isinstance(alpha, str):
        raise AdapterError(f"lora_alpha is {alpha!r}, a string; write it without quotation marks.")
    try:
        divisor = math.sqrt(rank) if use_rslora else rank
        scale = alpha / divisor
    except (TypeError, OverflowError):
        scale = math.nan
    if scale == 0 or not math.isfinite(scale):
        fact = f"lora_alpha is {alpha!r} and the rank {rank}, so s = α/r is zero or not finite"
        raise AdapterError(f"{fact}; the adapter was trained with another config.")
    return scale


# --- Parameters that `target_parameters` names


@dataclasses.dataclass(frozen=True)
class _FileModules:
    """The modules of a file, in which each targeted parameter has a path of its own.

    Attributes:
        roles: the tensors at each path, by role.
        parameters: the name of the parameter at a path, for those paths that are a parameter's.
    """

    roles: dict[str, Roles]
    parameters: dict[str, str]


def _with_parameters(config: Any, modules: Mapping[str, Roles]) -> _FileModules:
    """Give targeted parameters paths of their own.

    The `weight` of a router has the path of its module.
    """
    paths_by_holder: dict[str, list[str]] = {}
    for path in modules:
        paths_by_holder.setdefault(parameter_holder(path), []).append(path)
    roles_by_path: dict[str, Roles] = {}
    parameters: dict[str, str] = {}
    for holder, paths in paths_by_holder.items():
        names = _targeted_parameters(config, holder)
        if not names:
            for path in paths:
                roles_by_path[path] = modules[path]
            continue
        is_order_known = len(names) == 1 or set(names) <= set(_IN_ORDER)
        if len(paths) != len(names) or not is_order_known:
            raise AdapterError(
                f"{holder}: the file has factors of {len(paths)} of its parameters, and "
                f"target_parameters names {', '.join(names)}; which belong to which is not known."
            )
        # The first parameter is wrapped most often, so its path is the longest.
        for name, path in zip(names, sorted(paths, key=len, reverse=True), strict=True):
            own_path = parameter_path(holder, name)
            roles_by_path[own_path] = modules[path]
            parameters[own_path] = f"{holder}.{name}"
    return _FileModules(roles_by_path, parameters)


def _targeted_parameters(config: Any, holder: str) -> list[str]:
    """The parameters of a module that the config targets, in the order in which PEFT wraps them.

    A target is the end of a parameter's path.
    """
    names: set[str] = set()
    for target in config.target_parameters or ():
        module, _, name = target.rpartition(".")
        if module and f".{holder}".endswith(f".{module}"):
            names.add(name)
    known = [name for name in _IN_ORDER if name in names]
    others = sorted(names.difference(_IN_ORDER))
    return [*known, *others]


def parameter_holder(path: str) -> str:
    """The path of the module itself, without PEFT's wrappers of its parameters."""
    while path.endswith(WRAPPED):
        path = path.removesuffix(WRAPPED)
    return path


def parameter_path(holder: str, parameter: str) -> str:
    """The path by which an adapter names a parameter; for `weight`, that of its module."""
    return holder if parameter == "weight" else f"{holder}.{parameter}"
