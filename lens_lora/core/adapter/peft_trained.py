"""Modules that PEFT trained whole, rows of tokens, and biases.

A module that `modules_to_save` names is a copy of its own. A parameter that it does not name is
loaded by PEFT into the base's own (an embedding stored whole, a bias): what the base ties to it
changes too. The ids of trained rows stand in the config alone (`trainable_token_indices`); PEFT
lets a tied head follow the embedding's rows, unless the config gives the head other ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_lora.core.adapter.factors import TrainedModule
from lens_lora.core.adapter.peft_keys import Roles
from lens_lora.core.adapter.peft_variants import classifier_note
from lens_lora.errors import AdapterError, UnsupportedAdapterError, located
from lens_lora.families import FAMILIES, HEADS, Family

# The config's ids of trained rows, by the end of a module's path; '' stands for any module.
_IdsByModule = Mapping[str, Any]


def trained_modules(config: Any, modules: Mapping[str, Roles]) -> dict[str, TrainedModule]:
    """The update of every module without factors, by the file's paths.

    Args:
        config: the configuration as PEFT reads it.
        modules: the tensors of each by role.

    Raises:
        AdapterError: rows of tokens whose ids the config does not have, or the other way round.
    """
    ids = _ids_by_module(config)
    rows = {path: roles["token_rows"] for path, roles in modules.items() if "token_rows" in roles}
    _require_rows(ids, rows)
    updates: dict[str, TrainedModule] = {}
    names_of_copies = config.modules_to_save or ()
    for path, roles in modules.items():
        with located(f"module {path}"):
            if path not in rows:
                is_copy = any(covers(name, path) for name in names_of_copies)
                updates[path] = trained_module(roles, None, tied=not is_copy)
                continue
            if _is_stored_twice(ids, path, rows):
                continue
            is_followed = head_follows(path, ids)
            updates[path] = trained_module(roles, _ids_of(path, ids), tied=is_followed)
    return updates


def trained_module(roles: Roles, ids: Int[Tensor, " row"] | None, *, tied: bool) -> TrainedModule:
    """One module from its tensors by role.

    Args:
        roles: its tensors.
        ids: the ids of its rows, where only rows were trained.
        tied: whether what the base ties to its weight changes with it.
    """
    return TrainedModule(
        weight=roles.get("weight", roles.get("token_rows")),
        bias=roles.get("bias"),
        tokens=ids,
        base_weight=roles.get("base_weight"),
        tied=tied and set(roles) != {"bias"},
    )


def head_follows(path: str, ids: _IdsByModule) -> bool:
    """Whether PEFT lets a head that is tied to this embedding have its rows."""
    return not ends_in_head(path) and _heads_have_the_same_ids(ids)


def ends_in_head(path: str) -> bool:
    """Whether this is the path of a language model's head."""
    return path.rpartition(".")[2] in HEADS


# --- The modules that `modules_to_save` names


def require_copies(config: Any, paths: Collection[str], copied: set[str]) -> None:
    """Check that the file holds every module that `modules_to_save` names.

    PEFT copies every module whose path ends in a name, with all that is in it, and cannot load a
    file that lacks one. The families that have all of the file's modules tell which ones the model
    has, up to the file's last layer.

    Args:
        config: the configuration as PEFT reads it.
        paths: the paths of all modules of the file, in the causal language model.
        copied: the paths of those that were trained whole.

    Raises:
        AdapterError: a module that the file lacks.
    """
    names = config.modules_to_save or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"modules_to_save is {names!r}; expected a list of module names.")
    if not names:
        return
    families: list[Family] = []
    for family in FAMILIES:
        has_all = all(family.place(path) for path in paths)
        if has_all:
            families.append(family)
    for name in names:
        lacking = _lacking(name, paths, copied, families)
        if lacking:
            note = classifier_note(config)
            error = UnsupportedAdapterError if note else AdapterError
            raise error(
                f"modules_to_save names {name!r}, and the file lacks {', '.join(lacking[:3])}; it "
                f"is incomplete, or the two files do not belong together.{note}"
            )


