"""The fingerprint of a run: everything except its records that affects its numbers.

A run that was stopped is resumed only if its fingerprint is still the same:

1. Weights, the factors of an adapter, the tokenizer and the data of a readout are hashed
   completely, which takes about a second for a gigabyte.
2. The configuration, and plain attributes of modules (attention's `scaling`, the
   `variance_epsilon` of a norm), are kept as they are, so that an error can say which one differs.
3. Code cannot be compared. The code of the libraries is known by their versions. Code of the
   caller's own (a function in `Readout.of`, a readout class, a hook, a `forward` that was replaced)
   is named in the field "own_code", and such a run is resumed only under a `version` that the
   caller gave it.

The hash of a pickle, as joblib computes it, would not suffice: it does not name the field that
differs, and does not tell the caller's own code from a library's.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.core import Adapter, DeclaredReadout, LoraLens, Readout, refuse_lens_hooks

Fingerprint = Mapping[str, Any]
# The analyses of a run, each with the options that it is called with.
Analyses = Mapping[str, Mapping[str, Any]]

# A renamed model or adapter is still the same one if its weights are.
_WEIGHTS_OF_NAME = {"model": "model_weights", "adapter": "adapter_weights"}
# Fields of configurations that affect no number: the device, the model's name, and a library's own
# notes.
_NO_NUMBERS = frozenset(
    {
        "device", "n_devices", "model_name", "tokenizer_name", "_name_or_path", "architectures",
        "transformers_version", "checkpoint_index", "checkpoint_label_type", "checkpoint_value",
        "from_checkpoint", "seed", "init_mode", "init_weights", "initializer_range",
        "trust_remote_code", "training", "context_level", "is_caching", "tokenizer", "processor",
        "max_seq_len_cached",  # the length to which a rotary table grew (`core/model/lengths.py`)
    }
)  # fmt: skip
# The types of values that an attribute is compared by.
_PLAIN = (bool, int, float, str)
# Values of these types are not counted as a module's attributes.
_NO_ATTRIBUTE = (nn.Module, type)
# Attributes of a tokenizer that change the ids of a string.
_TOKENIZER_SETTINGS = ("padding_side", "add_prefix_space", "legacy")
# Code from anywhere else is the caller's own. Their versions are compared (`LoraLens.describe`).
_LIBRARIES = frozenset(
    {
        "lens_lora", "torch", "transformers", "transformers_modules", "transformer_lens", "peft",
        "accelerate", "bitsandbytes",
        "kernels",  # transformers requires it since 5.25, and wraps the forward of attention by it.
    }
)  # fmt: skip


def fingerprint(
    lens: LoraLens, analyses: Analyses, readout: Any, version: str | None = None
) -> Fingerprint:
    """Everything except the records that affects a number, by name."""
    model = lens.model
    base = getattr(lens, "_hf_model", None)
    base_weights = None if base is None else _weights(base)
    known_before = fingerprint_without_model(lens.adapter, analyses, readout, version)
    return {
        **lens.describe(),
        "float32_matmul_precision": _precision_of_products(),
        **settings(model),
        "tokenizer": _tokenizer(getattr(model, "tokenizer", None)),
        "strings": strings_of(lens),
        "sites": digest([dataclasses.astuple(site) for site in lens.sites]),
        "model_weights": _weights(model),
        "base_weights": base_weights,
        **known_before,
        "own_code": [*known_before["own_code"], *_own_code(model)],
    }


def fingerprint_without_model(
    adapter: Adapter, analyses: Analyses, readout: Any, version: str | None = None
) -> Fingerprint:
    """The part of a fingerprint that is known before a model is loaded."""
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
    """Each field that differs, as 'field X there, Y here'; empty if the runs are the same."""
    fields = dict.fromkeys([*here, *there])
    differing = [field for field in fields if there.get(field) != here.get(field)]
    texts: list[str] = []
    for field in differing:
        weights = _WEIGHTS_OF_NAME.get(field)
        is_renamed = weights is not None and weights not in differing
        if not is_renamed:
            texts.append(f"{field} {there.get(field)!r} there, {here.get(field)!r} here")
    return texts


def _precision_of_products() -> str:
    """How torch may round float32 products, in its own words."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        # From torch 2.9 on, there is no single word for it if a program has set only one backend.
        return ", ".join(compat.float32_products())


