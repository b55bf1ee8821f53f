"""The files of a sweep, in parts so that a kill loses at most one, and whether they may be resumed.

1. Each finished batch is a Parquet file of its own in `results.parts/`, complete or not there. Its
   name holds the hash of its bytes, so a part that was cut or changed is known before it is read:
   it is named and set aside, and its prompts run again.
2. At the end the parts are merged into the results, in the order of the records, and removed.
   What the rows are is up to the two kinds of sweep, `batches.RowStore` and `stream.TokenStore`.
3. In each file stands what its numbers depend on besides the records (`Fingerprint`), which is
   compared on a resume. Whole weights and whole factors are hashed (about a second for a gigabyte),
   and so are the tokenizer and a readout's data. The configuration is kept field by field, and so
   are plain attributes of modules (attention's `scaling`, a norm's `variance_epsilon`): an error
   can then say which one differs.
4. Code cannot be compared. That of the libraries goes by their versions. Code of the caller's own
   (a function in `Readout.of`, a readout class, a hook, a `forward` that was replaced) is named in
   "own_code", and such a sweep is resumed only under a `version` that the caller gave it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.core import Adapter, LoraLens, Readout
from lens_lora.core.model.injections import refuse_writers
from lens_lora.core.readout.prompts import reads_with_bos
from lens_lora.errors import SweepError, is_of_the_system, setting, warn
from lens_lora.sweeps.processes import Processes, only_writer, told
from lens_lora.sweeps.records import ANALYSES, BY_TOKEN

# --- Files


Fingerprint = Mapping[str, Any]
_ABOUT = b"lens_lora.sweep"
_SHOWN = 10  # bad records or damaged parts in a warning
_PART_NAME = re.compile(r"\d+-([0-9a-f]{32})\.parquet")  # when it was written, and its hash


class Store:
    """The files of one sweep.

    Attributes:
        path: the result.
        folder: the parts lie in it until they are merged.
        results: every file that is written at the end.
        fingerprint: what its numbers depend on besides the records, as JSON holds it.
        damaged: the parts that could not be read, and why.
    """

    def __init__(self, out: str | Path, fingerprint: Fingerprint) -> None:
        self.path: Path = Path(out)
        if self.path.suffix != ".parquet":
            place = setting("out", str(out))
            raise SweepError(f"{place}: expected a name that ends in .parquet.")
        if self.path.is_dir():
            raise SweepError(f"{setting('out', str(out))} is a folder; name a file in it.")
        self.folder: Path = self.path.with_suffix(".parts")
        self.results: tuple[Path, ...] = (self.path,)
        self.damaged: dict[Path, str] = {}
        self.fingerprint: Fingerprint = json.loads(_as_json(fingerprint))

    @contextlib.contextmanager
    def writing(self, processes: Processes) -> Generator[None]:
        """Within the block no other sweep writes here, and every process runs this one."""
        with only_writer(self.path) if processes.is_main else contextlib.nullcontext():
            differ = differences(processes.gather(self.fingerprint)[0], self.fingerprint)
            if differ:
                raise SweepError(
                    f"process {processes.index + 1} of {processes.count} runs another sweep than "
                    f"process 1: {'; '.join(differ)}. Give each of them the same model, adapter "
                    "and readout."
                )
            yield
            processes.wait()  # the main process lets no other sweep write before all have read

    def require_same_sweep(self) -> None:
        """Check that what is there agrees with the fields of `fingerprint`. Changes nothing."""
        abouts = {path: about_of(path) for path in self.results if path.exists()}
        whole = ((path, _read_part(path)) for path in self._part_paths())
        first = ((path, _about_in(t.schema)) for path, t in whole if not isinstance(t, str))
        abouts |= itertools.islice(first, 1)
        for path, about in abouts.items():
            known = {key: about.get(key) for key in self.fingerprint}
            self._require_same(known, path)

    def parts(self) -> Iterator[tuple[Path, pa.Table]]:
        """(file, rows) of every part in the order of writing; `damaged` lists the others."""
        for path in self._part_paths():
            table = _read_part(path)
            if isinstance(table, str):
                self.damaged[path] = table
            else:
                self._require_same(_about_in(table.schema), self.folder)
                yield path, table

    def require_result(self, path: Path) -> bool:
        """Whether a result is there; if it is, it belongs to this sweep."""
        if path.exists():
            self._require_same(about_of(path), path)
        return path.exists()

    def require_version(self) -> None:
        """Check that this sweep may go on with what is there, which is known to be its own."""
        own_code = self.fingerprint["own_code"]
        version = self.fingerprint["version"]
        is_there = self._part_paths() or any(path.exists() for path in self.results)
        if is_there and own_code and version is None:
            raise SweepError(
                f"{self.path} was computed with code of your own, {', '.join(own_code)}, and "
                "without a version, so nothing tells whether that code has changed.",
                remedy="Start over with resume=False; with version='…' as well, that run can be "
                "resumed.",
                in_shell="Start over with --no-resume.",
            )

    def begin(self, *, anew: bool) -> None:
        """Make the folder of parts, without the damaged ones."""
        with told(self.path):
            if anew:
                for path in self.results:
                    path.unlink(missing_ok=True)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
        with told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.damaged:
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))

    def write(
        self,
        tables: Iterable[pa.Table],
        notes: Mapping[bytes, bytes],
        path: Path | None = None,
        **how: Any,
    ) -> None:
        """Write tables as a result, or as one part, whole or not at all.

        Each is a group of rows, and one is in memory at a time. They are written under a temporary
        name, which is changed once the file is complete and on the disk.
        """
        unfinished = self.folder / f".{uuid.uuid4().hex}"
        rest = iter(tables)
        first = next(rest)
        schema = first.schema.with_metadata({_ABOUT: _as_json(self.fingerprint), **notes})
        try:
            with told(path or self.folder):
                with pq.ParquetWriter(unfinished, schema, **how) as writer:
                    for table in itertools.chain([first], rest):
                        writer.write_table(table, row_group_size=max(len(table), 1))
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                    part = path or self.folder / f"{time.time_ns()}-{_hash(file.read())}.parquet"
                os.replace(unfinished, part)
                _keep_name(part.parent)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the parts once all is in the results, as far as that can be done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def warn(self, n_bad: int, n_records: int, bad: Iterable[tuple[Any, Any]], level: int) -> None:
        """Name the first bad records, (id, error), and damaged parts; `level` as in `warnings`."""
        errors = [f"{identity!r}: {error}" for identity, error in itertools.islice(bad, _SHOWN)]
        damages = [f"{path}: {reason}" for path, reason in self.damaged.items()]
        missing = f"{n_bad} of {n_records} records have no numbers (column 'error'):"
        again = f"{len(damages)} files of finished records could not be read, and are run again:"
        for fact, count, lines in ((missing, n_bad, errors), (again, len(damages), damages)):
            if count:
                more = [f"… and {count - _SHOWN} more"] if count > _SHOWN else []
                text = "\n  ".join([f"{self.path}: {fact}", *lines[:_SHOWN], *more])
                warn(text, stacklevel=level + 1)

    def lacking(self, records: str) -> SweepError:
        """The error of parts that another machine wrote elsewhere."""
        return SweepError(
            f"{self.folder} lacks {records}: several machines must write to one shared folder. Run "
            "it again to resume."
        )

    def _part_paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def _require_same(self, about: Fingerprint, path: Path) -> None:
        differ = differences(about, self.fingerprint)
        if differ:
            raise other_sweep(f"{path} holds another sweep: {'; '.join(differ)}")


def other_sweep(fact: str) -> SweepError:
    """The error of results that belong to another sweep than the one that is asked for."""
    return SweepError(
        f"{fact}.",
        remedy="Give another out, or start over with resume=False.",
        in_shell="Give another --out, or start over with --no-resume.",
    )


class Unchanged:
    """A result's file, to be read while its notes are those that the result's labels are of."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notes = pq.read_schema(path).metadata

    @property
    def path(self) -> Path:
        """Where it lies, unless another file is in its place."""
        if pq.read_schema(self._path).metadata != self._notes:
            raise SweepError(
                f"{self._path} was replaced after this result was made, by another sweep or one of "
                "more records. Use what that one returned, or run this one with another out."
            )
        return self._path


