"""Formats of adapters: which format a folder is an adapter of, and which function reads it.

    @ll.adapter_format(files=("pairs.safetensors",))
    def pairs(folder):
        tensors = safetensors.torch.load_file(folder / "pairs.safetensors")
        return {module: ll.LoRAFactors(A, B, scale) for module, A, B, scale in …}

1. PEFT's format is built in (`peft_files`). Another one is a function of a folder, registered by
   the names of the files that make a folder one of its adapters.
2. `load_adapter`, `load`, `inspect`, `scan`, `checkpoints` and every command ask `format_in`.
3. A folder that is an adapter of two formats is refused, for either reading may be the wrong one.
4. For the command line an installed package names the module that registers its format, as an
   entry point of the group 'lens_lora.adapter_formats'. It is imported when the first folder is
   looked at.

Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from lens_lora.core import registry
from lens_lora.errors import AdapterError, ArgumentError
from lens_lora.guesses import fitting

# From a folder to updates by module path, or to an `Adapter`, a class that imports this file.
ReadFolder = Callable[[Path], Any]
_ReadFolder = TypeVar("_ReadFolder", bound=ReadFolder)

GROUP = "lens_lora.adapter_formats"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclasses.dataclass(frozen=True)
class AdapterFormat:
    """A format that is not PEFT's.

    Attributes:
        name: the name of the function that reads it.
        module: the module in which that function stands.
        files: a folder with all of them is an adapter of this format.
        read: turns the folder into updates by module path, or an `Adapter`.
        base_model: turns the folder into the name of its base, or None.
    """

    name: str
    module: str
    files: tuple[str, ...]
    read: ReadFolder
    base_model: Callable[[Path], str | None]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has all files of the format."""
        return all((folder / name).is_file() for name in self.files)


_FORMATS: dict[str, AdapterFormat] = {}


@fitting
def adapter_format(
    *, files: Sequence[str], base_model: Callable[[Path], str | None] | None = None
) -> Callable[[_ReadFolder], _ReadFolder]:
    """Register a format: whatever reads an adapter's folder reads folders of this format too.

        >>> @adapter_format(files=("pairs.safetensors",))  # doctest: +SKIP
        ... def pairs(folder):
        ...     return {"model.layers.0.self_attn.q_proj": ll.LoRAFactors(A, B, scale)}
        >>> ll.load_adapter("a/folder/with/pairs.safetensors")  # doctest: +SKIP

    The function is given the folder, and returns the updates by Hugging Face module path, or an
    `Adapter`. A format that is registered again under its name takes the place of the earlier one.
    For the command line, name the module in a package's entry points, in the group
    'lens_lora.adapter_formats'.

    Args:
        files: names of files; a folder with all of them is an adapter of this format.
        base_model: turns the folder into the hub id or path of its base, or None where it names
            none.

    Raises:
        CallError: `files` are missing, as where the decorator stands without them.
        ArgumentError: `files` are no names of files, or only those of PEFT's format; something else
            than a function is decorated; or another module has registered a format of this name.
    """
    names = _file_names(files)
    if set(names) <= set(PEFT_FILES):
        raise ArgumentError(
            f"files={files!r} are those of PEFT's own format", remedy="name another file, too."
        )

    def register(read: _ReadFolder) -> _ReadFolder:
        if not callable(read):
            raise ArgumentError(f"{read!r} is no function of a folder.")
        name = read.__name__
        module = read.__module__
        earlier = _FORMATS.get(name)
        if earlier is not None and earlier.module != module:
            raise ArgumentError(
                f"a format {name!r} is registered by {earlier.module} already",
                remedy="rename the function.",
            )
        _FORMATS[name] = AdapterFormat(name, module, names, read, base_model or _names_no_base)
        return read

    return register


def _file_names(files: object) -> tuple[str, ...]:
    """Check the names of files by which a format is known.

    Raises:
        ArgumentError: a single string, no name, or a path in place of a name.
    """
    names: tuple[Any, ...] = ()
    if isinstance(files, Sequence) and not isinstance(files, str):
        names = tuple(files)
    are_names = [isinstance(name, str) and Path(name).name == name for name in names]
    if not names or not all(are_names):
        raise ArgumentError(
            f"files={files!r} names no files of a folder",
            remedy="give names such as files=('delta.safetensors',).",
        )
    return names


def _names_no_base(folder: Path) -> None:
    """The base of a format whose files do not name one."""


def format_in(folder: Path) -> AdapterFormat | None:
    """The registered format of which the folder is an adapter; None for PEFT's, or none at all.

    Raises:
        AdapterError: the folder is an adapter of two formats.
    """
    formats = [known for known in registered() if known.is_in(folder)]
    names = [known.name for known in formats]
    is_peft = all((folder / file).is_file() for file in PEFT_FILES)
    if is_peft:
        names.append("PEFT's")
    if len(names) > 1:
        raise AdapterError(
            f"{folder}: an adapter of the formats {' and '.join(names)} at once, which may differ",
            remedy="leave the files of one of them in the folder.",
        )
    return formats[0] if formats else None


def registered() -> list[AdapterFormat]:
    """All formats other than PEFT's: this package's, installed packages' and the user's own."""
    _import_listed()
    return list(_FORMATS.values())


@functools.cache
def _import_listed() -> None:
    """Import the modules that register formats, once: this package's, and installed packages'."""
    registry.import_each(registry.FORMATS)
    for entry in entry_points(group=GROUP):
        entry.load()


def every_file_name() -> list[str]:
    """The names of the files of all formats."""
    names: list[str] = list(PEFT_FILES)
    for known in registered():
        names += known.files
    return names
