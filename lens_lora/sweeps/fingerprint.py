"""What the numbers of a sweep depend on besides the records, as plain JSON.

Whole weights and whole factors are hashed (about a second for a gigabyte), and so are the
tokenizer, the readout with the code of its function, and the user's hooks on the model. The
configuration is kept field by field, so that an error can say which one differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.adapters.adapter import Adapter
from lens_lora.lens import LoraLens
from lens_lora.offloaded import brought_in
from lens_lora.readouts.readout import Readout
from lens_lora.sweeps.analyses import options_of
from lens_lora.sweeps.batches import Make
from lens_lora.sweeps.identity import NotHashable, digest, tensor_digest
from lens_lora.sweeps.records import SweepError

__all__ = ["Fingerprint", "differences", "fingerprint", "fingerprint_without_model"]

Fingerprint = Mapping[str, Any]

# A renamed model or adapter is still the same one if its weights are.
_NAMES = {"model": "model_weights", "adapter": "adapter_weights"}
# Where it runs and what it is called decides no number.
_NO_NUMBERS = frozenset(
    {
        "device", "n_devices", "model_name", "tokenizer_name", "_name_or_path", "architectures",
        "transformers_version", "checkpoint_index", "checkpoint_label_type", "checkpoint_value",
        "from_checkpoint", "seed", "init_mode", "init_weights", "initializer_range",
        "trust_remote_code",
    }
)  # fmt: skip
_TOKENIZER = ("padding_side", "_add_bos_token", "_add_eos_token", "add_prefix_space", "legacy")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fingerprint(
    lens: LoraLens,
    analyses: Sequence[str],
    readout: Readout | Make | None,
    version: str | None = None,
) -> Fingerprint:
    """All that decides a number besides its record.

    Args:
        lens: the adapter over the model.
        analyses: names of analyses.
        readout: for all records; None for the margin between the record's own answers.
        version: stands for what cannot be hashed in the readout or in a hook.

    Raises:
        SweepError: something cannot be hashed, and no version was given.
    """
    model, base = lens.model, getattr(lens, "_hf_model", None)
    known = {id(model): "model", id(lens): "lens", id(lens.adapter): "adapter", id(base): "base"}
    known[id(getattr(model, "tokenizer", None))] = "tokenizer"
    return {
        **lens.describe(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "configuration": dict(_configuration(model)),
        "tokenizer": _tokenizer(getattr(model, "tokenizer", None)),
        "sites": digest([dataclasses.astuple(site) for site in lens.sites]),
        "model_weights": _weights(model),
        "base_weights": None if base is None else _weights(base),
        "hooks": _hooks(model, known, version),
        **fingerprint_without_model(lens.adapter, analyses, readout, version, known),
    }


def fingerprint_without_model(
    adapter: Adapter,
    analyses: Sequence[str],
    readout: Readout | Make | None,
    version: str | None = None,
    known: Mapping[int, str] | None = None,
) -> Fingerprint:
    """The part that is known before a model is loaded.

    Args:
        adapter: of the sweep.
        analyses: names of analyses.
        readout: for all records, or None.
        version: stands for what cannot be hashed in the readout.
        known: {id: name} of objects that the rest of the fingerprint covers.

    Raises:
        SweepError: the readout cannot be hashed, and no version was given.
    """
    return {
        "adapter_weights": digest(list(adapter.modules.items())),
        "analyses": list(analyses),
        "options": {name: dict(options_of(name)) for name in analyses},
        "readout": _readout(readout, version, known or {}),
        "version": version,
    }


def differences(there: Fingerprint, here: Fingerprint) -> list[str]:
    """'field X there, Y here' for each field that differs; none if they are one sweep's.

    Args:
        there: of the files.
        here: of this sweep, as it is read from a file.
    """
    old, new = _flat(there), _flat(here)
    keys = dict.fromkeys([*new, *old])
    differ = {key for key in keys if old.get(key) != new.get(key)}
    differ -= {name for name, weights in _NAMES.items() if weights not in differ}
    return [f"{key} {old.get(key)!r} there, {new.get(key)!r} here" for key in keys if key in differ]


def _flat(about: Fingerprint) -> dict[str, Any]:
    """{'configuration n_ctx': 32}: one entry for each field of a table within."""
    flat: dict[str, Any] = {}
    for key, value in about.items():
        if isinstance(value, dict):
            flat |= {f"{key} {name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat


def _readout(readout: Readout | Make | None, version: str | None, known: Mapping[int, str]) -> str:
    if readout is None:
        return "margin of doc and pre"
    if isinstance(readout, Readout):
        found = _digest(readout, f"the readout {readout.label!r}", version, known)
        return f"{readout.label}, {readout.units}, {found}"
    name = getattr(readout, "__qualname__", type(readout).__name__)
    return f"{name} of each response, {_digest(readout, name, version, known)}"


def _digest(value: object, what: str, version: str | None, known: Mapping[int, str]) -> str:
    try:
        return digest(value, known, None if version is None else lambda _: version)
    except NotHashable as error:
        raise SweepError(
            f"{what} cannot be told from another by a hash: {error}. Give the sweep a version=, a "
            "string that names what it computes, and change it whenever that changes."
        ) from error


def _configuration(model: Any) -> Iterator[tuple[str, Any]]:
    """Every field of the model's configuration, and of the Hugging Face model's within a bridge."""
    for name, value in sorted(vars(model.cfg).items()):
        if name not in _NO_NUMBERS:
            yield name, _as_json(value)
    inner = getattr(getattr(model, "original_model", None), "config", None)
    if inner is not None:
        implementation = getattr(inner, "_attn_implementation", None)
        fields = {**inner.to_dict(), "_attn_implementation": implementation}
        for name, value in sorted(fields.items()):
            if name not in _NO_NUMBERS:
                yield f"config.{name}", _as_json(value)


def _as_json(value: Any) -> Any:
    """A plain value as it is, any other as its hash."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, torch.dtype):
        return str(value)
    return digest(value, instead=lambda message: message)


