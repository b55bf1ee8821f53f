"""The keys of PEFT's tensors: the module that a tensor belongs to, and its role there.

1. `saved_keys` brings the keys into the form in which PEFT saves them. An adapter's name inside the
   keys ('lora_A.default.weight'), which PEFT takes out when it saves, is taken out if all keys have
   the same one; PEFT's own prefix is put in if all lack it.
2. `by_module` accounts for every key. Tensors that PEFT would leave out are left over, and refused
   by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lens_lora.errors import AdapterError

# A module's tensors by role: 'A', 'B', 'lora_bias', 'weight', …
Roles = Mapping[str, Tensor]

PREFIX = "base_model.model."
# How the key of each tensor ends, by the tensor's role: first for the factors of a linear map.
LORA_KEYS = {
    "A": ".lora_A.weight",
    "B": ".lora_B.weight",
    "lora_bias": ".lora_B.bias",
    "trained_bias": ".base_layer.bias",
    "magnitude": ".lora_magnitude_vector",
    "base_weight": ".base_layer.weight",
}
# The same for the factors of an embedding.
EMBEDDING_KEYS = LORA_KEYS | {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
# The same for a module that was trained whole.
COPY_KEYS = {"weight": ".weight", "bias": ".bias", "base_weight": ".original_module.weight"}
# The same for trained rows of an embedding or a head.
ROW_KEYS = {
    "token_rows": ".token_adapter.trainable_tokens_delta",
    "bias": ".bias",
    "base_weight": ".token_adapter.base_layer.weight",
}
_ROLES: dict[str, str] = {}
for _keys in (LORA_KEYS, EMBEDDING_KEYS, COPY_KEYS, ROW_KEYS):
    for _role, _suffix in _keys.items():
        _ROLES[_suffix] = _role
FACTORS = frozenset({"A", "B"})
_TRAINED = {"weight", "bias", "token_rows"}
# A key of factors or rows, perhaps with the adapter's name behind the parameter's.
_KEY = re.compile(
    r"(?P<stem>.*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)"
    r"|token_adapter\.trainable_tokens_delta))"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?P<end>\.weight|\.bias)?"
)
_COPY = re.compile(r"(?P<stem>.*)\.modules_to_save\.(?:(?P<name>[^.]+)\.)?(?P<end>.*)")
# Tensors beside the trained ones that PEFT does not use while the adapter is active.
_INERT = re.compile(
    r".*\.(?:original_module\.bias|token_adapter\.base_layer\.bias"
    r"|token_adapter\.trainable_tokens_original(?:\.[^.]+)?)"
)


class _SavedKey(NamedTuple):
    """A key as PEFT saves it.

    Attributes:
        key: the key, without an adapter's name in it.
        may_hold_name: whether a live model's key of this kind holds the adapter's name.
        name: the adapter's name that was in it.
    """

    key: str
    may_hold_name: bool = False
    name: str | None = None


def saved_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the keys that PEFT saves, and notes on how the keys differed.

    Raises:
        AdapterError: two keys of one tensor whose values differ.
    """
    saved: dict[str, Tensor] = {}
    names: set[str | None] = set()
    for key, tensor in state.items():
        if _INERT.fullmatch(key):
            continue
        plain = _saved_key(key, state)
        if plain.key in saved and not torch.equal(saved[plain.key], tensor):
            raise AdapterError(
                f"{key} and {plain.key} are one tensor, and differ in the file; it mixes two "
                "adapters."
            )
        saved[plain.key] = tensor
        if plain.may_hold_name:
            names.add(plain.name)

    notes: list[str] = []
    if len(names) > 1:
        # Perhaps two adapters in one file: the keys stay, and are refused later.
        saved = dict(state)
    else:
        for name in names - {None}:
            notes.append(f"its keys carry the adapter's name, {name!r}, which PEFT takes out")
    if saved and not any(key.startswith(PREFIX) for key in saved):
        saved = {PREFIX + key: tensor for key, tensor in saved.items()}
        notes.append(f"its keys lack PEFT's prefix {PREFIX!r}")
    return saved, notes


def _saved_key(key: str, state: Mapping[str, Tensor]) -> _SavedKey:
    copy = _COPY.fullmatch(key)
    if copy is not None:
        whole = key.replace(".modules_to_save.", ".", 1)
        if whole in state or copy["name"] is None:
            return _SavedKey(whole)
        return _SavedKey(f"{copy['stem']}.{copy['end']}", may_hold_name=True, name=copy["name"])
    match = _KEY.fullmatch(key)
    if match is None:
        return _SavedKey(key)
    end = match["end"] or ""
    if match["stem"].endswith("lora_magnitude_vector") and end == ".weight":
        end = ""  # as a live model's layer calls it
    return _SavedKey(match["stem"] + end, may_hold_name=True, name=match["name"])


def by_module(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each module path by role, and the keys that belong to no module.

    A module has factors, with what PEFT puts beside them, or parameters that were trained.

    Args:
        state: tensors by the keys that PEFT saves.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    for key, tensor in state.items():
        path = key.removeprefix(PREFIX)
        suffix = _longest_suffix(path)
        if suffix is None or path == key or "@" in key:
            left_over.append(key)
            continue
        role = _ROLES[suffix]
        roles = modules.setdefault(path.removesuffix(suffix), {})
        if role in roles:
            left_over.append(key)
        roles[role] = tensor
    for path in list(modules):
        misplaced = _misplaced(set(modules[path]))
        if misplaced:
            del modules[path]
            left_over += [f"{PREFIX}{path}.{role}" for role in sorted(misplaced)]
    return modules, left_over


def _longest_suffix(path: str) -> str | None:
    """The longest end of a key that says a role, as '.weight' is the end of others."""
    return max((suffix for suffix in _ROLES if path.endswith(suffix)), key=len, default=None)


def _misplaced(roles: set[str]) -> set[str]:
    """The roles that do not go with the module's others: PEFT would not read these tensors."""
    if roles & FACTORS:
        return roles & _TRAINED
    is_replaced = bool(roles & {"weight", "token_rows"})
    allowed = _TRAINED | {"base_weight"} if is_replaced else _TRAINED
    return roles - allowed
