"""Updates by module path → a folder in PEFT's adapter format.

1. What one LoraConfig cannot express is refused: two updates of one module, DoRA on only some
   modules, and a fraction (`strength`) of a trained module, of a trained bias or of DoRA's update.
2. α = s·r of each module. Where r or α is not the most common one, it is written into the patterns
   under the module's whole path.
3. A trained module is one of `modules_to_save`, unless PEFT writes it into the base itself (a
   stored embedding, a bias); trained rows are `trainable_token_indices`.
4. Before a file is written, the reader of `load_adapter` reads config and tensors, and must return
   the same factors.
5. PEFT writes the config and safetensors writes the tensors into a temporary folder inside the
   target. Then the files are moved into the target and replace files of the same names.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_lora.core import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter import (
    CONFIG,
    COPY_KEYS,
    EMBEDDING_KEYS,
    LORA_KEYS,
    PREFIX,
    ROW_KEYS,
    WEIGHTS,
    WRAPPED,
    Updates,
    extensions,
    module_path,
    updates_of,
)
from lens_lora.errors import (
    AdapterError,
    UnsupportedAdapterError,
    located,
)
from lens_lora.families import FAMILIES, HEADS

if TYPE_CHECKING:
    from peft import LoraConfig

_Factors = Mapping[str, LoRAFactors]
_Trained = Mapping[str, TrainedModule]
# PEFT's own word for no targets.
_NO_TARGETS = "dummy-target-modules"
# PEFT's own default of both r and α, for an adapter without factors.
_DEFAULT_SIZE = 8


def _names_of_embeddings() -> set[str]:
    """The last part of the paths of embeddings, of every family."""
    paths: list[str | None] = []
    for family in FAMILIES:
        paths += [family.embed, family.pos_embed]
    return {path.rpartition(".")[2] for path in paths if path is not None}


_EMBEDDINGS = _names_of_embeddings()


@extensions.save_adapter.provide
def save_adapter(modules: Updates, name: str, base_model: str | None, path: str | Path) -> Path:
    """Write an adapter's modules to a folder in PEFT's format: see `Adapter.save`.

    Returns:
        The folder.
    """
    updates = _without_tags(modules, name)
    for module, update in updates.items():
        _require_writable(module, update, len(updates))
    trained: dict[str, TrainedModule] = {}
    unscaled: dict[str, LoRAFactors] = {}
    for module, update in updates.items():
        if isinstance(update, TrainedModule):
            trained[module] = update
        else:
            unscaled[module] = update
    _refuse_mixtures(name, unscaled)
    factors = _plain(unscaled)
    config = _config(factors, trained, base_model)
    tensors = _tensors(factors | trained)
    with located("the adapter as it would be saved"):
        _require_same_scales(factors, updates_of(config, tensors))
    return _write(config, tensors, Path(path))


def _without_tags(modules: Updates, name: str) -> dict[str, ModuleUpdate]:
    """Updates by bare module path; a sum whose parts share no module is one adapter."""
    updates: dict[str, ModuleUpdate] = {}
    for key, update in modules.items():
        module = module_path(key)
        if module in updates:
            raise UnsupportedAdapterError(
                f"{module} has two updates in {name}, and PEFT's format holds one. Save each part "
                "by itself, adapter.only('*@name').save(…), and load both in PEFT."
            )
        updates[module] = update
    return updates


def _require_writable(module: str, update: ModuleUpdate, module_count: int) -> None:
    if update.strength == 0 or (isinstance(update, LoRAFactors) and update.scale == 0):
        remedy = ""
        if module_count > 1:
            remedy = f"; leave it out with adapter.without_modules({module!r})"
        raise AdapterError(f"{module}: its scale is zero, so it has no update to save{remedy}.")
    if isinstance(update, LoRAFactors) and update.width is None:
        raise AdapterError(
            f"{module}: this constant does not say how many features the module reads, as PEFT's "
            "file must; make it with Adapter.constant(vectors, like=model)."
        )
    part = update.base_part
    if part is not None and update.strength != 1:
        raise UnsupportedAdapterError(
            f"{module}: {update.strength:g} times an update that holds {part} cannot be written "
            "without the base's weights; save the adapter unscaled and scale it after loading."
        )


def _refuse_mixtures(name: str, modules: _Factors) -> None:
    """Refuse modules that disagree in a setting of the whole LoraConfig.

    DoRA and lora_bias are such settings, and they exclude each other.
    """
    dora = [module for module, factors in modules.items() if factors.magnitude is not None]
    biased = [module for module, factors in modules.items() if factors.lora_bias is not None]
    embeddings = [module for module in modules if _is_embedding(module)]
    if dora and len(dora) < len(modules):
        plain = next(module for module in modules if module not in dora)
        raise UnsupportedAdapterError(
            f"{name}: {dora[0]} is DoRA and {plain} is not, and in PEFT's format a whole adapter "
            "is one or the other; save them apart with adapter.only(…)."
        )
    if dora and biased:
        fact = f"{biased[0]} is DoRA and has a lora_bias"
        raise UnsupportedAdapterError(f"{name}: {fact}; PEFT has no DoRA with a lora_bias.")
    if biased and embeddings:
        raise UnsupportedAdapterError(
            f"{name}: {biased[0]} has a lora_bias, so {embeddings[0]} must have one too, but PEFT "
            "has no embedding with a lora_bias. Save embeddings apart: adapter.only(…)."
        )


def _is_embedding(module: str) -> bool:
    """Whether PEFT calls the module's factors lora_embedding_A and B; its name decides."""
    last = module.rpartition(".")[2]
    if last in _EMBEDDINGS:
        return True
    if "emb" in last and last not in HEADS:
        raise UnsupportedAdapterError(
            f"{module}: its factors do not tell whether it is an embedding or a linear module, "
            "which PEFT writes under different names; leave it out with adapter.without_modules(…)."
        )
    return False


