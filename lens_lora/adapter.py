"""The adapter: what a fine-tune added to each module. Knows no model.

Factors come out of PEFT's files (`load_adapter`), a live PeftModel, tensors at hand, or the
difference of two models (`Adapter.between`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lens_lora.errors import AdapterError, SiteError
from lens_lora.factors import LoRAFactors
from lens_lora.peft_format import factors_of, read_folder

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Adapter", "LoRAFactors", "load_adapter"]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """LoRA factors by Hugging Face module path, for example 'model.layers.0.self_attn.q_proj'."""

    modules: Mapping[str, LoRAFactors]
    name: str = "adapter"
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise AdapterError(f"{self.name}: the adapter adapts no module.")
        object.__setattr__(self, "modules", dict(sorted(self.modules.items(), key=_natural)))

    @classmethod
    def from_factors(cls, modules: Mapping[str, LoRAFactors], *, name: str = "adapter") -> Adapter:
        """An adapter from factors at hand, keyed by Hugging Face module path."""
        return cls(dict(modules), name=name)

    @classmethod
    def from_peft(cls, peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
        """The named adapter of a live PeftModel (copied; the PeftModel stays as it is).

        Raises:
            AdapterError: no such adapter, or its tensors are inconsistent.
            UnsupportedAdapterError: not plain LoRA.
        """
        from peft import get_peft_model_state_dict

        if adapter_name not in peft_model.peft_config:
            raise AdapterError(
                f"the PeftModel has no adapter {adapter_name!r}; it has "
                f"{sorted(peft_model.peft_config)}."
            )
        config = cast(dict[str, Any], peft_model.peft_config)[adapter_name]
        state = get_peft_model_state_dict(
            peft_model, adapter_name=adapter_name, save_embedding_layers=False
        )
        state = {key: value.detach().clone().cpu() for key, value in state.items()}
        saved, base = factors_of(config, state, f"PeftModel[{adapter_name!r}]")
        live = {
            path: cast(dict[str, float], module.scaling)[adapter_name]
            for path, module in peft_model.get_base_model().named_modules()
            if path in saved  # set_scale() changes a live layer's s, not the config
        }
        modules = {p: dataclasses.replace(f, scale=live[p]) for p, f in saved.items()}
        return cls(modules, name=adapter_name, base_model=base)

    def only(self, *globs: str) -> Adapter:
        """The modules whose path matches one of the globs ('*.q_proj').

        Raises:
            SiteError: a glob matches nothing.
        """
        keep = self._matching(globs)
        return self._with({path: f for path, f in self.modules.items() if path in keep})

    def without(self, *globs: str) -> Adapter:
        """The modules whose path matches none of the globs.

        Raises:
            SiteError: a glob matches nothing.
            AdapterError: nothing is left.
        """
        drop = self._matching(globs)
        return self._with({path: f for path, f in self.modules.items() if path not in drop})

    def scaled(self, factor: float) -> Adapter:
        """Every ΔW multiplied by `factor`."""
        return self._with({p: f.scaled(factor) for p, f in self.modules.items()})

    def _with(self, modules: Mapping[str, LoRAFactors]) -> Adapter:
        return dataclasses.replace(self, modules=modules)

    def _matching(self, globs: Iterable[str]) -> set[str]:
        matched: set[str] = set()
        for glob in globs:
            hits = fnmatch.filter(self.modules, glob)
            if not hits:
                raise SiteError(
                    f"{glob!r} matches no module of {self.name}; its modules are like "
                    f"{', '.join(list(self.modules)[:4])}."
                )
            matched.update(hits)
        return matched

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        ranks = sorted({f.rank for f in self.modules.values()})
        base = f", base {self.base_model!r}" if self.base_model else ""
        return f"Adapter({self.name!r}: {len(self)} modules, rank {ranks}{base})"


def load_adapter(
    path: str | Path, *, revision: str | None = None, subfolder: str | None = None
) -> Adapter:
    """Read a LoRA adapter that PEFT saved: a local folder, or a hub id (fetched only if named).

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id.
        revision, subfolder: of the hub repository.

    Raises:
        AdapterError: files missing, pickled, truncated, of another format; tensors left over or
            missing; ranks that disagree; NaN.
        UnsupportedAdapterError: a variant that s·B·A would misread; names the remedy.
    """
    modules, base, name = read_folder(path, revision, subfolder)
    return Adapter(modules, name=name, base_model=base)


def _natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'."""
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
