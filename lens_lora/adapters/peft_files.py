"""Where an adapter's files lie, and what its config states: a local folder, or a hub repository.

Kept apart from `peft_folder`, so that a wrong folder is reported without loading torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lens_lora.errors import AdapterError

__all__ = [
    "CONFIG",
    "MLX_WEIGHTS",
    "WEIGHTS",
    "adapter_folder",
    "local_folder",
    "mlx",
    "refuse_pointer",
    "require_files",
    "stated_fields",
    "unreadable",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MLX_WEIGHTS = "adapters.safetensors"
_POINTER = b"version https://git-lfs.github.com/spec"


def adapter_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """`local_folder`, with an adapter's configuration and weights in it.

    Args:
        path: a folder, or a hub id, which is downloaded (these two files alone).
        revision: of the hub repository.
        subfolder: within the folder or the hub repository.

    Raises:
        AdapterError: no such folder, no hub repository that can be reached, a file missing, or
            pickled weights.
    """
    folder = local_folder(path, revision, subfolder)
    require_files(folder)
    return folder


def local_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The folder of an adapter on disk, or of a hub repository, of which two files are fetched.

    Args:
        path: folder or hub id.
        revision: of the hub repository.
        subfolder: where the adapter lies in the folder or repository.

    Raises:
        AdapterError: no such folder or repository.
    """
    local = Path(path)
    if local.is_file():
        raise AdapterError(f"{local}: a file; give the folder that it lies in: {local.parent}.")
    if local.exists():
        return local / subfolder if subfolder else local
    text = str(path)
    if text.count("/") > 1 or text.startswith((".", "~", "/")):
        raise AdapterError(f"{text}: no such folder.")
    if "/" not in text:
        raise AdapterError(f"{text}: no such folder, nor a hub id, which reads 'owner/name'.")
    from huggingface_hub import snapshot_download

    prefix = f"{subfolder}/" if subfolder else ""
    try:
        root = snapshot_download(
            text, revision=revision, allow_patterns=[prefix + CONFIG, prefix + WEIGHTS]
        )
    except Exception as error:
        raise AdapterError(
            f"{text}: neither a local folder nor a hub repository that can be reached ({error})."
        ) from error
    folder = Path(root) / subfolder if subfolder else Path(root)
    if not (folder / CONFIG).is_file():
        _refuse_wrong_place(text, revision)
    return folder


def _refuse_wrong_place(repository: str, revision: str | None) -> None:
    """Refuse a hub repository that has an adapter elsewhere, if it can be asked."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(repository, revision=revision)
    except Exception:  # what was found is then all that can be said
        return
    places = sorted(
        file.removesuffix(f"/{CONFIG}") for file in files if file.endswith(f"/{CONFIG}")
    )
    if places:
        raise AdapterError(_elsewhere(repository, places))


def stated_fields(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` itself states: nothing that PEFT would fill in.

    Args:
        folder: of the adapter.

    Raises:
        AdapterError: no JSON object.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"it holds {type(fields).__name__}, not an object")
    except Exception as error:
        raise unreadable(folder, error) from error
    return fields


def require_files(folder: Path) -> None:
    """Refuse a folder without an adapter's two files, naming what it holds instead.

    Args:
        folder: of the adapter.

    Raises:
        AdapterError: a file is missing, a Git LFS pointer, or pickled.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterError(_instead(folder))
    if (folder / WEIGHTS).is_file():
        refuse_pointer(folder / WEIGHTS)
        return
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, because they can run code. Load it where "
            "you trust it and save it again with peft_model.save_pretrained(folder), which writes "
            "safetensors."
        )
    if (folder / MLX_WEIGHTS).is_file():
        raise mlx(folder)
    raise AdapterError(f"{folder}: no {WEIGHTS} beside {CONFIG}.")


def _instead(folder: Path) -> str:
    """What a folder without a config is, as far as its files tell."""
    if not folder.is_dir():
        return f"{folder}: no {CONFIG}, so not a PEFT adapter (found: no folder)."
    inside = sorted(str(p.parent.relative_to(folder)) for p in _configs_below(folder))
    if inside:
        return _elsewhere(folder, inside)
    found = sorted(p.name for p in folder.iterdir())[:8]
    return f"{folder}: no {CONFIG}, so not a PEFT adapter (found: {found})."


def _elsewhere(source: str | Path, places: list[str]) -> str:
    more = f" (also {', '.join(places[1:4])})" if places[1:] else ""
    return (
        f"{source}: no {CONFIG}, but one lies in a subfolder: pass subfolder={places[0]!r}{more}."
    )


def _configs_below(folder: Path) -> list[Path]:
    return [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]


def refuse_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has not fetched.

    Args:
        file: the config or the weights.

    Raises:
        AdapterError: with the command that fetches it.
    """
    with file.open("rb") as opened:
        is_pointer = opened.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise AdapterError(
            f"{file}: not a whole safetensors file but a Git LFS pointer: run git lfs pull in its "
            "repository."
        )


def mlx(folder: Path) -> AdapterError:
    """The error for an adapter of MLX.

    Args:
        folder: of the adapter.
    """
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it: it is MLX's, which uses the same file name for "
        f"another format ({MLX_WEIGHTS} holds its weights); convert it to PEFT's."
    )


def unreadable(folder: Path, error: Exception) -> AdapterError:
    """The error for a config that PEFT cannot read.

    Args:
        folder: of the adapter.
        error: PEFT's, or the JSON reader's.
    """
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and other "
        "tools use the same file name with another format; convert it to PEFT's."
    )
