"""Whether a sweep may be resumed: what its numbers depend on besides the records, and code.

1. What the numbers depend on stands in each file of a sweep (`Fingerprint`), and is
   compared on a resume. Whole weights and whole factors are hashed (about a second for a gigabyte),
   and so are the tokenizer and a readout's data. The configuration is kept field by field, and so
   are plain attributes of modules (attention's `scaling`, a norm's `variance_epsilon`): an error
   can then say which one differs.
2. Code cannot be compared. That of the libraries goes by their versions. Code of the caller's own
   (a function in `Readout.of`, a readout class, a hook, a `forward` that was replaced) is named in
   "own_code", and such a sweep is resumed only under a `version` that the caller gave it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.core import Adapter, LoraLens, Readout, refuse_lens_hooks
from lens_lora.core.readout.prompts import reads_with_bos

Fingerprint = Mapping[str, Any]
# The analyses of a run, each with the options that it is called with.
Analyses = Mapping[str, Mapping[str, Any]]


def short_hash(content: bytes | pa.Buffer) -> str:
    """The first half of the SHA-256 of these bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


# A renamed model or adapter is still the same one if its weights are.
_NAMES = {"model": "model_weights", "adapter": "adapter_weights"}
# Where it runs and what it is called decides no number, and what else a library notes down.
_NO_NUMBERS = frozenset(
    {
        "device", "n_devices", "model_name", "tokenizer_name", "_name_or_path", "architectures",
        "transformers_version", "checkpoint_index", "checkpoint_label_type", "checkpoint_value",
        "from_checkpoint", "seed", "init_mode", "init_weights", "initializer_range",
        "trust_remote_code", "training", "context_level", "is_caching", "tokenizer", "processor",
        "max_seq_len_cached",  # how far a pass made a rotary table grow (`core/model/lengths.py`)
    }
)  # fmt: skip
_TOKENIZER = ("padding_side", "add_prefix_space", "legacy")
# Code from anywhere else is the caller's own. Its versions are compared (`LoraLens.describe`).
_LIBRARIES = frozenset(
    {
        "lens_lora", "torch", "transformers", "transformers_modules", "transformer_lens", "peft",
        "accelerate", "bitsandbytes",
    }
)  # fmt: skip


