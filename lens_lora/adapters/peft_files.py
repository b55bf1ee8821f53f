"""Where an adapter's files lie: a local folder, or a hub repository that is fetched.

Kept apart from `peft_read`, so that a wrong folder is reported without loading torch.
"""

from __future__ import annotations

from pathlib import Path

from lens_lora.errors import AdapterError

__all__ = ["CONFIG", "WEIGHTS", "adapter_folder"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_folder(
    path: str | Path, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The local folder with an adapter's configuration and weights.

    Args:
        path: a folder, or a hub id, which is downloaded (these two files alone).
        revision: of the hub repository.
        subfolder: within the folder or the hub repository.

    Raises:
        AdapterError: no such folder, no hub repository that can be reached, a file missing, or
            pickled weights.
    """
    folder = _local_folder(path, revision, subfolder)
    _require_files(folder)
    return folder


def _local_folder(path: str | Path, revision: str | None, subfolder: str | None) -> Path:
    local = Path(path)
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
    return Path(root) / subfolder if subfolder else Path(root)


def _require_files(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no folder"
        raise AdapterError(f"{folder}: no {CONFIG}, so not a PEFT adapter (found: {found}).")
    if (folder / WEIGHTS).is_file():
        return
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, for they can run code. Load it where you "
            "trust it and save it again with peft_model.save_pretrained(folder), which writes "
            "safetensors."
        )
    raise AdapterError(f"{folder}: no {WEIGHTS} beside {CONFIG}.")
