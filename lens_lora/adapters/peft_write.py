"""Updates by module path → a folder in PEFT's adapter format.

1. What PEFT cannot say in one LoraConfig is refused: two updates of one module, DoRA on some
   modules only, a part of a trained module, of a trained bias or of DoRA's update (`strength`).
2. α = s·r per module; r and α that are not the most common ones stand in the patterns under the
   module's whole path.
3. A trained module is one of `modules_to_save`, unless PEFT is to write it into the base itself (a
   stored embedding, a bias); trained rows are `trainable_token_indices`.
4. The config and the tensors are read back by the reader of `load_adapter`, and must be the
   factors that were given, before a file is written.
5. PEFT writes the config, safetensors the tensors, into a folder beside the target; then the files
   are moved to it, replacing files of the same names, as PEFT does.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_files import CONFIG, WEIGHTS
from lens_lora.adapters.peft_paths import PREFIX
from lens_lora.adapters.peft_read import factors_of
from lens_lora.adapters.peft_trained import trained_fields, trained_tensors
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.families import FAMILIES, HEADS

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["save_adapter"]

_EMBEDDINGS = {path.rpartition(".")[2] for f in FAMILIES for path in (f.embed, f.pos_embed) if path}
_NO_TARGETS = "dummy-target-modules"  # PEFT's own word for none


def save_adapter(
    modules: Mapping[str, ModuleUpdate], name: str, base_model: str | None, path: str | Path
) -> Path:
    """Write an adapter's modules to a folder in PEFT's format: see `Adapter.save`.

    Args:
        modules: updates by module path, in a sum of adapters by 'path@part'.
        name: the adapter's, for error messages.
        base_model: the base that the config is to name.
        path: the folder; created where it is missing.

    Returns:
        The folder.

    Raises:
        AdapterError: see `Adapter.save`.
        UnsupportedAdapterError: see `Adapter.save`.
    """
    bare = _without_tags(modules, name)
    for module, update in bare.items():
        _refuse_scaled(module, update, len(bare))
    whole = {module: u for module, u in bare.items() if isinstance(u, TrainedModule)}
    factors = {module: u for module, u in bare.items() if isinstance(u, LoRAFactors)}
    for module, own in factors.items():
        _refuse(module, own)
    _refuse_mixtures(name, factors)
    factors = {module: _plain(own, factors) for module, own in factors.items()}
    config = _config(factors, whole, base_model)
    tensors = _tensors(factors) | trained_tensors(whole)
    _require_read_back(config, tensors, factors)
    return _write(config, tensors, Path(path))


def _without_tags(modules: Mapping[str, ModuleUpdate], name: str) -> dict[str, ModuleUpdate]:
    """Updates by bare module path; a sum whose parts share no module is one adapter."""
    bare: dict[str, ModuleUpdate] = {}
    for key, update in modules.items():
        module = key.partition("@")[0]
        if module in bare:
            raise UnsupportedAdapterError(
                f"{module} has two updates in {name}, and PEFT's format holds one. Save each part "
                "by itself, adapter.only('*@name').save(…), and load both in PEFT."
            )
        bare[module] = update
    return bare


def _refuse_scaled(module: str, update: ModuleUpdate, module_count: int) -> None:
    is_whole = isinstance(update, TrainedModule)
    if update.strength * (1.0 if is_whole else update.scale) == 0:
        remedy = f"; leave it out with adapter.without({module!r})" if module_count > 1 else ""
        raise AdapterError(f"{module}: its scale is zero, so it has no update to save{remedy}.")
    if update.strength == 1:
        return
    if is_whole:
        what = "a trained module"
    elif update.magnitude is not None:
        what = "DoRA's update"
    elif update.trained_bias is not None:
        what = "a trained bias"
    else:
        return
    raise UnsupportedAdapterError(
        f"{module}: {what} times {update.strength:g} cannot be written without the base model's "
        "weights; save the adapter unscaled, and scale it when it is loaded."
    )


def _refuse(module: str, factors: LoRAFactors) -> None:
    if factors.width is None:
        raise AdapterError(
            f"{module}: a constant that does not say how many features the module reads, and "
            "PEFT's file holds an A of that width; make it with Adapter.constant(vectors, "
            "like=model), the Hugging Face base."
        )
    if factors.lora_bias is not None and factors.magnitude is not None:
        raise UnsupportedAdapterError(f"{module}: PEFT has no DoRA with a lora_bias.")
    if factors.lora_bias is not None and _is_embedding(module):
        raise UnsupportedAdapterError(f"{module}: PEFT has no embedding with a lora_bias.")


def _refuse_mixtures(name: str, modules: Mapping[str, LoRAFactors]) -> None:
    """DoRA and lora_bias are settings of a whole LoraConfig."""
    dora = [module for module, f in modules.items() if f.magnitude is not None]
    if dora and len(dora) < len(modules):
        plain = next(module for module in modules if module not in dora)
        raise UnsupportedAdapterError(
            f"{name}: {dora[0]} is DoRA and {plain} is not, and PEFT's format knows one kind an "
            "adapter; save them apart with adapter.only(…)."
        )
    biased = [module for module, f in modules.items() if f.lora_bias is not None]
    embeddings = [module for module in modules if _is_embedding(module)]
    if biased and embeddings:
        raise UnsupportedAdapterError(
            f"{name}: {biased[0]} has a lora_bias, which PEFT would then want of the embedding "
            f"{embeddings[0]} too and refuses there; save them apart with adapter.only(…)."
        )


def _is_embedding(module: str) -> bool:
    """Whether PEFT knows the module's factors as lora_embedding_A and B: by its name.

    Raises:
        UnsupportedAdapterError: a name like an embedding's that no family has.
    """
    last = module.rpartition(".")[2]
    if last in _EMBEDDINGS:
        return True
    if "emb" in last and last not in HEADS:
        raise UnsupportedAdapterError(
            f"{module}: its factors do not tell whether it is an embedding or a linear module, "
            "which PEFT writes under different names; leave it out with adapter.without(…)."
        )
    return False


def _plain(factors: LoRAFactors, modules: Mapping[str, LoRAFactors]) -> LoRAFactors:
    """With the strength in the scale, and a zero lora_bias where other modules have one."""
    bias = factors.lora_bias
    if bias is None and any(f.lora_bias is not None for f in modules.values()):
        bias = factors.B.new_zeros(len(factors.B))
    scale = factors.scale * factors.strength
    return dataclasses.replace(factors, scale=scale, strength=1.0, lora_bias=bias)


def _config(
    modules: Mapping[str, LoRAFactors], whole: Mapping[str, TrainedModule], base_model: str | None
) -> LoraConfig:
    from peft import LoraConfig

    ranks = {module: factors.rank for module, factors in modules.items()}
    alphas = {module: _alpha(factors) for module, factors in modules.items()}
    rank, alpha = (Counter(d.values() or [8]).most_common(1)[0][0] for d in (ranks, alphas))
    biased = any(factors.trained_bias is not None for factors in modules.values())
    fields: dict[str, Any] = {"bias": "lora_only" if biased else "none", **trained_fields(whole)}
    if any(factors.lora_bias is not None for factors in modules.values()):
        fields["lora_bias"] = True
    return LoraConfig(
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=list(modules) or _NO_TARGETS,
        r=int(rank),
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it, whole or not
        rank_pattern={module: r for module, r in ranks.items() if r != rank},
        alpha_pattern={module: a for module, a in alphas.items() if a != alpha},
        use_dora=any(factors.magnitude is not None for factors in modules.values()),
        **fields,
    )


def _alpha(factors: LoRAFactors) -> float:
    """α with α/r = s; a whole number where that is exact."""
    alpha = factors.scale * factors.rank
    return round(alpha) if round(alpha) / factors.rank == factors.scale else alpha


def _tensors(modules: Mapping[str, LoRAFactors]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for module, factors in modules.items():
        names = {"lora_bias": ".lora_B.bias", "trained_bias": ".base_layer.bias"}
        names |= {"magnitude": ".lora_magnitude_vector", "base_weight": ".base_layer.weight"}
        if _is_embedding(module):
            names |= {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
        else:
            names |= {"A": ".lora_A.weight", "B": ".lora_B.weight"}
        for name, suffix in names.items():
            tensor = getattr(factors, name)
            if tensor is not None:
                found[PREFIX + module + suffix] = tensor.detach().cpu().clone().contiguous()
    return found


def _require_read_back(
    config: LoraConfig, tensors: Mapping[str, Tensor], modules: Mapping[str, LoRAFactors]
) -> None:
    """PEFT's patterns are regular expressions: refuse paths that they take for one another."""
    read, _ = factors_of(config, tensors, "the adapter as it would be saved")
    for module, factors in modules.items():
        found = cast(LoRAFactors, read[module]).scale
        if abs(found - factors.scale) > 4 * torch.finfo(torch.float64).eps * abs(factors.scale):
            raise UnsupportedAdapterError(
                f"{module}: PEFT would read its scale as {found:g}, not {factors.scale:g}, because "
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
