"""`modules_to_save`: which modules its names cover, and whether the file holds all of them.

PEFT copies every module whose path ends in a name, with all that is in it, and cannot load a file
that lacks one. Which modules the model has is known from the families that have all of the file's,
up to the file's last layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lens_lora.adapters.peft_variants import classifier_note
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.families import FAMILIES, Family

__all__ = ["is_copy", "require_saved"]


def is_copy(config: Any, path: str) -> bool:
    """Whether `modules_to_save` names the module, or one that it is in.

    Args:
        config: PEFT's LoraConfig.
        path: of the module.
    """
    return any(_covers(name, path) for name in config.modules_to_save or ())


def require_saved(config: Any, paths: Iterable[str], whole: Iterable[str], source: str) -> None:
    """Check that the file holds every module that `modules_to_save` names.

    Args:
        config: PEFT's LoraConfig.
        paths: of all modules in the file, as the causal language model has them.
        whole: of those that were trained whole.
        source: the adapter's file, for messages.

    Raises:
        AdapterError: a module is missing, or `modules_to_save` is no list of names.
        UnsupportedAdapterError: a classifier's head is.
    """
    names = config.modules_to_save or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise AdapterError(
            f"{source}: modules_to_save is {names!r}; expected a list of modules' names."
        )
    paths, held = list(paths), set(whole)
    families = [f for f in FAMILIES if all(f.place(path) is not None for path in paths)]
    for name in names:
        lacking = _lacking(name, paths, held, families)
        if lacking:
            note = classifier_note(config)
            raise (UnsupportedAdapterError if note else AdapterError)(
                f"{source}: modules_to_save names {name!r}, and the file lacks "
                f"{', '.join(lacking[:3])}; it is incomplete, or the two files do not belong "
                f"together.{note}"
            )


def _lacking(name: str, paths: list[str], held: set[str], families: list[Family]) -> list[str]:
    """What the name covers and the file has not, by the family that lacks least."""
    if any(_covers(name, path) for path in held) and not families:
        return []
    wanted = [{p for p in _paths(f, paths) if _covers(name, p)} for f in families]
    if any(wanted):
        return min((sorted(own - held) for own in wanted if own), key=len)
    is_other_s = any(_covers(name, p) for f in FAMILIES for p in f.every_path())
    return [] if families and is_other_s else [f"a module {name}"]


def _paths(family: Family, paths: list[str]) -> list[str]:
    """The family's modules, with the layers up to the last that is in the file."""
    places = [family.place(path) for path in paths]
    last = max((p.layer for p in places if p is not None and p.layer is not None), default=-1)
    found: list[str] = []
    for path in family.every_path():
        numbers = range(last + 1) if "{l}" in path else [0]
        found += [path.format(l=number) for number in numbers]
    return found


def _covers(name: str, path: str) -> bool:
    parts = path.split(".")
    return any(".".join(parts[:n]).endswith(name) for n in range(1, len(parts) + 1))