def _tokenizer(tokenizer: Any) -> str | None:
    """The hash of how a string becomes ids; padding and truncation are set by each call."""
    if tokenizer is None:
        return None
    special = {name: getattr(tokenizer, name, None) for name in _TOKENIZER}
    special |= dict(tokenizer.special_tokens_map)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([special, tokenizer.get_vocab()])
    return digest([special, _backend(backend)])


def _backend(backend: Any) -> object:
    """A fast tokenizer's own JSON, without what a call may have left in it."""
    fields = json.loads(backend.to_str())
    return {name: part for name, part in fields.items() if name not in ("padding", "truncation")}


def _weights(model: nn.Module) -> str:
    """The hash of every parameter and buffer, and of processed weights kept as neither."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    named |= dict(model.named_buffers())
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_processed_") and isinstance(value, Tensor):
                named[f"{place}.{name}"] = value
    away = _offloaded(model)
    here = {name: tensor for name, tensor in named.items() if id(tensor) not in away}
    with ThreadPoolExecutor() as pool:
        found = dict(zip(here, pool.map(tensor_digest, here.values()), strict=True))
    together = hashlib.sha256()
    for name, tensor in named.items():
        together.update(name.encode() + (away.get(id(tensor)) or found[name]))
    return together.hexdigest()[:32]


def _offloaded(model: nn.Module) -> dict[int, bytes]:
    """{id: hash} of each parameter that is brought in for it, a module at a time."""
    found: dict[int, bytes] = {}
    for module in model.modules():
        ids = {name: id(p) for name, p in module.named_parameters(recurse=False) if p.is_meta}
        with brought_in(module):
            found |= {of: tensor_digest(getattr(module, name)) for name, of in ids.items()}
    return found


def _hooks(model: nn.Module, known: Mapping[int, str], version: str | None) -> list[str]:
    """'place, hash' of each hook that is the user's own, in the order in which they fire."""
    return [
        f"{place}, {_digest(hook, f'the hook on {place!r}', version, known)}"
        for place, module in model.named_modules()
        for kind in _HOOKS
        for registered in getattr(module, kind).values()
        for hook in _users_own(registered)
    ]


def _users_own(registered: Any) -> list[object]:
    """The function within a hook point's wrapper; nothing for transformer-lens's own hooks."""
    if not str(getattr(registered, "__module__", "")).startswith("transformer_lens"):
        return [registered]
    code = getattr(registered, "__code__", None)
    cells = dict(zip(code.co_freevars, registered.__closure__ or (), strict=True)) if code else {}
    if "full_hook" in cells:
        return _users_own(cells["full_hook"].cell_contents)
    return [cells["hook"].cell_contents] if "hook" in cells else []
