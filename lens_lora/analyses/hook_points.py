"""Hook points by name, glob or predicate: what `names` means wherever it is an argument."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence

from lens_lora.errors import SiteError
from lens_lora.lens import LoraLens

__all__ = ["Names", "known_point", "resolved"]

Names = str | Sequence[str] | Callable[[str], bool]


def resolved(lens: LoraLens, names: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names given in full, and all that are wanted, in order.

    Args:
        lens: the adapter over the model.
        names: a hook point, several, globs, or a predicate.

    Raises:
        SiteError: a name or glob that matches nothing, with the nearest names; no name at all.
    """
    known = list(lens.model.hook_dict)
    if not isinstance(names, Iterable) and not callable(names):
        raise SiteError(f"names={names!r}; give a hook point, several, globs, or a predicate.")
    if not isinstance(names, str) and callable(names):
        wanted = [name for name in known if names(name)]
        if not wanted:
            raise SiteError(f"the predicate is true of none of the model's {len(known)} points.")
        return (), tuple(wanted)
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise SiteError("no hook point is named; give a name, a glob, or a predicate.")
    found: dict[str, None] = {}
    for pattern in given:
        is_glob = isinstance(pattern, str) and pattern not in known
        hits = fnmatch.filter(known, pattern) if is_glob else []
        found.update(dict.fromkeys(hits or [known_point(lens, pattern)]))
    return tuple(name for name in given if name in known), tuple(found)


def known_point(lens: LoraLens, name: str) -> str:
    """The name, if the model has such a hook point.

    Args:
        lens: the adapter over the model.
        name: of the hook point, in full.

    Raises:
        SiteError: it has none, with the nearest names.
    """
    known = list(lens.model.hook_dict)
    if not isinstance(name, str):
        raise SiteError(f"{name!r} names no hook point; give a string.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise SiteError(f"the model has no hook point {name!r}; the nearest are {near}.")
    return name