def strings_of(lens: LoraLens) -> str | None:
    """Whether strings get a BOS, in words; None if the model has no tokenizer."""
    if getattr(lens.model, "tokenizer", None) is None:
        return None
    return "with BOS" if lens.reads_with_bos else "without BOS"


# --- Hashes of values


# Values of these types are hashed by their repr.
_BY_REPR = (float, bytes, Path, enum.Enum, torch.dtype, torch.device, np.generic)


def short_hash(content: bytes | pa.Buffer) -> str:
    """The first half of the SHA-256 of these bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def digest(value: object, own_code: list[object] | None = None) -> str:
    """The hash of a value.

    Data are hashed by their contents, code by its name.

    Args:
        value: the value.
        own_code: a list to which the caller's own code in the value is appended, because it cannot
            be compared.
    """
    if own_code is None:
        own_code = []
    plain = _plain(value, own_code)
    return short_hash(json.dumps(plain).encode())


def tensor_digest(tensor: Tensor) -> bytes:
    """The hash of a tensor: of its dtype, its shape and every byte."""
    hashed = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().view(-1)
        hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.digest()[:16]


def _plain(value: Any, own_code: list[object]) -> Any:
    """A value as JSON can hold it: data by their contents, code by its name."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, _BY_REPR):
        return repr(value)
    if isinstance(value, Tensor):
        return tensor_digest(value).hex()
    if isinstance(value, Set):
        return sorted(json.dumps(_plain(item, own_code)) for item in value)
    items = _items(value)
    if items is not None:
        return [_plain(item, own_code) for item in items]
    if isinstance(value, DeclaredReadout):
        return _plain_declared(value, own_code)
    return _plain_object(value, own_code)


def _items(value: Any) -> list[Any] | None:
    """The entries of a container, in order; None for anything else."""
    if isinstance(value, np.ndarray):
        return ["array", value.dtype.str, value.tolist()]
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, Sequence):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    return None


def _plain_declared(readout: DeclaredReadout, own_code: list[object]) -> Any:
    """A readout that `@readout` declared, by its name and its arguments.

    It is code of the caller's own if its function is, or if its class is a subclass that is.
    """
    kind = type(readout)
    if _is_own(kind):
        own_code.append(kind)
    function = _plain(kind.function, own_code)
    arguments = _plain(readout.arguments, own_code)
    return [kind.__qualname__, function, arguments]


