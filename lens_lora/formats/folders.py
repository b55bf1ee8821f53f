"""Where adapters are found: one folder, a folder of many, a trainer's run, or a hub repository.

1. A local folder is used as it is. From a hub repository (`formats/hub.py`), only the files of the
   adapter and of its tokenizer are fetched.
2. A folder without an adapter's two files is refused, and the error says what lies there instead:
   MLX's format, pickled weights, a Git LFS pointer, a result of lens_lora, an adapter one folder
   further down. Nothing is unpickled.
3. A folder of a format that `ll.adapter_format` has registered is an adapter's folder as well.

Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lens_lora.core.adapter import (
    CONFIG,
    MLX_WEIGHTS,
    PEFT_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    config_fields,
    every_file_name,
    extensions,
    format_in,
    mlx_error,
    registered,
)
from lens_lora.errors import AdapterError, many, setting
from lens_lora.formats.hub import CHECKPOINT, Place, fetched, likeliest, refuse_other_folder

# The classes of results that have an adapter.
RESULTS_WITH_ADAPTER = ("Repair", "ConstantPart")
# The bytes of a file that are hashed at a time.
_BLOCK = 2**22
_POINTER = b"version https://git-lfs.github.com/spec"


# --- One adapter


@extensions.folder_of.provide
def adapter_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The folder of an adapter, on disk or fetched from the hub, with its files in it.

    Args:
        path: a folder, 'owner/repo', or 'owner/repo/sub/folder'.
        revision: branch, tag or commit of the hub repository.
        subfolder: the adapter's folder within the folder or repository.

    Raises:
        AdapterError: no such folder or repository, or no adapter in it.
    """
    require_path(path)
    place = Place(path, revision, subfolder)
    folder = _at_hand(place, _file_names())
    is_there = (folder / CONFIG).is_file() or format_in(folder) is not None
    if not Path(path).exists() and not is_there:
        refuse_other_folder(place)
    _require_files(folder)
    return folder


def require_path(path: object) -> None:
    """Refuse an object that is neither a path nor a hub id; a result's adapter is named instead.

    Raises:
        AdapterError: neither a string nor a path.
    """
    if isinstance(path, str | os.PathLike):
        return
    kind = type(path).__name__
    remedy = "give a folder, a hub id ('owner/repo') or an ll.Adapter."
    if kind in RESULTS_WITH_ADAPTER:
        remedy = "pass its adapter: result.adapter."
    raise AdapterError(f"a {kind} is no adapter, and no path of one", remedy=remedy)


def files_in(folder: Path) -> list[Path]:
    """The files that hold the adapter of a folder."""
    known = format_in(folder)
    names = PEFT_FILES if known is None else known.files
    return [folder / name for name in names]


def stated_fields(folder: Path) -> dict[str, Any]:
    """The fields that `adapter_config.json` itself states, without PEFT's defaults.

    A folder of another format than PEFT's has none.

    Raises:
        AdapterError: a config that is no JSON object.
    """
    return config_fields(folder) if format_in(folder) is None else {}


def stated_base(folder: Path) -> str | None:
    """The base that an adapter's config names.

    It is None as well if the config cannot be read: reading the adapter reports the cause.
    """
    known = format_in(folder)
    if known is not None:
        return known.base_model(folder)
    try:
        base = config_fields(folder).get("base_model_name_or_path")
    except AdapterError:
        return None
    return base if isinstance(base, str) else None


# --- Several adapters


def folders_in(
    folder: str | Path, revision: str | None = None, subfolder: str | None = None
) -> dict[str, Path]:
    """Every adapter's folder within a folder, by its path from there; at least one.

    A folder counts if it has PEFT's config or weights, or all files of a registered format. Links
    to folders are followed, and a folder counts once however many links lead to it.

    Args:
        folder: a folder on disk, or a hub repository.
        revision: branch, tag or commit of the hub repository.
        subfolder: a folder within it.

    Raises:
        AdapterError: no adapter in it, or no such folder.
    """
    require_path(folder)
    names = _file_names()
    in_folders = [f"*/{name}" for name in names]
    root = _at_hand(Place(folder, revision, subfolder), [*names, *in_folders])
    paths = [path for path in folders_below(root) if _has_adapter(path)]
    if not paths:
        raise AdapterError(
            f"{folder}: a folder with adapters is expected, and none in it has an {CONFIG}."
        )
    return {path.relative_to(root).as_posix(): path for path in sorted(paths)}


def folders_below(root: Path) -> Iterator[Path]:
    """Yield a folder and all folders within it, each once.

    Links are followed last, so that a folder that is there without them has its own name.

    Args:
        root: the folder.
    """
    seen: set[Path] = set()
    # A link that is found is a start of its own, after all starts that are known by then.
    starts = deque([root])
    while starts:
        for place, names, _ in os.walk(starts.popleft()):
            folder = Path(place)
            if folder.resolve() in seen:
                # `os.walk` goes no deeper where this list is empty.
                names.clear()
                continue
            seen.add(folder.resolve())
            yield folder
            inside = [folder / name for name in sorted(names)]
            starts += [path for path in inside if path.is_symlink()]


def _has_adapter(folder: Path) -> bool:
    """Whether a folder has PEFT's config or weights, or all files of a registered format."""
    if any((folder / name).exists() for name in PEFT_FILES):
        return True
    return any(known.is_in(folder) for known in registered())