def _plain(modules: _Factors) -> dict[str, LoRAFactors]:
    """Move each strength into the scale, and give all modules a lora_bias if some have one."""
    has_biases = any(factors.lora_bias is not None for factors in modules.values())
    plain: dict[str, LoRAFactors] = {}
    for module, factors in modules.items():
        bias = factors.lora_bias
        if bias is None and has_biases:
            bias = factors.B.new_zeros(len(factors.B))
        scale = factors.scale * factors.strength
        plain[module] = dataclasses.replace(factors, scale=scale, strength=1.0, lora_bias=bias)
    return plain


# --- The config


def _config(modules: _Factors, trained: _Trained, base_model: str | None) -> LoraConfig:
    from peft import LoraConfig

    parameters = _parameters(modules)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, factors in modules.items():
        target = parameters.get(module, module)
        rank_of_module, alpha_of_module = _rank_and_alpha(factors)
        ranks[target] = rank_of_module
        alphas[target] = alpha_of_module
    rank = _most_common(ranks.values())
    alpha = _most_common(alphas.values())
    other_ranks = {target: r for target, r in ranks.items() if r != rank}
    other_alphas = {target: a for target, a in alphas.items() if a != alpha}
    return LoraConfig(
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=[module for module in modules if module not in parameters] or _NO_TARGETS,
        target_parameters=list(parameters.values()) or None,
        r=int(rank),
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it, whole or not
        rank_pattern=other_ranks,
        alpha_pattern=other_alphas,
        bias=_bias(modules, trained),
        use_dora=any(factors.magnitude is not None for factors in modules.values()),
        lora_bias=any(factors.lora_bias is not None for factors in modules.values()),
        modules_to_save=_copied(trained) or None,
        trainable_token_indices=_trained_rows(trained) or None,
    )


def _trained_rows(trained: _Trained) -> dict[str, list[int]]:
    """The ids of the trained rows of each embedding or head that was not trained whole."""
    ids: dict[str, list[int]] = {}
    for module, update in trained.items():
        if update.tokens is not None:
            ids[module] = update.tokens.tolist()
    return ids