def covers(name: str, path: str) -> bool:
    """Whether the module, or one that it is in, has a path that ends in the name."""
    return f"{name}." in f"{path}."


def _lacking(
    name: str, paths: Collection[str], copied: set[str], families: list[Family]
) -> list[str]:
    """The modules that the name covers and the file lacks, for the family that lacks fewest."""
    lacking_by_family: list[list[str]] = []
    for family in families:
        covered = {path for path in _paths_of(family, paths) if covers(name, path)}
        if covered:
            lacking_by_family.append(sorted(covered - copied))
    if lacking_by_family:
        return min(lacking_by_family, key=len)
    # The name may stand for a module of other families alone; of an unknown model, the file tells.
    known: Iterable[str] = copied
    if families:
        known = itertools.chain.from_iterable(family.every_path() for family in FAMILIES)
    is_known = any(covers(name, path) for path in known)
    return [] if is_known else [f"a module {name}"]


def _paths_of(family: Family, paths: Iterable[str]) -> list[str]:
    """The family's modules, with the layers up to the last that is in the file."""
    places = [family.place(path) for path in paths]
    layers = [place.layer for place in places if place is not None and place.layer is not None]
    last = max(layers, default=-1)
    found: list[str] = []
    for path in family.every_path():
        if "{l}" in path:
            found += [path.format(l=layer) for layer in range(last + 1)]
        else:
            found.append(path)
    return found


# --- Rows of tokens


def _ids_by_module(config: Any) -> _IdsByModule:
    indices = config.trainable_token_indices
    if indices is None:
        return {}
    return indices if isinstance(indices, dict) else {"": indices}


def _require_rows(ids: _IdsByModule, rows: Collection[str]) -> None:
    """Check that the file holds the rows that `trainable_token_indices` names."""
    for name, tokens in ids.items():
        is_there = any(path.endswith(name) for path in rows)
        is_tied_head = bool(rows) and ends_in_head(name) and _heads_have_the_same_ids(ids)
        if not is_there and not is_tied_head:
            of_module = f" of {name}" if name else ""
            raise AdapterError(
                f"trainable_token_indices has the ids {tokens!r}, and the file holds no rows"
                f"{of_module}; the two files do not belong together."
            )


def _is_stored_twice(ids: _IdsByModule, path: str, rows: Roles) -> bool:
    """Whether these are the embedding's rows, stored once more as those of a head tied to it."""
    is_named = any(name and path.endswith(name) for name in ids)
    if is_named or not ids or not ends_in_head(path):
        return False
    if not any(torch.equal(rows[path], rows[other]) for other in rows if other != path):
        fact = "it has trained rows of its own, and the config's trainable_token_indices lacks it"
        raise AdapterError(f"{fact}; the two files do not belong together.")
    return True


def _ids_of(path: str, ids: _IdsByModule) -> Int[Tensor, " row"]:
    """The ids of a module's rows, as the config has them."""
    of_path = [tokens for name, tokens in ids.items() if path.endswith(name)]
    tokens = of_path[0] if of_path else None
    is_list = isinstance(tokens, list | tuple)
    if not is_list or not all(type(token) is int and abs(token) < 2**63 for token in tokens):
        stated = f"the config's trainable_token_indices gives {tokens!r} for them"
        raise AdapterError(f"the file holds trained rows of tokens, and {stated}; expected ids.")
    return torch.tensor(tokens, dtype=torch.long)


def _heads_have_the_same_ids(ids: _IdsByModule) -> bool:
    """Whether the config gives a head no other ids than the embedding."""
    of_heads = [tokens for name, tokens in ids.items() if ends_in_head(name)]
    of_others = [tokens for name, tokens in ids.items() if not ends_in_head(name)]
    return all(tokens in of_others for tokens in of_heads if tokens is not None)
