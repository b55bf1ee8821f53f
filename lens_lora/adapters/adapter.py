"""The adapter: what a fine-tune added to each module. Knows no model.

Factors come out of PEFT's files (`load_adapter`), a live PeftModel, tensors at hand, or the
difference of two models (`Adapter.between`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.adapters.arithmetic import finite, natural
from lens_lora.adapters.constant import constant_factors
from lens_lora.adapters.difference import change_between
from lens_lora.adapters.factors import LoRAFactors
from lens_lora.adapters.peft_live import live_updates
from lens_lora.adapters.peft_read import read_folder
from lens_lora.adapters.peft_write import save_adapter
from lens_lora.adapters.selection import matching, named_in
from lens_lora.adapters.sums import Sums
from lens_lora.adapters.trained import ModuleUpdate, TrainedModule
from lens_lora.errors import AdapterError, ArgumentError

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel

__all__ = ["Adapter", "LoRAFactors", "TrainedModule", "load_adapter"]


@dataclasses.dataclass(frozen=True)
class Adapter(Sums):
    """Updates by Hugging Face module path, for example 'model.layers.0.self_attn.q_proj'.

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
        modules: updates by module path: factors, or parameters that were trained whole.
        name: tells the parts of a sum apart; the folder's name, where it was read from one.
        base_model: the base that its files name.
        truncation_error: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F per module, where `between` cut to a rank.
    """

    modules: Mapping[str, ModuleUpdate]
    name: str = "adapter"
    base_model: str | None = None
    truncation_error: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentError(f"an adapter's name is {self.name!r}; expected a string.")
        if not self.modules:
            raise AdapterError(f"{self.name}: the adapter adapts no module.")
        for path, update in self.modules.items():
            if not isinstance(path, str) or not isinstance(update, LoRAFactors | TrainedModule):
                raise ArgumentError(
                    f"{self.name}: {path!r} → {type(update).__name__}; expected module paths → "
                    "ll.LoRAFactors(A, B, scale), or ll.TrainedModule(weight)."
                )
        object.__setattr__(self, "modules", dict(sorted(self.modules.items(), key=natural)))

    @classmethod
    def from_factors(cls, modules: Mapping[str, ModuleUpdate], *, name: str = "adapter") -> Adapter:
        """An adapter from factors, or trained modules, at hand.

        Args:
            modules: updates by Hugging Face module path.
            name: the adapter's.

        Raises:
            AdapterError: no modules.
            ArgumentError: something else than updates by path.
        """
        return cls(dict(modules), name=name)

    @classmethod
    def constant(
        cls,
        vectors: Mapping[str, Float[Tensor, "out"]],
        like: nn.Module | Adapter | None = None,
        *,
        name: str = "constant",
    ) -> Adapter:
        """Steering as an adapter: each module adds one vector, whatever its input.

        Args:
            vectors: added to a module's output, by Hugging Face module path.
            like: the Hugging Face base, or an adapter of these modules, for the widths that they
                read, which `save` needs; without it, a lens takes the model's.
            name: the adapter's.

        Raises:
            AdapterError, ArgumentError: no vectors by module path, or a module that `like` lacks.
        """
        modules = constant_factors(vectors, like.modules if isinstance(like, Adapter) else like)
        return cls(modules, name=name)

    @classmethod
    def from_peft(cls, peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
        """The named adapter of a live PeftModel, as its layers apply it now; copied.

        Args:
            peft_model: a PeftModel, or a transformers model with adapters of its own.
            adapter_name: which of its adapters.

        Raises:
            ArgumentError: a model without an adapter.
            AdapterError: no such adapter, or its tensors are inconsistent.
            UnsupportedAdapterError: not plain LoRA, or a PeftMixedModel.
        """
        modules, base = live_updates(peft_model, adapter_name)
        return cls(modules, name=adapter_name, base_model=base)

    @classmethod
    def between(
        cls,
        base: nn.Module,
        tuned: nn.Module,
        *,
        rank: int | None = None,
        ignore: str | Iterable[str] = (),
        name: str = "fine-tune",
        progress: bool = True,
    ) -> Adapter:
        """Any weight change as an adapter: of every linear module, embedding and norm that differs.

        For full fine-tunes, and for PiSSA, LoftQ and the like against the true base. Norms that
        changed need an unprocessed hooked model.

        Args:
            base: the Hugging Face model before.
            tuned: the model after, of the same architecture and configuration.
            rank: None for the exact difference; else the best approximation of this rank, its
                relative error in `truncation_error`.
            ignore: a glob or several, of modules and parameters ('*norm*', say) whose change is
                left out on purpose.
            name: the adapter's.
            progress: whether to draw a progress bar.

        Cost: one forward pass of each model on 8 tokens; with `rank`, an SVD a module.

        Raises:
            AdapterError: different architectures, models that are different functions whatever
                their weights (`rope_theta`, the norm's ε, the activation function, …), no
                difference, or changed parameters of no linear module, embedding or norm.
            ArgumentError: no models, or an `ignore` that is no glob.
        """
        factors, errors = change_between(base, tuned, rank, ignore, progress)
        if not factors:
            raise AdapterError("the two models have the same weights; there is nothing to explain.")
        return cls(factors, name=name, truncation_error=errors)

    def named(self, name: str) -> Adapter:
        """The adapter under another name, to tell the parts of a sum apart.

        Args:
            name: the new one.

        Raises:
            ArgumentError: no string.
        """
        return dataclasses.replace(self, name=name)

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
            ArgumentError: a table without a column 'module', or neither glob nor table.
        """
        keep: set[str] = set()
        items: tuple[Any, ...] = which
        for item in items:
            keep |= (
                named_in(self.modules, self.name, item)
                if hasattr(item, "columns")
                else matching(self.modules, self.name, [item])
            )
        return self._with({path: f for path, f in self.modules.items() if path in keep})

    def without(self, *globs: str) -> Adapter:
        """The modules whose path matches none of the globs.

        Args:
            globs: of module paths, or in a sum of adapters of 'path@name'.

        Raises:
            SiteError: a glob matches nothing.
            AdapterError: nothing is left.
            ArgumentError: a glob that is no string.
        """
        drop = matching(self.modules, self.name, globs)
        return self._with({path: f for path, f in self.modules.items() if path not in drop})

    def scaled(self, factor: SupportsFloat) -> Adapter:
        """Every ΔW and Δb multiplied by a number.

        Args:
            factor: a finite number; 0 and negative ones too.

        Raises:
            ArgumentError: no finite number.
        """
        return self._with({p: f.scaled(finite(factor)) for p, f in self.modules.items()})

    def save(self, path: str | Path) -> Path:
        """Write the adapter to a folder in PEFT's format; `PeftModel.from_pretrained` loads it.

        Files of the same names are replaced. Ranks and scales are each module's own; rsLoRA's s
        is written as the α/r that equals it, and dense differences as LoRA of full rank. The parts
        of a sum become one adapter where they share no module.

        Args:
            path: the folder; created where it is missing.

        Returns:
            The folder.

        Raises:
            AdapterError: a module whose scale is zero.
            UnsupportedAdapterError: what PEFT's format cannot hold: two updates of one module,
                DoRA on some modules only, a part of a trained bias or of DoRA's update.
        """
        return save_adapter(self.modules, self.name, self.base_model, path)

    def _with(self, modules: Mapping[str, ModuleUpdate]) -> Adapter:
        return dataclasses.replace(self, modules=modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        ranks = {f.rank for f in self.modules.values() if isinstance(f, LoRAFactors)}
        whole = sum(isinstance(f, TrainedModule) for f in self.modules.values())
        parts = [f"{len(self)} modules"]
        parts += [f"rank {sorted(ranks)}"] if ranks else []
        parts += [f"{whole} without factors"] if whole else []
        parts += [f"base {self.base_model!r}"] if self.base_model else []
        return f"Adapter({self.name!r}: {', '.join(parts)})"


def load_adapter(
    path: str | Path, *, revision: str | None = None, subfolder: str | None = None
) -> Adapter:
    """Read a LoRA adapter that PEFT saved: a local folder, or a hub id (fetched only if named).

    Args:
        path: folder with `adapter_config.json` and `adapter_model.safetensors`, or a hub id.
        revision: branch, tag or commit of the hub repository.
        subfolder: where the adapter lies in the folder or repository.

    Warns:
        UserWarning: module paths of a wrapped or headless model are read as the language model's;
            or PEFT seems to have left modules out of the file.

    Raises:
        AdapterError: files missing, pickled, truncated, of another format; tensors left over,
            missing, or not in the config; ranks that disagree; NaN.
        UnsupportedAdapterError: a variant that s·B·A would misread; names the remedy.
    """
    modules, base, name = read_folder(path, revision, subfolder)
    return Adapter(modules, name=name, base_model=base)