def about_of(path: Path) -> Fingerprint:
    """The fingerprint in a result file."""
    try:
        return _about_in(pq.read_schema(path))
    except KeyError as error:
        raise SweepError(
            f"{path} exists and is not the result of a sweep",
            remedy="give another out, or overwrite it with resume=False.",
            in_shell="give another --out, or overwrite it with --no-resume.",
        ) from error
    except (pa.ArrowException, OSError, ValueError) as error:
        if is_of_the_system(error):
            raise SweepError(f"{path}: cannot be read ({error}).") from error
        raise SweepError(
            f"{path}: not a Parquet file, or a damaged one ({error}). Restore it from a copy, "
            "delete it, or give another out."
        ) from error


def _as_json(about: Fingerprint) -> bytes:
    return json.dumps(about, ensure_ascii=True, sort_keys=True).encode()


def _about_in(schema: pa.Schema) -> Fingerprint:
    return json.loads((schema.metadata or {})[_ABOUT])


def _read_part(path: Path) -> pa.Table | str:
    """The rows of a part, or what is wrong with it."""
    name = _PART_NAME.fullmatch(path.name)
    if name is None:
        return "not a part that a sweep wrote"
    try:
        content = path.read_bytes()
        if _hash(content) != name[1]:
            return "damaged, its contents do not match the hash in its name"
        table = pq.read_table(pa.BufferReader(content))
        _about_in(table.schema)
        return table
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        return f"{'cannot be read' if is_of_the_system(error) else 'damaged'} ({error})"


def _hash(content: bytes | pa.Buffer) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _keep_name(folder: Path) -> None:
    """Wait until the folder's own entries are on the disk, where its file system can say so."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- Fingerprints


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
    lens: LoraLens, analyses: Sequence[str], readout: Any, version: str | None = None
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
    adapter: Adapter, analyses: Sequence[str], readout: Any, version: str | None = None
) -> Fingerprint:
    """The part that is known before a model is loaded."""
    text, own_code = _readout(readout)
    return {
        "adapter_weights": digest(adapter.modules),
        "analyses": list(analyses),
        "options": {name: dict((ANALYSES | BY_TOKEN)[name].options) for name in analyses},
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
    return _hash(json.dumps(plain).encode())


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
    refuse_writers(hook for _, hook in hooks)
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
