"""Reading an adapter: from a folder, from the hub, or from what holds one already.

1. `formats/folders.py` finds the folder, and fetches it if it is named by a hub id.
2. A folder of a registered format (`core/adapter/formats.py`) is read by its function. Any other is
   PEFT's: LoRA is read from its files, and the ΔW of other methods is measured over the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from torch import nn

from lens_lora.core.adapter import extensions, formats, peft_files, peft_read, peft_variants
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.errors import AdapterError, ArgumentError, located, setting
from lens_lora.guesses import fitting

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@runtime_checkable
class AdapterOverModel(Protocol):
    """A lens, as far as this file knows one: its adapter may be taken from it."""

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        ...

    @property
    def model(self) -> Any:
        """The hooked model."""
        ...


# An adapter as a caller may give it: itself, a lens over it, its folder or its hub id.
AdapterLike = Adapter | AdapterOverModel | str | Path


@fitting
def load_adapter(
    path: AdapterLike,
    *,
    base: PreTrainedModel | Callable[[str | None], nn.Module] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Adapter:
    """Read an adapter that PEFT saved: a local folder, or a hub id (fetched only if named).

    A folder of a format that `ll.adapter_format` has registered is read by it.

        >>> load_adapter("owner/repo/run/checkpoint-500", revision="v2")  # doctest: +SKIP

    LoRA is read from its two files. The ΔW of other methods (VeRA, LoHa, OFT, IA3, …) is measured:
    PEFT lays the folder over the base, and each layer is run on every unit vector in float64. A
    method whose layer is a function of the input, and no ΔW, is refused by name.

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id, also
            with a folder of the repository: 'owner/repo/sub/folder'. An `Adapter`, or that of a
            lens, is taken as it is.
        base: the Hugging Face model that the adapter was trained on, for methods other than LoRA;
            in the dtype of the training, as some draw matrices from a seed. It stays as it is. Or a
            function from the base's name, as the adapter states it, to that model.
        revision: branch, tag or commit of the hub repository.
        subfolder: the adapter's folder within the folder or repository.

    Cost: none for LoRA. For other methods a pass of each adapted module over as many tokens as it
        has inputs, two forward passes on 8 tokens, and a copy of the largest module in float64.

    Warns:
        UserWarning: module paths of a wrapped or headless model are read as the language model's;
            or PEFT seems to have left modules out of the file.

    Raises:
        AdapterError: files missing, pickled, truncated, of another format; tensors left over,
            missing, or not in the config; ranks that disagree; NaN; another base.
        UnsupportedAdapterError: a variant that s·B·A would misread, a method without ΔW, or one
            that needs the base; the message has the remedy.
        ArgumentError: a base that is no Hugging Face model, or one that PEFT has changed; a
            revision or a subfolder of an adapter that is read already.
    """
    adapter = path.adapter if isinstance(path, AdapterOverModel) else path
    if isinstance(adapter, Adapter):
        _require_no_place(adapter, revision=revision, subfolder=subfolder)
        return adapter
    return read_adapter(adapter, _base_for(base), revision, subfolder)


def _require_no_place(adapter: Adapter, **where: str | None) -> None:
    """Refuse to be told where an adapter lies if it has been read already."""
    for name, value in where.items():
        if value is not None:
            fact = f"{setting(name, value)} says where an adapter lies"
            raise ArgumentError(f"{fact}, and {adapter.name!r} is read already; leave it out.")


def _base_for(base: Any) -> Callable[[str | None], nn.Module] | None:
    """Return the function that gives the base, where a base was given."""
    if base is None:
        return None
    if callable(base) and not isinstance(base, nn.Module):
        return cast("Callable[[str | None], nn.Module]", base)
    return lambda _: base


def read_adapter(
    path: str | Path,
    base_for: Callable[[str | None], nn.Module] | None,
    revision: str | None,
    subfolder: str | None,
) -> Adapter:
    """Load an adapter from a folder, or from the hub.

    Args:
        path: the folder or hub id, as for `load_adapter`.
        base_for: turns the base's name, as the config states it, into the base; it is called if
            reading the adapter needs the base.
        revision: the branch, tag or commit on the hub, as for `load_adapter`.
        subfolder: the folder within it, as for `load_adapter`.
    """
    folder = extensions.folder_of(path, revision, subfolder)
    own_format = formats.format_in(folder)
    if own_format is not None:
        return _of_format(own_format, folder)
    config = peft_files.read_config(folder)
    if base_for is None or peft_variants.is_plain_lora(config):
        modules, base = peft_read.read_folder(folder, config)
    else:
        modules, base = extensions.updates_over_base(folder, config, base_for)
    return Adapter(
        modules,
        name=peft_files.name_of(folder),
        base_model=base,
        tokenizer_folder=_own_tokenizer_in(folder),
    )


def _own_tokenizer_in(folder: Path) -> Path | None:
    """The folder, if a tokenizer or a chat template was saved in it."""
    return folder if peft_files.own_tokenizer_files(folder) else None


def _of_format(own_format: formats.AdapterFormat, folder: Path) -> Adapter:
    """The adapter of a folder of a registered format, named after the folder."""
    with located(folder):
        updates = own_format.read(folder)
        if isinstance(updates, Adapter):
            return updates
        if not isinstance(updates, Mapping):
            raise AdapterError(
                f"the format {own_format.name!r} gave {type(updates).__name__}",
                remedy="return updates by module path, {path: ll.LoRAFactors(…)}, or an Adapter.",
            )
        return Adapter(
            updates,
            name=peft_files.name_of(folder),
            base_model=own_format.base_model(folder),
            tokenizer_folder=_own_tokenizer_in(folder),
        )
