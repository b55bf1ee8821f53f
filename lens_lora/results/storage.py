"""A result as one safetensors file, by the fields of its dataclass.

1. Tensors are the file's tensors, named by the path to their field ('margin.curve.values').
2. All else is JSON in the header. An array is a tuple; every object says what it is:
   {"tensor": name}, {"map": {…}}, or {"of": "Site", "fields": {…}} for a dataclass.
3. A digest covers both, so that a damaged file is refused and never read as other numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from lens_lora.errors import LensLoraError
from lens_lora.model.sites import Site

FORMAT = "lens_lora result 1"
_Kind = TypeVar("_Kind")
_KINDS: dict[str, type] = {}


def stored(kind: type[_Kind]) -> type[_Kind]:
    """Let files hold this dataclass, by its name."""
    _KINDS[kind.__name__] = kind
    return kind


stored(Site)


def save_result(result: object, path: str | Path) -> Path:
    """Write a result, whole or not at all; returns the path.

    Raises:
        LensLoraError: a place where no file can be written, or something that is no path.
    """
    path = _path(path)
    tensors: dict[str, Tensor] = {}
    labels = json.dumps(_encoded(result, "", tensors))
    digest = _digest(labels, tensors)
    metadata = {"format": FORMAT, "labels": labels, "sha256": digest}
    unfinished = path.with_name(f"{path.name}.part")
    try:
        unfinished.write_bytes(save(tensors, metadata=metadata))
        unfinished.replace(path)
    except OSError as error:
        raise LensLoraError(f"{path}: cannot be written ({error.strerror}).") from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()
    return path


def read_result(path: str | Path) -> object:
    """What `save_result` wrote.

    Raises:
        LensLoraError: no such file, another kind of file, a damaged file, or one of another
            version; something that is no path.
    """
    metadata, tensors = _contents(_path(path))
    if metadata.get("format") != FORMAT:
        raise LensLoraError(
            f"{path}: its format is {metadata.get('format')!r}, expected {FORMAT!r}; was it "
            "written by a result's save method? If another version of lens_lora wrote it, compute "
            "the result again."
        )
    labels = metadata.get("labels", "")
    if metadata.get("sha256") != _digest(labels, tensors):
        raise LensLoraError(
            f"{path}: the file is damaged, its contents do not match its digest; copy it again "
            "from where it was saved, or compute the result again."
        )
    try:
        return _decoded(json.loads(labels), tensors)
    except Exception as error:
        reason = error if isinstance(error, LensLoraError) else repr(error)
        raise LensLoraError(
            f"{path}: this version of lens_lora cannot read its contents ({reason}); compute the "
            "result again."
        ) from error


def _path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise LensLoraError(f"{path!r} is not a path.")
    return Path(path)


def _contents(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.exists():
        raise LensLoraError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise LensLoraError(
            f"{path}: not a safetensors file, or a damaged one ({error})."
        ) from error


def _encoded(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go into `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}#{len(tensors)}"
        # Two fields may share memory, which a safetensors file cannot.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple | list):
        items = cast("tuple[Any, ...]", value)
        return [_encoded(item, f"{path}.{i}", tensors) for i, item in enumerate(items)]
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {"map": {k: _encoded(v, f"{path}.{k}", tensors) for k, v in entries.items()}}
    if type(value).__name__ not in _KINDS or not dataclasses.is_dataclass(value):
        raise LensLoraError(f"{path}: a {type(value).__name__} cannot be saved.")
    fields = {
        field.name: _encoded(
            getattr(value, field.name), f"{path}.{field.name}".lstrip("."), tensors
        )
        for field in dataclasses.fields(value)
    }
    return {"of": type(value).__name__, "fields": fields}


def _decoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decoded(item, tensors) for item in cast("list[Any]", value))
    if not isinstance(value, dict):
        return value
    entry = cast("dict[str, Any]", value)
    if "tensor" in entry:
        return tensors[entry["tensor"]]
    if "map" in entry:
        return {name: _decoded(item, tensors) for name, item in entry["map"].items()}
    kind, fields = _kind(entry["of"]), entry["fields"]
    expected = {field.name for field in dataclasses.fields(kind)}
    if set(fields) != expected:
        odd = ", ".join(sorted(expected ^ set(fields)))
        raise LensLoraError(f"{entry['of']} has other fields than in this version: {odd}")
    return kind(**{name: _decoded(item, tensors) for name, item in fields.items()})


def _kind(name: str) -> type:
    """The class of this name, which `lens_lora.results` imports where nothing has yet."""
    results = sys.modules["lens_lora.results"]
    if name in dir(results):
        getattr(results, name)
    if name not in _KINDS:
        raise LensLoraError(f"no class of results is called {name!r}")
    return _KINDS[name]


def _digest(labels: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(labels.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's own bytes; a copy, as one entry may lie at any stride."""
    flat = tensor.reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data
