"""Read a merged folder as transformers would load it, and nothing else that lies in the folder.

1. config.json through transformers' own class, so that a field that the file leaves out has the
   default of that class.
2. The weights: `model.safetensors`, and only without it the shards that the index names, a later
   shard's tensor in place of an earlier one's. Each tensor is read when it is asked for.
3. The model that config.json makes, on the meta device and so without memory: which parameters it
   has, and which of them share one tensor.
4. Where the folder's tensors go by other names than the model's, as some families store them,
   transformers reads it whole.
"""

from __future__ import annotations

import copy
import functools
import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.loading import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER = "adapter_config.json"
_NO_CODE = {"trust_remote_code": False}
# What transformers raises for a file, a field or a model type that it cannot take.
_UNREADABLE = (ValueError, TypeError, AttributeError, KeyError, OSError, SafetensorError)


class MergedFolder:
    """The configuration and the tensors that transformers would load from a folder.

    Attributes:
        path: the folder.
        config: the configuration, as transformers reads it.
        stated: the fields that config.json itself holds.
        files: the files of weights that transformers opens, in its order.

    Raises:
        ModelStateError: transformers would load nothing, a shard is missing, or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.stated: dict[str, Any] = _object(path / "config.json")
            self.config: Any = _configuration(path)
            self.files: list[Path] = _weight_files(path, self.stated)
            self._file_of = _file_of_each_tensor(self.files)
        except _UNREADABLE as error:
            raise ModelStateError(f"{path}: damaged ({error}).") from error
        self._whole: dict[str, Tensor] = {}
        if self._is_stored_by_other_names():
            self._whole = _read_by_transformers(path)

    @functools.cached_property
    def names(self) -> set[str]:
        """The tensors that the folder holds, by the model's names where transformers read it."""
        return set(self._whole or self._file_of)

    @property
    def unmerged(self) -> list[str]:
        """Tensors of an adapter among those of the model."""
        return [name for name in self._file_of if ".lora_" in name]

    @property
    def holds_adapter(self) -> bool:
        """Whether transformers takes the folder for an adapter's, or for a model with one."""
        return (self.path / _ADAPTER).is_file()

    @property
    def ignored(self) -> list[str]:
        """The .safetensors files that are not loaded."""
        loaded = {file.name for file in self.files}
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        return [name for name in files if name not in loaded]

    @functools.cached_property
    def sharing(self) -> dict[str, tuple[str, ...]]:
        """Every parameter of the model that config.json makes, with those of the same tensor."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        try:
            with torch.device("meta"), quiet_libraries():
                model = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", **_NO_CODE
                )
        except (*_UNREADABLE, RuntimeError, ImportError) as error:
            fact = f"transformers makes no model of its config.json ({error!r})"
            raise ModelStateError(f"{self.path}: {fact}.") from error
        return sharing_in(model)

    def is_quantised(self, base: PreTrainedModel) -> bool:
        """Whether one of the two holds rounded weights, which are no W + ΔW."""
        return "quantization_config" in self.stated or bool(getattr(base, "is_quantized", False))

    def place_of(self, name: str) -> str | None:
        """The name of the tensor that a parameter is loaded from; None if the folder has none.

        Args:
            name: the name of the parameter, which may be loaded from one that it shares.
        """
        for candidate in (name, *self.sharing.get(name, ())):
            if candidate in self.names:
                return candidate
        return None

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, as it is loaded: in the dtype of config.json if that is coarser.

        Args:
            name: one of `names`.
        """
        stored = self._stored(name)
        wanted = self._dtype
        if wanted is None or not stored.dtype.is_floating_point:
            return stored
        is_coarser = torch.finfo(wanted).eps > torch.finfo(stored.dtype).eps
        return stored.to(wanted) if is_coarser else stored

    def _stored(self, name: str) -> Tensor:
        if name in self._whole:
            return self._whole[name]
        with safe_open(str(self._file_of[name]), framework="pt") as file:
            return file.get_tensor(name)

    @property
    def _dtype(self) -> torch.dtype | None:
        """The floating-point dtype that config.json states; None if it states none."""
        stated = str(self.stated.get("dtype") or self.stated.get("torch_dtype"))
        dtype = getattr(torch, stated, None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            return dtype
        return None

    def _is_stored_by_other_names(self) -> bool:
        """Whether the model lacks tensors while the folder holds some that it does not know."""
        if self.unmerged or self.holds_adapter or "quantization_config" in self.stated:
            return False
        stored_names = self._file_of.keys()
        unknown = stored_names - self.sharing.keys()
        is_lacking = any(
            not stored_names & {name, *partners} for name, partners in self.sharing.items()
        )
        return is_lacking and bool(unknown)


def sharing_in(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter and stored buffer of a model, with the others that are the same tensor.

    Args:
        model: may lie on the meta device.
    """
    names_of_tensor: dict[int, list[str]] = defaultdict(list)
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names_of_tensor[id(tensor)].append(name)
    sharing: dict[str, tuple[str, ...]] = {}
    for name, tensor in state.items():
        names = names_of_tensor[id(tensor)]
        sharing[name] = tuple(other for other in names if other != name)
    return sharing


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not file.is_file():
        raise ModelStateError(
            f"{file.parent}: no {file.name}, and transformers loads no model without it.",
            remedy="Save the merged model with model.save_pretrained(folder).",
        )
    fields = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return cast("dict[str, Any]", fields)


def _configuration(folder: Path) -> Any:
    from transformers import AutoConfig

    with quiet_libraries():
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, **_NO_CODE)


def _weight_files(folder: Path, stated: dict[str, Any]) -> list[Path]:
    """The files that transformers opens, in its order."""
    name = stated.get("transformers_weights")
    if name is None:
        name = _WHOLE if (folder / _WHOLE).is_file() else _INDEX
    if not (folder / name).is_file():
        raise _nothing_loads(folder)
    if name.endswith(".index.json"):
        return _shards(folder / name)
    return [folder / name]


def _shards(index_file: Path) -> list[Path]:
    """The files that an index names; a later one's tensors replace an earlier one's."""
    folder = index_file.parent
    index = _object(index_file)
    shards = sorted(set(index["weight_map"].values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        count = f"{len(shards) - len(missing)} of {max(len(shards), 1)} .safetensors files"
        names = f"; missing: {', '.join(missing)}" if missing else ""
        raise ModelStateError(f"{folder}: {count}{names}.")
    if "metadata" not in index:
        fact = f"{index_file.name} has no metadata, without which transformers does not read it"
        raise ValueError(fact)
    return [folder / shard for shard in shards]


def _nothing_loads(folder: Path) -> ModelStateError:
    """The error for a folder in which transformers finds no weights, with what lies there."""
    remedy = "Save the merged model with model.save_pretrained(folder)."
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        fact = f"{folder}: {pickles[0]} is a pickle, which is not opened here."
        return ModelStateError(fact, remedy=remedy)
    others = list(folder.glob("*.safetensors"))
    count = f"; {len(others)} other .safetensors files are not loaded" if others else ""
    return ModelStateError(f"{folder}: neither {_WHOLE} nor {_INDEX}{count}.", remedy=remedy)


def _file_of_each_tensor(files: list[Path]) -> dict[str, Path]:
    """The file that each tensor is read from: the last one that holds it."""
    file_of: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            file_of.update(dict.fromkeys(opened.keys(), file))
    return file_of


def _read_by_transformers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder that stores them by other names, by those of the model."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto", **_NO_CODE}
    try:
        with quiet_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, **options
            )
    except (*_UNREADABLE, RuntimeError) as error:
        raise ModelStateError(f"{folder}: transformers cannot read it: {error}") from error
    model, found = loaded
    missing = set(found["missing_keys"])
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in missing}
