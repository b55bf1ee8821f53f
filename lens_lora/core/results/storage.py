"""A result as one safetensors file, by the fields of its dataclass.

1. Tensors are the file's tensors, named by the path to their field ('margin.curve.values').
2. All else is JSON in the header. An array is a tuple; every object says what it is:
   {"tensor": name}, {"map": {…}}, {"said": …, "tokens": […]} for a conversation's tokens, or
   {"of": "Site", "fields": {…}} for a dataclass.
3. A digest covers both, so that a damaged file is refused and never read as other numbers.
4. A result that is read is made anew, so that fields that contradict each other are refused
   (`results/axes.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lens_lora.core import registry
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.adapter.peft_files import CONFIG, WEIGHTS
from lens_lora.core.model import Site
from lens_lora.core.readout.prompts import Prompts, PromptTokens, Source
from lens_lora.core.readout.responses import Generated, save_generated
from lens_lora.errors import ArgumentError, LensLoraError, is_of_the_system

# The mark of a file that holds a result, before the number of the format's version.
_MARK = "lens_lora result"
FORMAT = f"{_MARK} 1"
_Kind = TypeVar("_Kind")
_KINDS: dict[str, type] = {}


def stored(kind: type[_Kind]) -> type[_Kind]:
    """Let files hold this dataclass, by its name.

    Raises:
        ArgumentError: another class has this name already. One that is defined anew in its own
            module, as a notebook's cell does that runs again, takes the place of the old one.
    """
    name = kind.__name__
    holder = _KINDS.get(name)
    owner = "" if holder is None else holder.__module__
    if not _is_of_package(kind.__module__) and name in _names_of_package():
        owner = "lens_lora.results"
    if owner not in ("", kind.__module__):
        raise ArgumentError(
            f"{owner} has a class of results called {name!r} already, and a file names its class "
            "by that",
            remedy="choose another name.",
        )
    _KINDS[name] = kind
    return kind


def _is_of_package(module: str) -> bool:
    return module.partition(".")[0] == "lens_lora"


def _names_of_package() -> set[str]:
    """The public classes of results, imported or not."""
    names: set[str] = set()
    for module in registry.import_each(registry.RESULTS):
        names.update(dir(module))
    return names


for _part in (Site, Source, Prompts, Generated):
    stored(_part)


def save_result(result: object, path: str | Path) -> Path:
    """Write a result, whole or not at all; returns the path.

    Args:
        result: a result whose class is `stored`.
        path: the file to write.

    Raises:
        LensLoraError: a place where no file can be written, or a field that no file can hold.
    """
    file = _path(path)
    if file.is_dir():
        kind = type(result).__name__
        remedy = "name a file in it."
        if isinstance(getattr(result, "adapter", None), Adapter):
            remedy += f" result.adapter.save({str(file)!r}) writes its adapter into the folder."
        raise LensLoraError(f"{file}: a folder, and a {kind} is written to a file", remedy=remedy)
    tensors: dict[str, Tensor] = {}
    labels = json.dumps(_encoded(result, "", tensors))
    metadata = {"format": FORMAT, "labels": labels, "sha256": _digest(labels, tensors)}
    # A name of its own: several processes may write the same result.
    unfinished = file.with_name(f".{uuid.uuid4().hex}.part")
    try:
        unfinished.write_bytes(save(tensors, metadata=metadata))
        unfinished.replace(file)
    except OSError as error:
        raise LensLoraError(f"{file}: cannot be written ({error.strerror}).") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return file


save_generated.provide(save_result)


def read_result(path: str | Path) -> object:
    """Read what `save_result` wrote.

    Args:
        path: the file to read.

    Raises:
        LensLoraError: no such file, another kind of file, a damaged file, or one of another
            version.
    """
    file = _path(path)
    _refuse_adapter(file)
    metadata, tensors = _contents(file)
    if metadata.get("format") != FORMAT:
        raise LensLoraError(
            f"{path}: its format is {metadata.get('format')!r}, expected {FORMAT!r}; was it saved "
            "by a result's save? If another version of lens_lora wrote it, compute it again."
        )
    labels = metadata.get("labels", "")
    if metadata.get("sha256") != _digest(labels, tensors):
        fact = "the file is damaged, its contents do not match its digest"
        raise LensLoraError(f"{path}: {fact}; copy it again, or compute the result again.")
    try:
        return _decoded(json.loads(labels), tensors)
    except Exception as error:
        reason = error if isinstance(error, LensLoraError) else repr(error)
        fact = f"this version of lens_lora cannot read its contents ({reason})"
        raise LensLoraError(f"{path}: {fact}; compute the result again.") from error


def kind_in_file(file: Path) -> str | None:
    """The name of the class of the result that a file holds; None for any other file.

    Only the file's header is read. 'damaged' stands for a class that it does not name.
    """
    try:
        with safe_open(str(file), framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if not metadata.get("format", "").startswith(_MARK):
        return None
    try:
        labels = json.loads(metadata.get("labels", ""))
    except ValueError:
        return "damaged"
    if not isinstance(labels, dict):
        return "damaged"
    return str(labels.get("of", "damaged"))


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise LensLoraError(f"{path!r} is not a path.")
    return Path(path)


def _refuse_adapter(path: Path) -> None:
    """Refuse a folder, or the weights of an adapter in one, in place of a result's file."""
    folder = path if path.is_dir() else path.parent
    holds_adapter = (folder / CONFIG).is_file()
    remedy = ""
    if holds_adapter:
        remedy = f"ll.load_adapter({str(folder)!r}) reads the adapter."
    if path.is_dir():
        raise LensLoraError(f"{path}: a folder, and a result is one file", remedy=remedy)
    if holds_adapter and path.name == WEIGHTS:
        raise LensLoraError(f"{path}: the weights of an adapter, and no result", remedy=remedy)


