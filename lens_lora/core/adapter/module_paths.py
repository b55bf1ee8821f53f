"""From the module paths of a file to those of the causal language model.

The wrappers of training (torch.compile, FSDP, PEFT twice, a vision-language model) are taken out of
the paths. If all modules belong to a model without its head (AutoModel), the name that the causal
language model puts before them is put in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

from lens_lora.compat import WRAPPED_NAMES
from lens_lora.core.adapter.factors import ModuleUpdate
from lens_lora.core.adapter.peft_keys import PREFIX
from lens_lora.errors import AdapterError
from lens_lora.families import FAMILIES

# Names of a language model as a part of a larger one.
_PARTS = ("module", "language_model")
# What a causal language model puts before the layers of its model without a head.
_BEFORE_LAYERS = ("model.", "transformer.", "gpt_neox.")


def renamed(updates: Mapping[str, ModuleUpdate], notes: list[str]) -> dict[str, ModuleUpdate]:
    """The updates by module path in the causal language model.

    Args:
        updates: the updates, by the paths of a file.
        notes: a sentence is added if paths differ.
    """
    paths = model_paths(updates)
    changed = [path for path, new in paths.items() if path != new]
    if changed:
        count = f"{len(changed)} module paths are those of a wrapped or headless model"
        notes.append(f"{count}: {changed[0]} is read as {paths[changed[0]]}")
    return {paths[path]: update for path, update in updates.items()}


def model_paths(paths: Iterable[str]) -> dict[str, str]:
    """The path in the causal language model of each path in the file.

    Raises:
        AdapterError: two paths of one module.
    """
    bare_paths = {path: _unwrapped(path) for path in paths}
    if not any(is_known(bare) for bare in bare_paths.values()):
        bare_paths = _with_the_name_of_the_model(bare_paths)
    path_of: dict[str, str] = {}
    for path, bare in bare_paths.items():
        other = path_of.setdefault(bare, path)
        if other != path:
            raise AdapterError(
                f"{other} and {path} are the same module, {bare}; the file mixes adapters."
            )
    return bare_paths


@functools.cache
def is_known(path: str) -> bool:
    """Whether some supported family has a module of this path."""
    return any(family.place(path) is not None for family in FAMILIES)


def _with_the_name_of_the_model(bare_paths: Mapping[str, str]) -> dict[str, str]:
    """The paths as the model with its head has them, if the file's model lacks the head."""
    for prefix in _BEFORE_LAYERS:
        longer = {path: prefix + bare for path, bare in bare_paths.items()}
        if all(is_known(path) for path in longer.values()):
            return longer
    return dict(bare_paths)


def _unwrapped(path: str) -> str:
    """A path without the wrappers of training in it."""
    while path.startswith(PREFIX):
        path = path.removeprefix(PREFIX)
    parts = [part for part in path.split(".") if part not in WRAPPED_NAMES]
    bare = ".".join(parts).removeprefix(PREFIX)
    if is_known(bare):
        return bare
    if is_known(bare.removeprefix("model.")):
        return bare.removeprefix("model.")
    inner = ".".join(part for part in parts if part not in _PARTS)
    if any(is_known(before + inner) for before in ("", *_BEFORE_LAYERS)):
        return inner
    return bare
