"""Factors by module path → a folder in PEFT's adapter format.

1. What PEFT cannot say in one LoraConfig is refused: two updates of one module, DoRA on some
   modules only, a part of a trained bias or of DoRA's update (`strength`).
2. α = s·r per module; r and α that are not the most common ones stand in the patterns under the
   module's whole path.
3. The config and the tensors are read back by the reader of `load_adapter`, and must be the
   factors that were given, before a file is written.
4. PEFT writes the config, safetensors the tensors, into a folder beside the target; then the files
   are moved to it, replacing files of the same names, as PEFT does.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_files import CONFIG, WEIGHTS
from lens_lora.adapters.peft_paths import PREFIX
from lens_lora.adapters.peft_read import factors_of
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.families import FAMILIES

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["save_adapter"]

_EMBEDDINGS = {path.rpartition(".")[2] for f in FAMILIES for path in (f.embed, f.pos_embed) if path}
_HEADS = ("lm_head", "embed_out")


def save_adapter(
    modules: Mapping[str, LoRAFactors], name: str, base_model: str | None, path: str | Path
) -> Path:
    """Write an adapter's modules to a folder in PEFT's format: see `Adapter.save`.

    Args:
        modules: factors by module path, in a sum of adapters by 'path@part'.
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
    for module, factors in bare.items():
        _refuse(module, factors, len(bare))
    _refuse_mixtures(name, bare)
    bare = {module: _plain(factors, bare) for module, factors in bare.items()}
    config, tensors = _config(bare, base_model), _tensors(bare)
    _require_read_back(config, tensors, bare)
    return _write(config, tensors, Path(path))


def _without_tags(modules: Mapping[str, LoRAFactors], name: str) -> dict[str, LoRAFactors]:
    """Factors by bare module path; a sum whose parts share no module is one adapter."""
    bare: dict[str, LoRAFactors] = {}
    for key, factors in modules.items():
        module = key.partition("@")[0]
        if module in bare:
            raise UnsupportedAdapterError(
                f"{module} has two updates in {name}, and PEFT's format holds one. Save each part "
                "by itself, adapter.only('*@name').save(…), and load both in PEFT."
            )
        bare[module] = factors
    return bare


def _refuse(module: str, factors: LoRAFactors, module_count: int) -> None:
    if factors.scale * factors.strength == 0:
        remedy = f"; leave it out with adapter.without({module!r})" if module_count > 1 else ""
        raise AdapterError(f"{module}: its scale is zero, so it has no update to save{remedy}.")
    needs_base = factors.trained_bias is not None or factors.magnitude is not None
    if needs_base and factors.strength != 1:
        what = "DoRA's update" if factors.magnitude is not None else "a trained bias"
        raise UnsupportedAdapterError(
            f"{module}: {what} times {factors.strength:g} cannot be written without the base "
            "model's weights; save the adapter unscaled, and scale it when it is loaded."
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
    if "emb" in last and last not in _HEADS:
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


def _config(modules: Mapping[str, LoRAFactors], base_model: str | None) -> LoraConfig:
    from peft import LoraConfig

    ranks = {module: factors.rank for module, factors in modules.items()}
    alphas = {module: _alpha(factors) for module, factors in modules.items()}
    rank, alpha = (Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    fields: dict[str, Any] = {}
    if any(factors.lora_bias is not None for factors in modules.values()):
        fields["lora_bias"] = True
    return LoraConfig(
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
        target_modules=list(modules),
        r=int(rank),
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it, whole or not
        rank_pattern={module: r for module, r in ranks.items() if r != rank},
        alpha_pattern={module: a for module, a in alphas.items() if a != alpha},
        use_dora=any(factors.magnitude is not None for factors in modules.values()),
        bias="lora_only" if any(f.trained_bias is not None for f in modules.values()) else "none",
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
        found = read[module].scale
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