def _copied(trained: _Trained) -> list[str]:
    """The modules that PEFT keeps as a trained copy; it writes tied ones into the base instead."""
    copies: list[str] = []
    for module, update in trained.items():
        if update.tokens is None and update.weight is not None and not update.tied:
            copies.append(module)
    return copies


def _parameters(modules: _Factors) -> dict[str, str]:
    """The parameters (stacks of experts, routers) that PEFT targets in place of modules."""
    parameters: dict[str, str] = {}
    for module, factors in modules.items():
        if factors.experts == 1:
            parameters[module] = f"{module}.weight"
        elif factors.experts > 1:
            parameters[module] = module
    return parameters


def _most_common(sizes: Iterable[float]) -> float:
    counts = Counter(sizes)
    if not counts:
        return _DEFAULT_SIZE
    ((size, _),) = counts.most_common(1)
    return size


def _bias(modules: _Factors, trained: _Trained) -> Literal["none", "all", "lora_only"]:
    if any(update.weight is None for update in trained.values()):
        return "all"
    has_biases = any(factors.trained_bias is not None for factors in modules.values())
    return "lora_only" if has_biases else "none"


def _rank_and_alpha(factors: LoRAFactors) -> tuple[int, float]:
    """The rank of one expert, and α with α/r = s, as a whole number if that is exact."""
    rank = factors.rank // max(factors.experts, 1)
    alpha = factors.scale * rank
    rounded = round(alpha)
    if rounded / rank == factors.scale:
        return rank, rounded
    return rank, alpha


# --- The tensors


def _tensors(modules: Updates) -> dict[str, Tensor]:
    """The tensors by PEFT's keys."""
    stacks = [module for module, update in modules.items() if _is_stack(update)]
    holders = [module.rpartition(".")[0] for module in stacks]
    tensors: dict[str, Tensor] = {}
    for module, update in modules.items():
        path = module
        if isinstance(update, LoRAFactors) and _is_stack(update):
            path, _, parameter = module.rpartition(".")
            # PEFT wraps the parameters of one module within one another.
            if holders.count(path) > 1 and parameter != "down_proj":
                path += WRAPPED
            update = _by_rank(update)
        for role, suffix in _keys(module, update).items():
            field = "weight" if role == "token_rows" else role
            tensor = getattr(update, field)
            if tensor is not None:
                key = PREFIX + path + suffix
                tensors[key] = tensor.detach().cpu().clone().contiguous()
    return tensors


def _by_rank(factors: LoRAFactors) -> LoRAFactors:
    """Factors of a stack of experts, with B's columns by rank and then by expert, as in PEFT."""
    by_expert = factors.B.unflatten(1, (factors.experts, -1))
    return dataclasses.replace(factors, B=by_expert.mT.flatten(1))


def _is_stack(update: ModuleUpdate) -> bool:
    return isinstance(update, LoRAFactors) and update.experts > 1


def _keys(module: str, update: ModuleUpdate) -> dict[str, str]:
    if isinstance(update, LoRAFactors):
        return EMBEDDING_KEYS if _is_embedding(module) else LORA_KEYS
    return COPY_KEYS if update.tokens is None else ROW_KEYS


def _require_same_scales(modules: _Factors, updates: Updates) -> None:
    """Refuse paths that PEFT's patterns confuse, because these are regular expressions."""
    for module, factors in modules.items():
        scale = cast(LoRAFactors, updates[module]).scale
        if abs(scale - factors.scale) > 4 * torch.finfo(torch.float64).eps * abs(factors.scale):
            raise UnsupportedAdapterError(
                f"{module}: PEFT would read its scale as {scale:g}, not {factors.scale:g}, because "
                "its path matches another module's; save the two apart with adapter.only(…)."
            )


def _write(config: LoraConfig, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving_", dir=folder) as part:
        save_file(dict(tensors), str(Path(part) / WEIGHTS), metadata={"format": "pt"})
        config.save_pretrained(part)
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(part) / name, folder / name)
    return folder
