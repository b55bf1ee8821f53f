"""Trained modules, rows of tokens and biases in PEFT's format → `TrainedModule`, by module path.

1. A module that `modules_to_save` names is a copy of its own. A parameter that it does not name is
   loaded by PEFT into the base's own (an embedding stored whole, a bias): what the base ties to it
   changes too.
2. The ids of trained rows stand in the config alone (`trainable_token_indices`). PEFT lets a tied
   head follow the embedding's rows, unless the config gives the head other ids.
3. Whatever the config names must be in the file, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora.adapters.peft_paths import PREFIX, is_known
from lens_lora.adapters.peft_saved import is_copy
from lens_lora.adapters.trained import TrainedModule
from lens_lora.errors import AdapterError
from lens_lora.families import HEADS

__all__ = [
    "head_follows",
    "trained_fields",
    "trained_module",
    "trained_modules",
    "trained_tensors",
    "unknown_keys",
]


_NAMES = {"weight": ".weight", "base_weight": ".original_module.weight", "bias": ".bias"}
_NAMES_OF_ROWS = {
    "weight": ".token_adapter.trainable_tokens_delta",
    "base_weight": ".token_adapter.base_layer.weight",
}


def trained_modules(
    config: Any, tensors: Mapping[str, Mapping[str, Tensor]], source: str
) -> dict[str, TrainedModule]:
    """Every module without factors, by the file's paths.

    Args:
        config: PEFT's LoraConfig.
        tensors: of each such module by role, 'weight', 'bias', 'token_rows' and 'base_weight'.
        source: the adapter's file, for messages.

    Raises:
        AdapterError: config and tensors do not say the same, or tensors do not fit together.
    """
    _require_rows(config, tensors, source)
    found: dict[str, TrainedModule] = {}
    for path, own in tensors.items():
        if "token_rows" in own and _is_named_elsewhere(config, path):
            _require_rows_of_another(path, own["token_rows"], tensors, source)
            continue
        ids = _ids_of(config, path, source) if "token_rows" in own else None
        tied = (
            head_follows(path, config.trainable_token_indices)
            if ids is not None
            else not is_copy(config, path)
        )
        found[path] = trained_module(path, own, ids, tied, source)
    return found


def trained_module(
    path: str,
    tensors: Mapping[str, Tensor],
    ids: Int[Tensor, "row"] | None,
    tied: bool,
    source: str,
) -> TrainedModule:
    """One module from its tensors by role.

    Args:
        path: the module's.
        tensors: by role.
        ids: of the trained rows, where there are such.
        tied: whether what the base ties to the module changes with it.
        source: the adapter's file or model, for messages.

    Raises:
        AdapterError: the tensors do not fit together.
    """
    weight = tensors.get("weight")
    weight = tensors.get("token_rows") if weight is None else weight
    try:
        return TrainedModule(
            weight=weight,
            bias=tensors.get("bias"),
            tokens=ids,
            base_weight=tensors.get("base_weight"),
            tied=tied and weight is not None,
        )
    except AdapterError as error:
        raise AdapterError(f"{source}, module {path}: {error}") from error


def head_follows(path: str, indices: Any) -> bool:
    """Whether PEFT lets a head that is tied to this embedding have its rows.

    Args:
        path: of the module that has trained rows.
        indices: ids, or ids by the name of each module.
    """
    return not _ends_in_head(path) and _same_ids(indices)


def trained_fields(modules: Mapping[str, TrainedModule]) -> dict[str, Any]:
    """What a config says of trained modules, so that PEFT loads them as they are meant.

    Args:
        modules: by path.
    """
    fields: dict[str, Any] = {}
    copies = [p for p, m in modules.items() if m.weight is not None and not _is_in_base(m)]
    copies = [path for path in copies if modules[path].tokens is None]
    if copies:
        fields["modules_to_save"] = copies
    rows = {path: m.tokens.tolist() for path, m in modules.items() if m.tokens is not None}
    if rows:
        fields["trainable_token_indices"] = rows
    if any(m.weight is None for m in modules.values()):
        fields["bias"] = "all"
    return fields


def trained_tensors(modules: Mapping[str, TrainedModule]) -> dict[str, Tensor]:
    """Their tensors by PEFT's keys.

    Args:
        modules: by path.
    """
    found: dict[str, Tensor] = {}
    for path, module in modules.items():
        names = _NAMES if module.tokens is None else _NAMES | _NAMES_OF_ROWS
        for name, suffix in names.items():
            tensor = getattr(module, name)
            if tensor is not None:
                found[PREFIX + path + suffix] = tensor.detach().cpu().clone().contiguous()
    return found


def _is_in_base(module: TrainedModule) -> bool:
    return module.tied and module.tokens is None


def unknown_keys(names: Mapping[str, str], trained: Mapping[str, Iterable[str]]) -> list[str]:
    """The keys of trained modules that no supported family has.

    Args:
        names: path in the causal language model, by path in the file.
        trained: roles of the tensors of each module without factors.
    """
    unknown = [path for path in trained if not is_known(names[path])]
    return [f"{PREFIX}{path}.{role}" for path in unknown for role in trained[path]]


def _require_rows(config: Any, tensors: Mapping[str, Mapping[str, Tensor]], source: str) -> None:
    """Check that the file holds the rows that `trainable_token_indices` names."""
    wanted = config.trainable_token_indices
    rows = [path for path, own in tensors.items() if "token_rows" in own]
    named = list(wanted) if isinstance(wanted, dict) else [] if wanted is None else [""]
    for name in named:
        is_there = any(path.endswith(name) for path in rows)
        if not is_there and not (rows and _ends_in_head(name) and _same_ids(wanted)):
            raise AdapterError(
                f"{source}: trainable_token_indices={wanted!r}, and the file holds no rows"
                f"{f' of {name}' if name else ''}; the two files do not belong together."
            )


def _ids_of(config: Any, path: str, source: str) -> Int[Tensor, "row"]:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        indices = next((ids for name, ids in indices.items() if path.endswith(name)), None)
    try:
        is_list = isinstance(indices, list | tuple) and all(type(i) is int for i in indices)
        ids = torch.tensor(indices if is_list else None, dtype=torch.long)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterError(
            f"{source}, module {path}: the file holds trained rows of tokens, and the config says "
            f"of which: trainable_token_indices={config.trainable_token_indices!r}; expected ids."
        ) from error
    return ids


def _is_named_elsewhere(config: Any, path: str) -> bool:
    """Whether these are the embedding's rows, stored once more as those of a head tied to it."""
    indices = config.trainable_token_indices
    is_named = isinstance(indices, dict) and any(path.endswith(name) for name in indices)
    return _ends_in_head(path) and indices is not None and not is_named


def _require_rows_of_another(
    path: str, rows: Tensor, tensors: Mapping[str, Mapping[str, Tensor]], source: str
) -> None:
    others = [own["token_rows"] for p, own in tensors.items() if p != path and "token_rows" in own]
    if not any(torch.equal(rows, other) for other in others):
        raise AdapterError(
            f"{source}, module {path}: it has trained rows of its own, and the config's "
            "trainable_token_indices does not name it; the two files do not belong together."
        )


def _same_ids(indices: Any) -> bool:
    """Whether the config gives a head no other ids than the embedding."""
    if not isinstance(indices, dict):
        return True
    of_heads = [ids for name, ids in indices.items() if _ends_in_head(name)]
    others = [ids for name, ids in indices.items() if not _ends_in_head(name)]
    return all(ids in others for ids in of_heads if ids is not None)


def _ends_in_head(path: str) -> bool:
    return path.rpartition(".")[2] in HEADS