def _contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.exists():
        raise LensLoraError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except Exception as error:
        if is_of_the_system(error):
            raise LensLoraError(f"{path}: cannot be read ({error}).") from error
        raise LensLoraError(f"{path}: not a safetensors file, or damaged ({error}).") from error


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go into `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        # Two fields may share memory, which a safetensors file cannot.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, PromptTokens):
        return {"said": value.said, "tokens": list(value), "asked": value.length}
    if isinstance(value, tuple | list):
        return [_encoded(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        entries = {key: _encoded(item, f"{path}.{key}", tensors) for key, item in value.items()}
        return {"map": entries}
    if type(value).__name__ not in _KINDS or not dataclasses.is_dataclass(value):
        raise LensLoraError(f"{path}: a {type(value).__name__} cannot be saved.")
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        own_path = f"{path}.{field.name}".lstrip(".")
        fields[field.name] = _encoded(getattr(value, field.name), own_path, tensors)
    return {"of": type(value).__name__, "fields": fields}


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that JSON stands for, with its tensors in their places."""
    if isinstance(value, list):
        return tuple(_decoded(item, tensors) for item in value)
    match value:
        case {"tensor": name}:
            return tensors[name]
        case {"said": said, "tokens": tokens, **asked}:
            return PromptTokens(tokens, said, asked.get("asked"))
        case {"map": entries}:
            return {name: _decoded(item, tensors) for name, item in entries.items()}
        case {"of": name, "fields": fields}:
            kind = _kind(name)
            known = {field.name for field in dataclasses.fields(kind)}
            differing = known ^ set(fields)
            if differing:
                fact = f"{name} has other fields than in this version"
                raise LensLoraError(f"{fact}: {', '.join(sorted(differing))}")
            return kind(**{field: _decoded(item, tensors) for field, item in fields.items()})
        case _:
            return value


def _kind(name: str) -> type:
    """The class of this name, which `lens_lora.results` imports where nothing has yet."""
    for module in registry.import_each(registry.RESULTS):
        if name in dir(module):
            getattr(module, name)
    if name not in _KINDS:
        raise LensLoraError(
            f"no class of results is called {name!r}; if it is your own, import its module first"
        )
    return _KINDS[name]


def _digest(labels: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(labels.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A copy of a tensor's bytes, as a tensor of one entry may have any stride."""
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