def fingerprint(
    lens: LoraLens, analyses: Analyses, readout: Any, version: str | None = None
) -> Fingerprint:
    """All that decides a number besides its record: one field for each name."""
    model = lens.model
    base = getattr(lens, "_hf_model", None)
    about = fingerprint_without_model(lens.adapter, analyses, readout, version)
    return {
        **lens.describe(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **settings(model),
        "tokenizer": _tokenizer(getattr(model, "tokenizer", None)),
        "strings": strings_of(lens),
        "sites": digest([dataclasses.astuple(site) for site in lens.sites]),
        "model_weights": _weights(model),
        "base_weights": None if base is None else _weights(base),
        **about,
        "own_code": [*about["own_code"], *_own_code(model)],
    }


def strings_of(lens: LoraLens) -> str | None:
    """Whether strings get a BOS; None where the model has no tokenizer."""
    if getattr(lens.model, "tokenizer", None) is None:
        return None
    return "with BOS" if reads_with_bos(lens.model, lens.prepend_bos) else "without BOS"


def fingerprint_without_model(
    adapter: Adapter, analyses: Analyses, readout: Any, version: str | None = None
) -> Fingerprint:
    """The part that is known before a model is loaded."""
    text, own_code = _readout(readout)
    return {
        "adapter_weights": digest(adapter.modules),
        "analyses": list(analyses),
        "options": {name: dict(options) for name, options in analyses.items()},
        "readout": text,
        "version": version,
        "own_code": own_code,
    }


def differences(there: Fingerprint, here: Fingerprint) -> list[str]:
    """'field X there, Y here' for each field that differs; none if they are one sweep's."""
    keys = dict.fromkeys([*here, *there])
    differ = {key for key in keys if there.get(key) != here.get(key)}
    differ -= {name for name, weights in _NAMES.items() if weights not in differ}
    return [
        f"{key} {there.get(key)!r} there, {here.get(key)!r} here" for key in keys if key in differ
    ]


# --- Values and code


_BY_REPR = (float, bytes, Path, enum.Enum, torch.dtype, torch.device, np.generic)


def digest(value: object, own_code: list[object] | None = None) -> str:
    """The hash of a value by its data; code counts by its name."""
    plain = _plain(value, [] if own_code is None else own_code)
    return short_hash(json.dumps(plain).encode())


def _plain(value: Any, own_code: list[object]) -> Any:
    """A value as JSON: tensors by their bytes, dataclasses by their fields, code by its name.

    What is of the caller's own code is added to `own_code`.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, _BY_REPR):
        return repr(value)
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, _plain(value.tolist(), own_code)]
    if isinstance(value, Tensor):
        return tensor_digest(value).hex()
    if isinstance(value, Mapping):
        return [[_plain(part, own_code) for part in item] for item in value.items()]
    if isinstance(value, Set):
        return sorted(json.dumps(_plain(item, own_code)) for item in value)
    if isinstance(value, Sequence):
        return [_plain(item, own_code) for item in value]
    if isinstance(value, functools.partial):
        return _plain([value.func, value.args, value.keywords], own_code)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    is_own = _is_own(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not is_own:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [name, _plain(fields, own_code)]
    owner = value.__self__ if inspect.ismethod(value) else value
    is_plain = inspect.isroutine(owner) or inspect.isclass(owner) or inspect.ismodule(owner)
    if is_own or not is_plain:  # an object may have a state of its own, as a module has weights
        own_code.append(value)
    return name


def tensor_digest(tensor: Tensor) -> bytes:
    """The hash of a tensor: dtype, shape and every byte."""
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().view(-1)
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.digest()[:16]


def _is_own(code: Any) -> bool:
    """Whether a function, a class or the class of an object is the caller's own.

    A wrapper counts by the module in which it stands itself, not by that of what it wraps.
    """
    if isinstance(code, functools.partial):
        return _is_own(code.func)
    code = getattr(code, "__func__", code)
    is_function = isinstance(code, FunctionType)
    home = code.__globals__.get("__name__") if is_function else getattr(code, "__module__", None)
    return str(home).partition(".")[0] not in _LIBRARIES


# --- What is looked at


def _readout(readout: Any) -> tuple[str, list[str]]:
    """What is read, in words and as a hash, and its name if code of the caller's own takes part."""
    if readout is None:
        return "margin of doc and pre", []
    own_code: list[object] = []
    hashed = digest(readout, own_code)
    if isinstance(readout, Readout):
        name = f"the readout {readout.label!r}"
        text = f"{readout.label}, {readout.units}, {hashed}"
    else:
        name = getattr(readout, "__qualname__", type(readout).__name__)
        text = f"{name} of each response, {hashed}"
    return text, [name] if own_code else []


def settings(model: Any) -> dict[str, Any]:
    """All that decides a model's numbers besides its weights: configuration, attributes, hooks."""
    hooks = _hooks(model)
    refuse_lens_hooks(hook for _, hook in hooks)
    said = [f"{place}: {json.dumps(_plain(hook, []))}" for place, hook in hooks]
    return {**_configuration(model), **_attributes(model), "hooks": said}


def _configuration(model: Any) -> dict[str, Any]:
    """Every field of the model's configuration, and of the Hugging Face model's within a bridge."""
    fields = dict(vars(model.cfg))
    inner = getattr(getattr(model, "original_model", None), "config", None)
    if inner is not None:
        fields |= {f"config.{name}": value for name, value in compat.fields_of(inner).items()}
    return {
        f"configuration {name}": _as_field(value)
        for name, value in sorted(fields.items())
        if name.removeprefix("config.") not in _NO_NUMBERS
    }


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain attributes of all modules, and the names of functions, by class and name.

    They decide numbers as weights do.
    """
    values: dict[str, list[Any]] = defaultdict(list)
    for module in model.modules():
        for name, value in _held(module).items():
            is_code = callable(value)
            if is_code or value is None or isinstance(value, bool | int | float | str):
                key = f"modules {type(module).__name__}.{name}"
                values[key].append(json.dumps(_plain(value, [])) if is_code else value)
    return {name: _summary(column) for name, column in sorted(values.items())}


def _held(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without those with an underscore, a library's own notes."""
    return {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_") or name in _NO_NUMBERS or isinstance(value, nn.Module | type))
    }


def _summary(values: Sequence[Any]) -> Any:
    """The one value of all modules of a class; of several the first ones, and a hash of all."""
    distinct = list(dict.fromkeys(map(repr, values)))
    if len(distinct) == 1:
        return _as_field(values[0])
    more = ", …" if len(distinct) > 3 else ""
    return f"{', '.join(distinct[:3])}{more} ({digest(values)[:8]})"


def _as_field(value: Any) -> Any:
    """A plain value as it is, any other as its hash."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return str(value) if isinstance(value, torch.dtype) else digest(value)


def _own_code(model: nn.Module) -> list[str]:
    """The names of the caller's own code in a model: functions of modules, classes and hooks."""
    names: list[str] = []
    for place, module in model.named_modules():
        held = _held(module).items()
        names += [f"{name} of {place!r}" for name, v in held if callable(v) and _is_own(v)]
        if _is_own(type(module).forward):
            names.append(f"forward of the class {type(module).__name__}")
    names += [f"a hook on {place!r}" for place, hook in _hooks(model) if _is_own(hook)]
    return list(dict.fromkeys(names))


def _hooks(model: nn.Module) -> list[tuple[str, Any]]:
    """(place, function) of each hook, in the order in which they fire.

    What a library hangs on by itself is left out.
    """
    hooks: list[tuple[str, Any]] = []
    for place, module in model.named_modules():
        for registered in compat.hooks_of(module)[:4]:  # the fifth says which of them take keywords
            for hook in registered.values():
                function = compat.hook_function(hook)
                if function is not None:
                    hooks.append((place, function))
    return hooks


def _tokenizer(tokenizer: Any) -> str | None:
    """The hash of how a string becomes ids; padding and truncation are set by each call."""
    if tokenizer is None:
        return None
    special = {name: getattr(tokenizer, name, None) for name in _TOKENIZER}
    special |= {**compat.added_tokens(tokenizer), **tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([special, tokenizer.get_vocab()])
    fields = json.loads(backend.to_str())  # a fast tokenizer's own JSON
    return digest([special, {**fields, "padding": None, "truncation": None}])


def _weights(model: nn.Module) -> str:
    """The hash of every parameter and buffer, and of processed weights kept as neither."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    named |= dict(model.named_buffers())
    for place, module in model.named_modules():
        for name, tensor in compat.processed_tensors(module).items():
            named[f"{place}.{name}"] = tensor
    away = _offloaded(model)
    present = {name: tensor for name, tensor in named.items() if id(tensor) not in away}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(present, pool.map(tensor_digest, present.values()), strict=True))
    together = hashlib.sha256()
    for name, tensor in named.items():
        together.update(name.encode() + (away.get(id(tensor)) or digests[name]))
    return together.hexdigest()[:32]


def _offloaded(model: nn.Module) -> dict[int, bytes]:
    """{id: hash} of each parameter that is brought in for it, a module at a time."""
    digests: dict[int, bytes] = {}
    for module in model.modules():
        ids = {name: id(p) for name, p in module.named_parameters(recurse=False) if p.is_meta}
        with compat.brought_in(module):
            digests |= {key: tensor_digest(getattr(module, name)) for name, key in ids.items()}
    return digests