def checkpoint_folders(
    run: str | Path, revision: str | None = None, subfolder: str | None = None
) -> dict[int, Path]:
    """Find the checkpoints of a trainer's run, {step: folder}; other folders are left alone.

    Args:
        run: the trainer's output folder, on disk or on the hub.
        revision: branch, tag or commit of the hub repository.
        subfolder: the run's folder within it.

    Raises:
        AdapterError: fewer than two checkpoints, or a checkpoint without an adapter's files.
    """
    names = [f"checkpoint-*/{name}" for name in _file_names()]
    root = _at_hand(Place(run, revision, subfolder), names)
    if not root.is_dir():
        raise AdapterError(f"{run}: no such folder.")
    folders = _checkpoints(root)
    if len(folders) < 2:
        raise AdapterError(
            f"{run} holds {many(len(folders), 'folder')} checkpoint-<step>; a training is read "
            "from two or more (save_steps of transformers' TrainingArguments sets how many)."
        )
    for folder in folders.values():
        _require_files(folder)
    return folders


def last_checkpoint(path: str | Path) -> Path | None:
    """The last checkpoint in a trainer's run folder; None if the folder is itself an adapter's."""
    folder = Path(path)
    is_adapter = (folder / CONFIG).exists() or format_in(folder) is not None
    steps = _checkpoints(folder)
    if is_adapter or not steps:
        return None
    return steps[max(steps)]


def one_base(named: Iterable[tuple[str, str | None]], why: str) -> str | None:
    """The one base that several adapters name; None where none of them names any.

    Args:
        named: each adapter's name, with the base that it names.
        why: the reason that they need one base, with a remedy, for the error.

    Raises:
        AdapterError: two name different bases.
    """
    stated = [(name, base) for name, base in named if base]
    if not stated:
        return None
    first, expected = stated[0]
    for name, base in stated:
        if base != expected:
            raise AdapterError(f"{first} names the base {expected!r}, {name} {base!r}; {why}")
    return expected


def _checkpoints(run: Path) -> dict[int, Path]:
    """{step: folder} of a run, by increasing step."""
    if not run.is_dir():
        return {}
    folders: dict[int, Path] = {}
    for path in run.iterdir():
        match = CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            folders[int(match["step"])] = path
    return dict(sorted(folders.items()))


# --- What lies in a folder


def _file_names() -> list[str]:
    """The names of files to fetch for an adapter: those of every format, and its tokenizer's."""
    return [*every_file_name(), *TOKENIZER_FILES]


def _at_hand(place: Place, files: Iterable[str]) -> Path:
    """The folder of a place; if it is on the hub, these of its files are fetched."""
    path = Path(place.path)
    if path.is_file():
        _refuse_result(path)
        raise AdapterError(f"{path}: a file; give the folder that it lies in: {path.parent}.")
    if not path.exists():
        return fetched(place, files)
    if place.revision is not None:
        of_the_hub = f"{setting('revision', place.revision)} is of a hub repository"
        raise AdapterError(f"{path}: a local folder, and {of_the_hub}; leave it out.")
    return path / (place.subfolder or "")


def _require_files(folder: Path) -> None:
    """Refuse a folder without an adapter's files, naming what it holds instead."""
    if format_in(folder) is not None:
        return
    config = folder / CONFIG
    weights = folder / WEIGHTS
    if not config.is_file():
        raise _no_config(folder)
    refuse_pointer(config)
    if weights.is_file():
        refuse_pointer(weights)
        return
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, because they can run code. If you trust "
            "them, load them and save them as safetensors: peft_model.save_pretrained(folder)."
        )
    if (folder / MLX_WEIGHTS).is_file():
        raise mlx_error(folder)
    raise AdapterError(f"{folder}: no {WEIGHTS} beside {CONFIG}.")


def _no_config(folder: Path) -> AdapterError:
    """The error for a folder without a config; it says where a config is, or what is there."""
    inside = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]
    if inside:
        place, others = likeliest(str(path.parent.relative_to(folder)) for path in inside)
        fact = f"no {CONFIG}; give the folder of one: {folder / place}{others}"
        return AdapterError(f"{folder}: {fact}.")
    contents: list[str] | str = "no folder"
    if folder.is_dir():
        for file in sorted(folder.glob("*.safetensors"))[:8]:
            _refuse_result(file)
        contents = sorted(path.name for path in folder.iterdir())[:8]
    fact = f"{folder}: no {CONFIG}, so not a PEFT adapter (found: {contents})."
    if (folder / "config.json").is_file():
        return AdapterError(
            fact,
            remedy="It holds a whole model. If that is a full fine-tune, its change is "
            "ll.Adapter.between(base, tuned); if it is a base, it is passed before its adapter: "
            "ll.load(base, adapter).",
            in_shell="It holds a whole model. If that is a full fine-tune, give it as --tuned and "
            "its base as --model (explain, diff).",
        )
    return AdapterError(fact)


def _refuse_result(file: Path) -> None:
    """Refuse a file that a result was saved to: it is no adapter in PEFT's format."""
    from lens_lora.core import storage

    kind = storage.kind_in_file(file)
    if kind is None:
        return
    remedy = f"ll.load_result({str(file)!r}) reads it."
    if kind in RESULTS_WITH_ADAPTER:
        remedy = (
            "save its adapter into a folder, and give that: "
            f"ll.load_result({str(file)!r}).adapter.save(folder)."
        )
    raise AdapterError(f"{file}: a file of a result ({kind}), and no adapter", remedy=remedy)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it.

    Args:
        file: a file of any size, which is read block by block.
    """
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            hashed.update(block)
    return hashed.hexdigest()


def refuse_pointer(file: Path) -> None:
    """Refuse a Git LFS pointer, which stands in place of a file's content.

    Raises:
        AdapterError: it is one.
    """
    with file.open("rb") as opened:
        beginning = opened.read(len(_POINTER))
    if beginning == _POINTER:
        raise AdapterError(f"{file}: a Git LFS pointer; run git lfs pull in its repository.")