def _plain_object(value: Any, own_code: list[object]) -> Any:
    """A dataclass by its fields, and any other object, function, class or module by its name."""
    name = getattr(value, "__qualname__", type(value).__qualname__)
    is_own = _is_own(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not is_own:
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [name, _plain(fields, own_code)]
    if is_own or not _is_code(value):
        # An object may have state of its own, such as a module's weights.
        own_code.append(value)
    return name


def _is_code(value: Any) -> bool:
    """Whether this is a function, a class or a module, or a method of one of them."""
    owner = value.__self__ if inspect.ismethod(value) else value
    return inspect.isroutine(owner) or inspect.isclass(owner) or inspect.ismodule(owner)


def _is_own(code: Any) -> bool:
    """Whether a function, a class or the class of an object is the caller's own.

    For a wrapper it is the module that defines the wrapper that counts, not that of the wrapped
    function.
    """
    if isinstance(code, functools.partial):
        return _is_own(code.func)
    function = getattr(code, "__func__", code)
    if isinstance(function, FunctionType):
        home = function.__globals__.get("__name__")
    else:
        home = getattr(function, "__module__", None)
    return str(home).partition(".")[0] not in _LIBRARIES


# --- The readout


def _readout(readout: Any) -> tuple[str, list[str]]:
    """The readout in words and as a hash, and its name if code of the caller's own is in it."""
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
    if own_code:
        return text, [name]
    return text, []


# --- The model besides its weights


def settings(model: Any) -> dict[str, Any]:
    """Everything except its weights that affects a model's numbers, by name.

    These are its configuration, the plain attributes of its modules, and its hooks.

    Raises:
        ModelStateError: a lens has its hooks on the model.
    """
    return {**_settings_of_modules(model), **_configuration(model)}


def _settings_of_modules(model: nn.Module) -> dict[str, Any]:
    """The settings that are not in the configuration: plain attributes of modules, and hooks.

    Raises:
        ModelStateError: a lens has its hooks on the model.
    """
    hooks = hooks_in_words(model)
    return {**_attributes(model), "hooks": hooks}


def hooks_in_words(model: Any) -> list[str]:
    """The place and the function of each hook on a model.

    Raises:
        ModelStateError: a lens has its hooks on the model.
    """
    hooks = _hooks(model)
    refuse_lens_hooks(hook for _, hook in hooks)
    return [f"{place}: {json.dumps(_plain(hook, []))}" for place, hook in hooks]


def _configuration(model: Any) -> dict[str, Any]:
    """The fields of the model's configuration, and of the Hugging Face model's within a bridge."""
    fields = dict(vars(model.cfg))
    inner = getattr(getattr(model, "original_model", None), "config", None)
    if inner is not None:
        for name, value in compat.fields_of(inner).items():
            fields[f"config.{name}"] = value
    configuration: dict[str, Any] = {}
    for name, value in sorted(fields.items()):
        if name.removeprefix("config.") not in _NO_NUMBERS:
            configuration[f"configuration {name}"] = _as_field(value)
    return configuration


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The plain attributes of all modules and the names of their functions, by class and name."""
    by_place: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for module in model.modules():
        of_class = type(module).__name__
        for attribute, value in _public_attributes(module).items():
            if value is None or isinstance(value, _PLAIN):
                by_place[of_class, attribute].append(value)
            elif callable(value):
                by_place[of_class, attribute].append(json.dumps(_plain(value, [])))
    by_name: dict[str, list[Any]] = {}
    for (of_class, attribute), values in by_place.items():
        by_name[f"modules {of_class}.{attribute}"] = values
    return {name: _summary(values) for name, values in sorted(by_name.items())}


def _public_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, except modules and classes.

    Names with an underscore are left out: a library keeps its own notes there.
    """
    attributes: dict[str, Any] = {}
    for name, value in vars(module).items():
        # There are tens of thousands of them, most with an underscore, so that is checked first.
        is_note = name[:1] == "_" or name in _NO_NUMBERS
        if not is_note and not isinstance(value, _NO_ATTRIBUTE):
            attributes[name] = value
    return attributes


class KeptSettings:
    """The settings of a model as they are now, to be compared with its settings at later times.

    Computing the settings of 2,000 modules takes as long as a bank takes for an adapter. The same
    objects have the same settings, so they are computed anew only if a module holds another object
    than before, a user's hook, or an object that may have changed inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._configuration = _configuration(model)
        self._of_modules = _settings_of_modules(model)
        self._modules = [_ModuleThen(module) for module in model.modules()]

    def differences(self) -> list[str]:
        """Each setting that differs now, in the words of `differences`; empty if none does.

        Raises:
            ModelStateError: a lens has its hooks on the model.
        """
        differing = differences(self._configuration, _configuration(self._model))
        if not all(module.is_same() for module in self._modules):
            differing += differences(self._of_modules, _settings_of_modules(self._model))
        return differing


class _ModuleThen:
    """The objects that the settings of one module consist of, when this is made."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._class = type(module)
        self._children = list(compat.children_of(module).items())
        self._names = list(vars(module))
        self._attributes = _public_attributes(module)
        values = self._attributes.values()
        self._may_change_within = any(_may_change_within(value) for value in values)

    def is_same(self) -> bool:
        """Whether the module's settings are certainly the same as then."""
        module = self._module
        attributes = vars(module)
        if self._may_change_within or type(module) is not self._class or _has_own_hook(module):
            return False
        if list(compat.children_of(module).items()) != self._children:
            return False
        if list(attributes) != self._names:
            return False
        # Almost always each is the same object; `map` finds that faster than a loop.
        all_now = map(attributes.__getitem__, self._attributes)
        if all(map(operator.is_, all_now, self._attributes.values())):
            return True
        for name, then in self._attributes.items():
            now = attributes[name]
            if now is not then and (_is_setting(now) or _is_setting(then)):
                return False
        return True


def _is_setting(value: object) -> bool:
    """Whether an attribute of this value is among the settings."""
    return value is None or isinstance(value, _PLAIN) or callable(value)


def _may_change_within(value: object) -> bool:
    """Whether a setting may change while its object stays the same; numbers and code cannot."""
    is_constant = value is None or isinstance(value, _PLAIN)
    return _is_setting(value) and not is_constant and not inspect.isroutine(value)


def _has_own_hook(module: nn.Module) -> bool:
    """Whether the module has a hook of the user's, which no library added by itself."""
    return compat.has_hooks(module) and any(True for _ in _functions_of_hooks(module))


def _summary(values: Sequence[Any]) -> Any:
    """The value that all modules of a class share, or the first three values and a hash of all."""
    distinct = list(dict.fromkeys(repr(value) for value in values))
    if len(distinct) == 1:
        return _as_field(values[0])
    examples = ", ".join(distinct[:3])
    if len(distinct) > 3:
        examples += ", …"
    return f"{examples} ({digest(values)[:8]})"


def _as_field(value: Any) -> Any:
    """A plain value as it is, and any other as its hash."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return digest(value)


def _own_code(model: nn.Module) -> list[str]:
    """The names of the caller's own code in a model: functions of modules, classes and hooks."""
    names: list[str] = []
    for place, module in model.named_modules():
        for name, value in _public_attributes(module).items():
            if callable(value) and _is_own(value):
                names.append(f"{name} of {place!r}")
        if _is_own(type(module).forward):
            names.append(f"forward of the class {type(module).__name__}")
    for place, hook in _hooks(model):
        if _is_own(hook):
            names.append(f"a hook on {place!r}")
    return list(dict.fromkeys(names))


def _hooks(model: nn.Module) -> list[tuple[str, Any]]:
    """(place, function) of each hook, in the order in which they fire.

    Hooks that a library adds to a model by itself are left out.
    """
    hooks: list[tuple[str, Any]] = []
    for place, module in model.named_modules():
        hooks += [(place, function) for function in _functions_of_hooks(module)]
    return hooks


def _functions_of_hooks(module: nn.Module) -> Iterator[Any]:
    """The function of each hook on a module, except hooks that a library added by itself."""
    hooks = compat.hooks_of(module)
    for registered in (hooks.forward, hooks.before, hooks.backward, hooks.before_backward):
        for hook in registered.values():
            function = compat.hook_function(hook)
            if function is not None:
                yield function


def _tokenizer(tokenizer: Any) -> str | None:
    """The hash of everything that turns a string into ids; None if there is no tokenizer.

    Padding and truncation are left out, because each call sets them.
    """
    if tokenizer is None:
        return None
    special = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    special |= {**compat.added_tokens(tokenizer), **tokenizer.special_tokens_map}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([special, tokenizer.get_vocab()])
    fields = json.loads(backend.to_str())  # a fast tokenizer's own JSON
    fields |= {"padding": None, "truncation": None}
    return digest([special, fields])


# --- The weights of a model


def _weights(model: nn.Module) -> str:
    """The hash of every parameter and buffer, and of processed weights that are neither."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    named |= dict(model.named_buffers())
    for place, module in model.named_modules():
        for name, tensor in compat.processed_tensors(module).items():
            named[f"{place}.{name}"] = tensor
    offloaded = _offloaded(model)
    present = {name: tensor for name, tensor in named.items() if id(tensor) not in offloaded}
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(present, pool.map(tensor_digest, present.values()), strict=True))
    together = hashlib.sha256()
    for name, tensor in named.items():
        hashed = digests[name] if name in digests else offloaded[id(tensor)]
        together.update(name.encode() + hashed)
    return together.hexdigest()[:32]


def _offloaded(model: nn.Module) -> dict[int, bytes]:
    """{id: hash} of each offloaded parameter; the parameters of a module are read together."""
    digests: dict[int, bytes] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False)
        ids = {name: id(parameter) for name, parameter in parameters if parameter.is_meta}
        with compat.brought_in(module):
            for name, key in ids.items():
                digests[key] = tensor_digest(getattr(module, name))
    return digests
