"""Functions that `Adapter` calls and `formats/` provides (`lens_lora/registered.py` lists where).

Most of them take and return updates by module path; `Adapter` has the public methods.

Torch is not imported here, so that a wrong folder is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lens_lora.core.provided import declared

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from lens_lora.core.adapter.factors import ModuleUpdate, Parts, Updates

Side = Literal["write", "read"]
# Updates by module path, and the name of the base that they belong to.
UpdatesAndBase: TypeAlias = "tuple[dict[str, ModuleUpdate], str | None]"
# Updates by module path, and the relative error of each where it was cut to a rank.
UpdatesAndErrors: TypeAlias = "tuple[dict[str, ModuleUpdate], dict[str, float]]"

# --- From where an adapter comes


@declared
def folder_of(path: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of an adapter with its files in it, on disk or fetched from the hub.

    Provided by `formats/folders.py`.

    Raises:
        AdapterError: no such folder or repository, or no adapter in it.
    """
    raise NotImplementedError


@declared
def live_updates(peft_model: PeftModel, adapter_name: str) -> UpdatesAndBase:
    """The updates of one adapter of a live model: see `Adapter.from_peft`.

    Provided by `formats/live.py`.
    """
    raise NotImplementedError


@declared
def change_between(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | None,
    ignore: str | Iterable[str],
    progress: bool,
) -> UpdatesAndErrors:
    """The difference of two models: see `Adapter.between`.

    Provided by `formats/between.py`.
    """
    raise NotImplementedError


@declared
def updates_over_base(
    folder: Path, config: PeftConfig, base_for: Callable[[str | None], nn.Module]
) -> UpdatesAndBase:
    """The updates of a folder of a method other than LoRA, measured over its base.

    Provided by `formats/live.py`.
    """
    raise NotImplementedError


# --- Adapters made of adapters


@declared
def side_by_side(named: Sequence[tuple[str, Updates]]) -> dict[str, ModuleUpdate]:
    """The modules of several adapters under 'path@name', where they stay apart.

    Provided by `formats/arithmetic.py`.
    """
    raise NotImplementedError


@declared
def stacked(weighted: Sequence[tuple[Updates, float]]) -> dict[str, ModuleUpdate]:
    """Σ weight · update of each module, as one update.

    Provided by `formats/arithmetic.py`.
    """
    raise NotImplementedError


@declared
def null_updates(
    modules: Updates, seed: int, draws: Sequence[int], parts: Parts
) -> Iterator[Mapping[str, ModuleUpdate]]:
    """Updates of the same sizes in random directions, draw by draw: see `Adapter.null`.

    Provided by `formats/arithmetic.py`.
    """
    raise NotImplementedError


@declared
def without_direction(
    modules: Updates, directions: Any, side: Side, *, only_of_stream: bool
) -> dict[str, ModuleUpdate]:
    """Updates that write, or read, nothing along a direction: see `Adapter.without_direction`.

    With `only_of_stream`, only modules that write to the residual stream, or read it, change.

    Provided by `formats/projected.py`.
    """
    raise NotImplementedError


@declared
def truncated(modules: Updates, rank: int) -> UpdatesAndErrors:
    """The best approximation of each ΔW of this rank: see `Adapter.truncated`.

    Provided by `formats/projected.py`.
    """
    raise NotImplementedError


# --- Where an adapter goes


@declared
def save_adapter(modules: Updates, name: str, base_model: str | None, path: str | Path) -> Path:
    """Write the updates to a folder in PEFT's format: see `Adapter.save`.

    Provided by `formats/peft_write.py`.
    """
    raise NotImplementedError


@declared
def save_gguf(
    modules: Updates, name: str, base_model: str | None, path: str | Path, base: Any
) -> Path:
    """Write the updates to a GGUF file, as llama.cpp loads it: see `Adapter.save`.

    Provided by `formats/gguf_write.py`.
    """
    raise NotImplementedError
