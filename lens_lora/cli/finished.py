"""Recognise a finished sweep by its files, so that running the command again loads no model.

1. When a sweep ends, `results.command.json` is written next to its results. It holds a hash of
   everything that decides the numbers, except the records: the options, the versions of the
   libraries, and every byte of the files from which the base, its tokenizer and the adapter are
   read.
2. The same command hashes these files again, which takes about a second per gigabyte. If nothing
   has changed and the results hold every record, the results are printed.
3. In every other case the sweep runs as usual, and compares the weights themselves: if a file is
   missing, if there are more records, or if there are conversations (whose template may print
   today's date).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lens_lora._version import versions
from lens_lora.cli.options import ModelOptions
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import LensLoraError, ModelStateError
from lens_lora.formats.folders import sha256_of
from lens_lora.sweeps.records import Record

if TYPE_CHECKING:
    from lens_lora.core import Adapter
    from lens_lora.results import SweepResult

# Options that change how much is run at a time, but numbers only by rounding.
_NO_NUMBERS = ("max_memory",)


# --- The command as a hash


def command_digest(
    base: ModelOptions, adapter: Adapter, folder: Path, asked: Mapping[str, object]
) -> str | None:
    """Hash everything that decides a sweep's numbers, except its records.

    It is None if the files of the base model are not on this machine.

    Args:
        base: the base model, and how it is loaded.
        adapter: the adapter, which may name its base.
        folder: the folder of the adapter.
        asked: what else was asked for, as values for JSON.
    """
    model_folder = _model_folder(base, adapter)
    if model_folder is None:
        return None
    options = dataclasses.asdict(base)
    for name in _NO_NUMBERS:
        options.pop(name)
    about = {
        "options": options,
        "prepend_bos": base.prepend_bos,
        "asked": asked,
        "versions": dict(versions()),
        "model": _digests(model_folder),
        "adapter": _digests(folder),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _model_folder(base: ModelOptions, adapter: Adapter) -> Path | None:
    """Find the folder from which the base model is read; None if it is not on this machine."""
    try:
        named = base_by_name(base.model, adapter.base_model)
    except ModelStateError:
        return None
    from lens_lora.demonstration.embedded import place_of

    place = place_of(named, quiet=True)
    if Path(place).is_dir():
        return Path(place)
    import huggingface_hub

    try:
        # This is the folder of the newest commit, from which transformers would read the model too.
        # A base that only the adapter names is not fetched, so the hub is not asked (`load_base`).
        config = huggingface_hub.hf_hub_download(
            place, "config.json", local_files_only=named.of_adapter
        )
        return Path(config).parent
    except (OSError, ValueError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """Hash the bytes of every file in a folder, under its name; folders inside are not read."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_of, files)
        return {path.name: digest for path, digest in zip(files, digests, strict=True)}


# --- The file beside the results


def _command_file(out: Path) -> Path:
    """Return the file that keeps the command of a finished sweep."""
    return out.with_suffix(".command.json")


def remember(result: SweepResult, digest: str) -> None:
    """Write the command that finished a sweep to a file next to its results.

    Args:
        result: the result of the sweep.
        digest: the digest of the command.
    """
    about = {
        "command": digest,
        "results": _results_digest(result.prompts_path),
        "sites": [dataclasses.asdict(site) for site in result.sites],
        "meta": dict(result.meta),
        "readout": result.readout,
        "units": result.units,
    }
    path = _command_file(result.path)
    path.write_text(json.dumps(about, ensure_ascii=False) + "\n", encoding="utf-8")


def _results_digest(prompts_path: Path) -> str:
    """Hash the metadata of a result: the fingerprint of its run, and the hash of its rows."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(prompts_path).metadata
    return hashlib.sha256(repr(sorted(metadata.items())).encode()).hexdigest()


def has_command(out: Path) -> bool:
    """Whether there is a finished sweep here whose command is kept."""
    return _command_file(out).exists() and out.exists()


def finished_sweep(
    out: Path, digest: str, records: Sequence[Record], analyses: tuple[str, ...]
) -> SweepResult | None:
    """Return the result of a sweep that this command has finished; None if work is left to do.

    Args:
        out: the file of the result.
        digest: the digest of the command.
        records: all records.
        analyses: the names of the analyses.
    """
    from lens_lora.core import Site
    from lens_lora.runs.store import fingerprint_of
    from lens_lora.sweeps.result import AskedReadout, result_of
    from lens_lora.sweeps.rows import RowStore

    if not has_command(out):
        return None
    try:
        about: dict[str, Any] = json.loads(_command_file(out).read_text(encoding="utf-8"))
        if about["command"] != digest:
            return None
        sites = [Site(**fields) for fields in about["sites"]]
        store = RowStore(out, fingerprint_of(out), sites, analyses)
        if about["results"] != _results_digest(store.prompts_path):
            # The results here are those of another sweep, not of this command.
            return None
        if store.folder.exists() or not _holds_all(store, records):
            return None
        good = sum(record.error is None for record in records)
        asked = AskedReadout(about["readout"], about["units"])
        return result_of(store, sites, about["meta"], analyses, good, asked)
    except (LensLoraError, OSError, ValueError, KeyError, TypeError):
        # Whatever is wrong with these files is reported when the sweep runs as usual.
        return None


def _holds_all(store: Any, records: Sequence[Record]) -> bool:
    """Whether the results hold these records, in this order, each with numbers or with its error.

    A hash confirms that the numbers are those that were written.
    """
    from lens_lora.sweeps.rows import content, read

    if any(record.chat for record in records):
        return False
    finished = store.done(records)
    rows = read(store.prompts_path).to_pylist()
    if len(rows) != len(records):
        return False
    for row, record in zip(rows, records, strict=True):
        if str(row["id"]) != str(record.id) or content(row) != content(record):
            return False
        if record.error is not None and row["error"] != record.error:
            return False
        if row["error"] is None and content(record) not in finished:
            return False
    return True
