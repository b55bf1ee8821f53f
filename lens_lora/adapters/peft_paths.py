"""The keys of a PEFT file: which module each tensor belongs to, and which factor it is.

1. Every key is accounted for: what is no factor of a module is handed back.
2. An adapter's name inside the keys ('lora_A.default.weight'), which PEFT takes out when it saves,
   is taken out where all keys carry the same one; PEFT's own prefix is put in where all lack it.
3. What wraps a model while it is trained (torch.compile, FSDP, PEFT twice, a vision-language model)
   is taken out of the paths; where all were trained on the model without its head (AutoModel), the
   name that the causal language model has before them is put in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lens_lora.errors import AdapterError
from lens_lora.families import FAMILIES

__all__ = ["PREFIX", "by_module", "is_known", "model_paths", "saved_keys"]

PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "token_rows",
    ".token_adapter.base_layer.weight": "base_weight",
    ".original_module.weight": "base_weight",
    ".base_layer.bias": "trained_bias",
    ".base_layer.weight": "base_weight",
    ".weight": "weight",
    ".bias": "bias",
}
_FACTORS = {"A", "B"}
_TRAINED = {"weight", "bias", "token_rows"}
_KEY = re.compile(
    r"(?P<stem>.*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)"
    r"|token_adapter\.trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_COPY = re.compile(r"(?P<stem>.*)\.modules_to_save\.(?:(?P<name>[^.]+)\.)?(?P<end>.*)")
# What stands beside the trained tensors and is not used while the adapter is active.
_INERT = re.compile(
    r".*\.(?:original_module\.bias|token_adapter\.base_layer\.bias"
    r"|token_adapter\.trainable_tokens_original(?:\.[^.]+)?)"
)
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARTS = ("module", "language_model")
_BEFORE_LAYERS = ("model.", "transformer.", "gpt_neox.")


def saved_keys(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state with keys as PEFT saves them, and what about the keys was read otherwise.

    Args:
        state: tensors by key.
        source: the adapter's file, for error messages.

    Raises:
        AdapterError: one module is stored twice, and differently.
    """
    notes: list[str] = []
    kept, names = _without_names(state, source)
    if len(names) > 1:
        kept, names = dict(state), set()
    if names - {None}:
        notes.append(f"keys carry the adapter's name, {names.pop()!r}, which PEFT takes out")
    if kept and not any(key.startswith(PREFIX) for key in kept):
        kept = {PREFIX + key: tensor for key, tensor in kept.items()}
        notes.append(f"keys lack PEFT's prefix {PREFIX!r}")
    return kept, notes


def _without_names(
    state: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Tensor], set[str | None]]:
    """The state under the keys that PEFT saves, and the names, None for a key without one."""
    found: dict[str, Tensor] = {}
    names: set[str | None] = set()
    for key, tensor in state.items():
        if _INERT.fullmatch(key):
            continue
        saved, own = _saved_key(key, state)
        if saved in found and not torch.equal(found[saved], tensor):
            raise AdapterError(
                f"{source}: {key} and {saved} are one tensor of one module, and the file holds two "
                "different ones; it was put together from two."
            )
        found[saved] = tensor
        names |= own
    return found, names


def _saved_key(key: str, state: Mapping[str, Tensor]) -> tuple[str, set[str | None]]:
    copied = _COPY.fullmatch(key)
    if copied:
        whole = key.replace(".modules_to_save.", ".", 1)
        if whole in state or copied["name"] is None:
            return whole, set()
        return f"{copied['stem']}.{copied['end']}", {copied["name"]}
    match = _KEY.fullmatch(key)
    if match is None:
        return key, set()
    is_dora = match["stem"].endswith("lora_magnitude_vector") and match["end"] == ".weight"
    return match["stem"] + ("" if is_dora else match["end"] or ""), {match["name"]}


def by_module(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Module path → its tensors by role, and the keys that belong to none.

    A module has factors, with what PEFT puts beside them, or parameters that were trained.

    Args:
        state: tensors by key, as PEFT saves them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        suffix = next((s for s in _SUFFIXES if key[len(PREFIX) :].endswith(s)), None)
        if suffix is None or not key.startswith(PREFIX) or "@" in key:
            left_over.append(key)
            continue
        tensors = found.setdefault(key[len(PREFIX) : -len(suffix)], {})
        if _SUFFIXES[suffix] in tensors:
            left_over.append(key)
        tensors[_SUFFIXES[suffix]] = tensor
    odd = {path: _misplaced(set(tensors)) for path, tensors in found.items()}
    left_over += [f"{PREFIX}{path}.{role}" for path, roles in odd.items() for role in sorted(roles)]
    return {path: tensors for path, tensors in found.items() if not odd[path]}, left_over


def _misplaced(roles: set[str]) -> set[str]:
    """The roles that do not go with a module's others: PEFT would not read them."""
    if roles & _FACTORS:
        return roles & _TRAINED
    return roles - _TRAINED - ({"base_weight"} if roles & {"weight", "token_rows"} else set())


def model_paths(paths: Iterable[str], source: str) -> dict[str, str]:
    """Path in the file → path in the causal language model.

    Args:
        paths: module paths as the file has them.
        source: the adapter's file or model, for error messages.

    Raises:
        AdapterError: two paths of the file are one module.
    """
    found = {path: _unwrapped(path) for path in paths}
    if not any(is_known(path) for path in found.values()):
        for prefix in _BEFORE_LAYERS:
            longer = {path: prefix + bare for path, bare in found.items()}
            if all(is_known(path) for path in longer.values()):
                found = longer
                break
    if len(set(found.values())) < len(found):
        of = {bare: path for path, bare in found.items()}
        one, other = next((p, of[bare]) for p, bare in found.items() if of[bare] != p)
        raise AdapterError(
            f"{source}: {one} and {other} are the same module, {found[one]}, and both have "
            "factors; the file was put together from two."
        )
    return found


def is_known(path: str) -> bool:
    """Whether some supported family has a module of this path.

    Args:
        path: of a Hugging Face module.
    """
    return any(family.place(path) is not None for family in FAMILIES)


def _unwrapped(path: str) -> str:
    while path.startswith(PREFIX):
        path = path.removeprefix(PREFIX)
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    path = ".".join(parts).removeprefix(PREFIX)
    if not is_known(path) and is_known(path.removeprefix("model.")):
        return path.removeprefix("model.")
    inner = ".".join(part for part in parts if part not in _PARTS)
    is_inner = any(is_known(before + inner) for before in ("", *_BEFORE_LAYERS))
    return inner if is_inner and not is_known(path) else path
