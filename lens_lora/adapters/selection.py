"""Which modules of an adapter a glob, or a table of sites, names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lens_lora.errors import ArgumentError, SiteError

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["matching", "named_in"]


def matching(modules: Iterable[str], name: str, globs: Iterable[Any]) -> set[str]:
    """The keys that match one of the globs, with or without the name of their part.

    Args:
        modules: the adapter's keys.
        name: the adapter's, for messages.
        globs: each must match something.

    Raises:
        SiteError: a glob matches nothing.
        ArgumentError: a glob that is no string.
    """
    modules = list(modules)
    matched: set[str] = set()
    for glob in globs:
        if not isinstance(glob, str):
            raise ArgumentError(
                f"{glob!r} names no modules; expected a glob of module paths, like '*.q_proj'."
            )
        hits = [
            key
            for key in modules
            if fnmatch.fnmatch(key, glob) or fnmatch.fnmatch(key.partition("@")[0], glob)
        ]
        if not hits:
            raise SiteError(
                f"{glob!r} matches no module of {name}; its modules are like "
                f"{', '.join(modules[:4])}."
            )
        matched.update(hits)
    return matched


def named_in(modules: Iterable[str], name: str, table: DataFrame) -> set[str]:
    """The keys of a table's modules, with the part of a sum that its sites name.

    Args:
        modules: the adapter's keys.
        name: the adapter's, for messages.
        table: with a column 'module', and perhaps 'site'.

    Raises:
        SiteError: a module that is not here.
        ArgumentError: no column 'module'.
    """
    modules = list(modules)
    if "module" not in table.columns:
        raise ArgumentError(
            f"a table with the columns {list(table.columns)}; expected a column 'module', as "
            "attribution.top(k) has it (of effects: effects.attribution().top(k))."
        )
    sites = table["site"] if "site" in table.columns else [""] * len(table)
    keys: set[str] = set()
    for module, site in zip(table["module"], sites, strict=True):
        part = str(site).partition("@")[2]
        hits = [
            key
            for key in modules
            if key == f"{module}@{part}" or (not part and key.partition("@")[0] == module)
        ]
        if not hits:
            raise SiteError(
                f"the table names {module!r} (site {site!r}), which {name} does not "
                "adapt; was it computed with another adapter?"
            )
        keys.update(hits)
    return keys
