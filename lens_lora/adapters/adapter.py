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

from torch import nn

from lens_lora.adapters.difference import change_between
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_read import factors_of, read_folder
from lens_lora.adapters.peft_write import save_adapter
from lens_lora.errors import AdapterError, ArgumentError, SiteError

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel

__all__ = ["Adapter", "LoRAFactors", "load_adapter"]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Factors by Hugging Face module path, for example 'model.layers.0.self_attn.q_proj'.

    A sum of adapters holds 'path@name' for each part, so that their sites stay separate.

        >>> import torch
        >>> update = LoRAFactors(A=torch.ones(2, 8), B=torch.ones(8, 2), scale=0.5)
        >>> modules = {"layers.0.q_proj": update, "layers.0.v_proj": update}
        >>> a = Adapter.from_factors(modules, name="a")
        >>> list(a.only("*.q_proj").modules)
        ['layers.0.q_proj']
        >>> list((a.without("*.v_proj").scaled(0.5) + a.only("*.q_proj").named("b")).modules)
        ['layers.0.q_proj@a', 'layers.0.q_proj@b']

    Attributes:
        truncation_error: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F per module, where `between` cut to a rank.
    """

    modules: Mapping[str, LoRAFactors]
    name: str = "adapter"
    base_model: str | None = None
    truncation_error: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

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

    @classmethod
    def between(
        cls,
        base: nn.Module,
        tuned: nn.Module,
        *,
        rank: int | None = None,
        ignore: tuple[str, ...] = (),
        name: str = "fine-tune",
        progress: bool = True,
    ) -> Adapter:
        """Any weight change as an adapter: ΔW of every linear module and embedding that differs.

        For full fine-tunes, and for PiSSA, LoftQ and the like against the true base.

        Args:
            base, tuned: Hugging Face models of one architecture.
            rank: None for the exact difference; else the best approximation of this rank, its
                relative error in `truncation_error`.
            ignore: globs of parameters (norms, say) whose change is left out on purpose.

        Raises:
            AdapterError: different architectures, no difference, or changed parameters that
                belong to no linear module or embedding.
        """
        factors, errors = change_between(base, tuned, rank, ignore, progress)
        if not factors:
            raise AdapterError("the two models have the same weights; there is nothing to explain.")
        return cls(factors, name=name, truncation_error=errors)

    def named(self, name: str) -> Adapter:
        """The adapter under another name, to tell the parts of a sum apart."""
        return dataclasses.replace(self, name=name)

    def __add__(self, other: Adapter) -> Adapter:
        """Both adapters at once; weight them with `scaled`. Their sites stay separate.

        Raises:
            AdapterError: the same name twice, different bases, or DoRA on a module of both (whose
                ΔW is not additive).
        """
        mine, theirs = self._tagged(), other._tagged()
        twice = set(mine) & set(theirs)
        if twice or self.name == other.name:
            raise AdapterError(
                f"both adapters are called {self.name!r}; give one another name: "
                "adapter.named('…')."
            )
        if self.base_model and other.base_model and self.base_model != other.base_model:
            raise AdapterError(
                f"{self.name} names the base {self.base_model!r}, {other.name} "
                f"{other.base_model!r}; a sum needs one base model."
            )
        both = {**mine, **theirs}
        _refuse_dora_twice(both)
        return Adapter(
            both,
            name=f"{self.name} + {other.name}",
            base_model=self.base_model or other.base_model,
            truncation_error={**self.truncation_error, **other.truncation_error},
        )

    def _tagged(self) -> dict[str, LoRAFactors]:
        return {key if "@" in key else f"{key}@{self.name}": f for key, f in self.modules.items()}

    def only(self, *which: str | DataFrame) -> Adapter:
        """The modules whose path matches a glob ('*.q_proj'), or that a table of sites names.

        `adapter.only(attribution.top(20))` prunes the adapter. A module is kept whole if one of its
        sites is named: of a fused q, k, v projection all three stay, even where the table names
        one. Of a sum of adapters the parts are kept that the sites' '@name' tells.

        Args:
            which: globs, or tables with a column 'module' (and 'site'), as `Attribution.top` and
                `Faithfulness.kept` give them.

        Raises:
            SiteError: a glob matches nothing, or a table names a module that is not here.
            ArgumentError: a table without a column 'module'.
        """
        keep: set[str] = set()
        for item in which:
            keep |= self._matching([item]) if isinstance(item, str) else self._named_in(item)
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

    def save(self, path: str | Path) -> Path:
        """Write the adapter to a folder in PEFT's format; `PeftModel.from_pretrained` loads it.

        Files of the same names are replaced. Ranks and scales are each module's own; rsLoRA's s
        is written as the α/r that equals it, and dense differences as LoRA of full rank. The parts
        of a sum become one adapter where they share no module.

        Returns:
            The folder.

        Raises:
            AdapterError: a module whose scale is zero.
            UnsupportedAdapterError: what PEFT's format cannot hold: two updates of one module,
                DoRA on some modules only, a part of a trained bias or of DoRA's update.
        """
        return save_adapter(self.modules, self.name, self.base_model, path)

    def _with(self, modules: Mapping[str, LoRAFactors]) -> Adapter:
        return dataclasses.replace(self, modules=modules)

    def _matching(self, globs: Iterable[str]) -> set[str]:
        matched: set[str] = set()
        for glob in globs:
            hits = [
                key
                for key in self.modules
                if fnmatch.fnmatch(key, glob) or fnmatch.fnmatch(key.partition("@")[0], glob)
            ]
            if not hits:
                raise SiteError(
                    f"{glob!r} matches no module of {self.name}; its modules are like "
                    f"{', '.join(list(self.modules)[:4])}."
                )
            matched.update(hits)
        return matched

    def _named_in(self, table: DataFrame) -> set[str]:
        """The keys of a table's modules, with the part of a sum that its sites name."""
        if "module" not in table.columns:
            raise ArgumentError(
                f"a table with the columns {list(table.columns)}; expected a column 'module', as "
                "attribution.top(k) has it (of effects: effects.attribution().top(k))."
            )
        sites = table["site"] if "site" in table.columns else [""] * len(table)
        keys: set[str] = set()
        for module, site in zip(table["module"], sites, strict=True):
            part = str(site).partition("@")[2]
            hits = [
                key
                for key in self.modules
                if key == f"{module}@{part}" or (not part and key.partition("@")[0] == module)
            ]
            if not hits:
                raise SiteError(
                    f"the table names {module!r} (site {site!r}), which {self.name} does not "
                    "adapt; was it computed with another adapter?"
                )
            keys.update(hits)
        return keys

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


def _refuse_dora_twice(modules: Mapping[str, LoRAFactors]) -> None:
    paths = [key.partition("@")[0] for key in modules]
    for key, factors in modules.items():
        path = key.partition("@")[0]
        if factors.magnitude is not None and paths.count(path) > 1:
            raise AdapterError(
                f"{path} is adapted twice, once by DoRA, which rescales whatever W it finds: the "
                "two updates do not add up. Merge one of them into the base model first."
            )


def _natural(item: tuple[str, Any]) -> list[tuple[int, int, str]]:
    """Sort key: 'layers.2' before 'layers.10'."""
    return [(0, len(p), p) if p.isdigit() else (1, 0, p) for p in item[0].split(".")]
