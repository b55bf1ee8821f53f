"""An adapter's folder: where it lies, and what its two files hold.

PEFT reads the files. Pickled weights are refused, nothing is unpickled; a folder of another kind is
refused by name of what it is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lens_lora.adapters.peft_variants import refuse_other_kinds
from lens_lora.errors import AdapterError, UnsupportedAdapterError
from lens_lora.families import FAMILIES

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["CONFIG", "WEIGHTS", "local_folder", "read_files", "stated_fields", "warn_of_cuts"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_POINTER = b"version https://git-lfs.github.com/spec"
_MLX_WEIGHTS = "adapters.safetensors"


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
        raise AdapterError(f"{repository}: no {CONFIG} there, {_elsewhere(places)}")


def read_files(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """(config, tensors by key) of an adapter on disk, as PEFT reads them.

    Args:
        folder: with the two files.

    Raises:
        AdapterError: a file is missing, pickled, cut short or of another format.
        UnsupportedAdapterError: not LoRA, or a switch that the installed PEFT does not know.
    """
    _require_files(folder)
    return _read_config(folder), _read_tensors(folder)


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
        raise _unreadable(folder, error) from error
    return fields


def warn_of_cuts(folder: Path, config: Any, paths: Iterable[str]) -> None:
    """Warn where PEFT seems to have left modules out of the file when it was saved.

    Of a model with several adapters PEFT saves no module whose path contains another one's name.

    Args:
        folder: of the adapter.
        config: PEFT's config of it.
        paths: the modules that the file has.
    """
    parts = {part for path in paths for part in path.split(".")}
    cut = [name for name in _neighbours(folder) if name in _module_parts() and name not in parts]
    targets = config.target_modules if isinstance(config.target_modules, set | list) else ()
    empty = sorted(
        target
        for target in targets
        if not any(path == target or path.endswith(f".{target}") for path in paths)
    )
    if cut:
        why = f"another adapter saved with it is called {cut[0]!r}, as a part of module paths is"
    elif empty:
        why = f"the config targets {', '.join(empty[:4])}, and the file has no factors there"
    else:
        return
    warnings.warn(
        f"{folder}: modules may be missing from the file: {why}. PEFT leaves out every module "
        "whose path contains another adapter's name. Compare with the model that was trained: "
        "ll.Adapter.from_peft(peft_model, adapter_name).",
        stacklevel=4,
    )


def _neighbours(folder: Path) -> list[str]:
    """Names of the adapters that PEFT saved with this one: in folders beside it, or inside."""
    lies = (*folder.glob(f"*/{CONFIG}"), *folder.resolve().parent.glob(f"*/{CONFIG}"))
    return sorted({path.parent.name for path in lies} - {folder.resolve().name})


def _module_parts() -> set[str]:
    """Every name that stands between two dots in some family's module paths; layers by number."""
    paths = [f"{family.layer}.{name}" for family in FAMILIES for name in family.linears]
    return {part for path in paths for part in path.split(".")} | {str(n) for n in range(256)}


def _require_files(folder: Path) -> None:
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder}: no {CONFIG}, {_instead(folder)}")
    if (folder / WEIGHTS).is_file():
        _refuse_pointer(folder / WEIGHTS)
        return
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        raise AdapterError(
            f"{pickled}: pickled weights are not read, because they can run code. Load it where "
            "you trust it and save it again with peft_model.save_pretrained(folder), which writes "
            "safetensors."
        )
    if (folder / _MLX_WEIGHTS).is_file():
        raise _mlx(folder)
    raise AdapterError(f"{folder}: no {WEIGHTS} beside {CONFIG}.")


def _instead(folder: Path) -> str:
    """What a folder without a config is, as far as its files tell."""
    if not folder.is_dir():
        return "so not a PEFT adapter (found: no folder)."
    inside = sorted(str(p.parent.relative_to(folder)) for p in _configs_below(folder))
    if inside:
        return _elsewhere(inside)
    found = sorted(p.name for p in folder.iterdir())[:8]
    return f"so not a PEFT adapter (found: {found})."


def _elsewhere(places: list[str]) -> str:
    more = f" (also {', '.join(places[1:4])})" if places[1:] else ""
    return f"but one lies in a subfolder: pass subfolder={places[0]!r}{more}."


def _configs_below(folder: Path) -> list[Path]:
    return [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]


def _refuse_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        is_pointer = opened.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise AdapterError(
            f"{file}: not a whole safetensors file but a Git LFS pointer: run git lfs pull in its "
            "repository."
        )


def _mlx(folder: Path) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it: it is MLX's, which uses the same file name for "
        f"another format ({_MLX_WEIGHTS} holds its weights); convert it to PEFT's."
    )


def _unreadable(folder: Path, error: Exception) -> AdapterError:
    return AdapterError(
        f"{folder / CONFIG}: PEFT cannot read it ({type(error).__name__}: {error}). MLX and other "
        "tools use the same file name with another format; convert it to PEFT's."
    )


def _read_config(folder: Path) -> PeftConfig:
    from peft import PeftConfig

    _refuse_pointer(folder / CONFIG)
    fields = stated_fields(folder)
    if "peft_type" not in fields:
        if (folder / _MLX_WEIGHTS).is_file() or "lora_parameters" in fields:
            raise _mlx(folder)
        raise AdapterError(
            f"{folder / CONFIG}: `peft_type` is missing, so PEFT cannot read it. If it is a LoRA "
            'that PEFT trained, add "peft_type": "LORA"; if another tool wrote it, convert it.'
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise _unreadable(folder, error) from error
    refuse_other_kinds(config, str(folder))
    for field, value in fields.items():
        is_set = value is True or (isinstance(value, list | dict) and value)
        if is_set and not hasattr(config, field):
            raise UnsupportedAdapterError(
                f"{folder / CONFIG}: {field}={value!r} is unknown to the installed peft, which "
                "would ignore it; upgrade peft to the version that saved the adapter "
                f"({fields.get('peft_version', 'not stated')})."
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:
        raise AdapterError(
            f"{folder / WEIGHTS}: not a whole safetensors file ({type(error).__name__}: {error})."
        ) from error
    return {key: tensor.clone() for key, tensor in tensors.items()}  # not the mapped file itself
