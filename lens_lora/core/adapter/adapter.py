"""An `Adapter` is what a fine-tune added to each module. It does not know the model.

Its updates come from PEFT's files (`load_adapter`), from a live PeftModel (`Adapter.from_peft`),
from tensors (`from_factors`, `constant`), or from the difference of two models (`between`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, get_args

from jaxtyping import Float
from torch import Tensor, nn

from lens_lora import guesses
from lens_lora.arguments import number, whole, word
from lens_lora.core.adapter import extensions, peft_read
from lens_lora.core.adapter.constants import constant_factors
from lens_lora.core.adapter.extensions import Side
from lens_lora.core.adapter.factors import (
    LoRAFactors,
    ModuleUpdate,
    Parts,
    TrainedModule,
    module_path,
    natural,
)
from lens_lora.errors import AdapterError, ArgumentError, SiteError, first_few, many

if TYPE_CHECKING:
    from pandas import DataFrame
    from peft import PeftModel


@dataclasses.dataclass(frozen=True)
class Adapter(metaclass=guesses.OfAdapterClass):
    """Updates by Hugging Face module path, for example 'model.layers.0.self_attn.q_proj'.

    The keys of a sum of adapters are 'path@name', so that the sites of its parts stay separate.

        >>> import torch
        >>> update = LoRAFactors(A=torch.ones(2, 8), B=torch.ones(8, 2), scale=0.5)
        >>> modules = {"layers.0.q_proj": update, "layers.0.v_proj": update}
        >>> a = Adapter.from_factors(modules, name="a")
        >>> list(a.only("*.q_proj").modules)
        ['layers.0.q_proj']
        >>> half = a.without_modules("*.v_proj").scaled(0.5)
        >>> list((half + a.only("*.q_proj").named("b")).modules)
        ['layers.0.q_proj@a', 'layers.0.q_proj@b']

    Attributes:
        modules: updates by module path: factors, or parameters that were trained whole.
        name: tells the parts of a sum apart; by default the name of its folder.
        base_model: the base model that its files name.
        truncation_error: ‖ΔW − ΔW_r‖_F / ‖ΔW‖_F of each module that was cut to a rank.
        tokenizer_folder: its own folder, if a tokenizer or a chat template was saved in it.
    """

    modules: Mapping[str, ModuleUpdate]
    name: str = "adapter"
    base_model: str | None = None
    truncation_error: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    tokenizer_folder: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ArgumentError(f"an adapter's name is {self.name!r}; expected a string.")
        if not self.modules:
            raise AdapterError(f"{self.name}: the adapter adapts no module.")
        for path, update in self.modules.items():
            if not isinstance(path, str) or not isinstance(update, LoRAFactors | TrainedModule):
                raise ArgumentError(
                    f"{self.name}: {path!r} → {type(update).__name__}; expected a module path → "
                    "ll.LoRAFactors(A, B, scale) or ll.results.TrainedModule(weight)."
                )
        in_order = sorted(self.modules.items(), key=natural)
        object.__setattr__(self, "modules", dict(in_order))

    @classmethod
    def from_factors(cls, modules: Mapping[str, ModuleUpdate], *, name: str = "adapter") -> Adapter:
        """Make an adapter from factors, or from trained modules.

        Args:
            modules: updates by Hugging Face module path.
            name: the adapter's name.

        Raises:
            AdapterError: no modules.
            ArgumentError: anything but updates by path.
        """
        return cls(dict(modules), name=name)

    @classmethod
    def constant(
        cls,
        vectors: Mapping[str, Float[Tensor, " out"]],
        like: nn.Module | Adapter | Mapping[str, int] | None = None,
        *,
        name: str = "constant",
    ) -> Adapter:
        """Steering as an adapter: each module adds one vector, whatever its input.

        Like a bias, the vector is added at every token. That includes a text's first token, a sink,
        and what is added there reaches all other tokens.

        Args:
            vectors: what is added to a module's output, by Hugging Face module path.
            like: where the modules' input widths are known from, which `save` needs: the Hugging
                Face base, an adapter of these modules, or the widths by path. Without it, a lens
                takes them from its model.
            name: the adapter's name.

        Raises:
            ArgumentError: no vectors by module path.
            AdapterError: a value that is not a vector, or a module that `like` lacks.
        """
        if isinstance(like, Adapter):
            widths = {
                path: update.A.shape[1]
                for path, update in like.modules.items()
                if isinstance(update, LoRAFactors)
            }
            return cls(constant_factors(vectors, widths), name=name)
        return cls(constant_factors(vectors, like), name=name)

    @classmethod
    def from_peft(cls, peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
        """Copy an adapter of a live PeftModel, as its layers apply it now.

        LoRA is read from its tensors. The ΔW of any other method is measured: each layer is run in
        float64 on every unit vector, and the result is rounded once, to float32 or the base's
        dtype. A method whose layers depend on the input in another way has no ΔW, and is refused by
        name. The model stays as it is.

        Args:
            peft_model: a PeftModel, or a transformers model with adapters of its own.
            adapter_name: the name of one of its adapters.

        Cost: none for LoRA; for other methods see `load_adapter`.

        Raises:
            ArgumentError: a model without an adapter.
            AdapterError: no such adapter, or its tensors are inconsistent.
            UnsupportedAdapterError: a variant of LoRA that is not s·B·A, a method without ΔW, an
                adapter that is merged into the weights, or a PeftMixedModel.
        """
        modules, base = extensions.live_updates(peft_model, adapter_name)
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
        """Any weight change as an adapter, of every linear module, embedding and norm that differs.

        It is meant for full fine-tunes, and for PiSSA, LoftQ and the like against the true base.
        Norms that changed need an unprocessed hooked model.

        Args:
            base: the Hugging Face model before training.
            tuned: the model after training, of the same architecture and configuration.
            rank: None for the exact difference; else the best approximation of this rank, whose
                relative error is in `truncation_error`.
            ignore: a glob or several, such as '*norm*', of modules and parameters whose change is
                left out on purpose.
            name: the adapter's name.
            progress: whether to draw a progress bar.

        Cost: one forward pass of each model on 8 tokens; with `rank`, an SVD a module.

        Raises:
            AdapterError: different architectures; configurations that make them different
                functions (`rope_theta`, the norm's ε, the activation function, …); no difference;
                or changed parameters outside linear modules, embeddings and norms.
            ArgumentError: anything but models, or an `ignore` that is not a glob.
        """
        factors, errors = extensions.change_between(base, tuned, rank, ignore, progress)
        if not factors:
            raise AdapterError("the two models have the same weights; there is nothing to explain.")
        return cls(factors, name=name, truncation_error=errors)

    def named(self, name: str) -> Adapter:
        """The adapter under another name, to tell the parts of a sum apart.

        Args:
            name: the new name.

        Raises:
            ArgumentError: anything but a string.
        """
        return dataclasses.replace(self, name=name)

    def only(self, *which: str | DataFrame) -> Adapter:
        """Keep the modules whose path matches a glob ('*.q_proj'), or that a table of sites names.

        `adapter.only(attribution.top(20))` prunes the adapter. A module is kept whole if one of its
        sites is named: q, k and v of a fused projection all stay, even if the table names only one.
        In a sum of adapters, a site's '@name' picks the part.

        Args:
            which: globs, or tables with a column 'module' (and 'site'), as `Attribution.top` and
                `Faithfulness.kept` return them.

        Raises:
            SiteError: a glob matches nothing, or a table names a module that is not here.
            ArgumentError: a table without a column 'module', or neither glob nor table.
        """
        keep = set[str]()
        for item in which:
            if hasattr(item, "columns"):
                keep |= self._in_table(item)
            else:
                keep |= self._matching(item)
        return self._with({path: self.modules[path] for path in self.modules if path in keep})

    def without_modules(self, *globs: str) -> Adapter:
        """Leave out the modules whose path matches one of the globs: the opposite of `only`.

        Args:
            globs: patterns of module paths, or of 'path@name' in a sum of adapters.

        Raises:
            SiteError: a glob matches nothing.
            AdapterError: nothing is left.
            ArgumentError: a glob that is not a string.
        """
        drop: set[str] = set().union(*map(self._matching, globs))
        return self._with({path: self.modules[path] for path in self.modules if path not in drop})

    def without_direction(
        self, directions: Any, side: Side = "write", sites: str | Iterable[str] = "*"
    ) -> Adapter:
        """Project a direction v of length 1 out of what the adapter writes, or of what it reads.

        ΔW and Δb become (I − vvᵀ)ΔW and (I − vvᵀ)Δb, or for what is read ΔW(I − vvᵀ), in the
        Hugging Face basis. What a module reads is behind a norm, so for a direction v of the
        residual stream pass γ ⊙ v there. The weights change for all tokens, including a text's
        first token, where `lens.ablate_directions` leaves activations as they are.

        Args:
            directions: [d], [direction, d], {label: either}, a Contrast of one hook point, or
                (autoencoder, indices).
            side: 'write' for outputs, 'read' for inputs.
            sites: globs of module paths. '*' takes the modules that write to the residual stream
                (o, down, an embedding), or those that read it (q, k, v, gate, up, the head).

        Raises:
            SiteError: a glob matches nothing; or with '*' no module is one of these, or a module is
                of no known family.
            AdapterError: directions of another width than a module writes or reads.
            ArgumentError: another side, a direction of zeros, or something that is not a direction.
            UnsupportedAdapterError: DoRA, trained modules or biases.
        """
        word("side", side, get_args(Side))
        globs = [sites] if isinstance(sites, str) else sites
        keys = set[str]().union(*map(self._matching, globs))
        chosen = {key: update for key, update in self.modules.items() if key in keys}
        is_of_stream = sites == "*"
        changed = extensions.without_direction(
            chosen, directions, side, only_of_stream=is_of_stream
        )
        return self._with({**self.modules, **changed})

    def truncated(self, rank: int) -> Adapter:
        """Cut each ΔW to its best approximation of this rank; updates of a lower rank stay.

        Args:
            rank: the rank, at least 1; for a stack of experts, the rank of each expert.

        Returns:
            The adapter, with the relative errors in `truncation_error`.

        Raises:
            ArgumentError: a rank that is not a whole number, or below 1.
            UnsupportedAdapterError: DoRA, trained modules or biases.
        """
        modules, errors = extensions.truncated(self.modules, whole("rank", rank, 1))
        return dataclasses.replace(self, modules=modules, truncation_error=errors)

    def scaled(self, factor: SupportsFloat) -> Adapter:
        """Multiply every ΔW and Δb by a number.

        Args:
            factor: a finite number, which may be 0 or negative.

        Raises:
            ArgumentError: anything but a finite number.
        """
        scale = number("factor", factor)
        return self._with({path: update.scaled(scale) for path, update in self.modules.items()})

    def __mul__(self, factor: SupportsFloat) -> Adapter:
        """Multiply every ΔW and Δb by a number, as `scaled` does.

        Args:
            factor: a finite number.

        Raises:
            ArgumentError: anything but a finite number.
        """
        return self.scaled(factor)

    __rmul__ = __mul__

    def __add__(self, other: Adapter) -> Adapter:
        """Both adapters at once; weight them with `scaled`. Their sites stay separate.

        Args:
            other: an adapter of the same base model, with another name.

        Raises:
            ArgumentError: `other` is not an adapter.
            AdapterError: the same name twice; different bases; or DoRA, whose ΔW is not additive,
                on a module of both.
        """
        base = self._common_base(other, "+")
        parts = [(self.name, self.modules), (other.name, other.modules)]
        modules = extensions.side_by_side(parts)
        errors = {**self.truncation_error, **other.truncation_error}
        return Adapter(modules, f"{self.name} + {other.name}", base, errors)

    def __sub__(self, other: Adapter) -> Adapter:
        """ΔW − ΔW′ as one adapter, which `save` can write.

        Args:
            other: an adapter of the same base model.

        Raises:
            ArgumentError: `other` is no adapter.
            AdapterError: different bases, or a module of both whose updates do not add up (DoRA,
                trained whole, a trained bias).
        """
        base = self._common_base(other, "-")
        modules = extensions.stacked([(self.modules, 1.0), (other.modules, -1.0)])
        return Adapter(modules, f"{self.name} - {other.name}", base)

    def mixed(self, other: Adapter, weight: SupportsFloat = 0.5) -> Adapter:
        """(1 − w) ΔW + w ΔW′ as one adapter, which `save` can write.

        A weight outside 0 to 1 extrapolates.

        Args:
            other: an adapter of the same base model.
            weight: w, the other adapter's share.

        Raises:
            ArgumentError: `other` is no adapter, or the weight is no finite number.
            AdapterError: different bases, or a module of both whose updates do not add up (DoRA,
                trained whole, a trained bias).
        """
        base = self._common_base(other, "mixed with")
        share = number("weight", weight)
        modules = extensions.stacked([(self.modules, 1 - share), (other.modules, share)])
        return Adapter(modules, f"{1 - share:g} {self.name} + {share:g} {other.name}", base)

    def null(self, seed: int = 0, draw: int = 0, *, parts: Parts | None = None) -> Adapter:
        """An adapter of the same modules, ranks and singular values in random directions.

        The same seed and draw give the same adapter, here and wherever null adapters are drawn:
        `null_test(…, seed=3)` holds the draws 0, 1, … of seed 3. It is computed in float64.

        Cost: no forward pass; a QR decomposition of the factors, and one of as many Gaussians.

        Args:
            seed: a whole number of at least 0, the seed of all draws.
            draw: the number of the draw, from 0.
            parts: output rows of each part of a fused module, by the adapter's own key, where each
                part is to keep its spectrum (`null_test` passes the model's q, k and v).

        Raises:
            ArgumentError: a seed or draw that is no whole number, or below 0.
            UnsupportedAdapterError: DoRA, trained biases or modules: their change depends on the
                base.
        """
        seed = whole("seed", seed, 0)
        draw = whole("draw", draw, 0)
        return next(null_draws(self, seed, [draw], parts or {}))

    def save(
        self, path: str | Path, *, format: Literal["peft", "gguf"] = "peft", base: Any = None
    ) -> Path:
        """Write the adapter to a folder in PEFT's format; `PeftModel.from_pretrained` loads it.

        With `format="gguf"` it is one file instead, which llama.cpp loads (`--lora`), and needs the
        package gguf.

        Files of the same names are replaced. Ranks and scales are each module's own; rsLoRA's s
        is written as the α/r that equals it, and dense differences as LoRA of full rank. The parts
        of a sum become one adapter where they share no module.

        Args:
            path: the folder, which is created if it is missing; for GGUF the file.
            format: 'peft' or 'gguf'.
            base: the base model, its configuration or its folder, whose layout GGUF depends on;
                None for the folder that the adapter names.

        Returns:
            The path.

        Raises:
            ArgumentError: another format.
            AdapterError: a module whose scale is zero.
            UnsupportedAdapterError: something that PEFT's format cannot hold: two updates of one
                module, DoRA on some modules only, a part of a trained bias or of DoRA's update.
        """
        if word("format", format, ("peft", "gguf")) == "gguf":
            return extensions.save_gguf(self.modules, self.name, self.base_model, path, base)
        return extensions.save_adapter(self.modules, self.name, self.base_model, path)

    def _with(self, modules: Mapping[str, ModuleUpdate]) -> Adapter:
        return dataclasses.replace(self, modules=modules)

    def _matching(self, glob: Any) -> set[str]:
        """The keys that match the glob, with or without the name of their part of a sum.

        The glob may begin with 'base_model.model.', as the names in PEFT's files do.
        """
        if not isinstance(glob, str):
            raise ArgumentError(f"{glob!r}: expected a glob of module paths, like '*.q_proj'.")
        path = glob.removeprefix(peft_read.PREFIX)
        keys = {key for key in self.modules if any(fnmatch.filter((key, module_path(key)), path))}
        if not keys:
            shown = ", ".join([*self.modules][:4])
            fact = f"{glob!r} matches no module of {self.name}, which has {shown}, …"
            if glob.startswith("blocks."):
                fact += (
                    "; an adapter knows paths of Hugging Face alone: that of a lens's site is "
                    f"lens.sites[{glob!r}].module"
                )
            raise SiteError(fact)
        return keys

    def _in_table(self, table: Any) -> set[str]:
        """The keys of a table's modules; in a sum of adapters, of the parts that its sites name."""
        if "module" not in table.columns:
            raise ArgumentError(
                f"a table with the columns {list(table.columns)}; expected a column 'module', as "
                "attribution.top(k) has it (for effects: effects.attribution().top(k))."
            )
        sites = table["site"] if "site" in table.columns else [""] * len(table)
        keys: set[str] = set()
        for path, site in zip(table["module"], sites, strict=True):
            part = str(site).partition("@")[2]
            wanted = f"{path}@{part}" if part else path
            hits = {key for key in self.modules if wanted in (key, module_path(key))}
            if not hits:
                fact = f"the table names {path!r} (site {site!r}), which {self.name} does not adapt"
                raise SiteError(f"{fact}; was it computed with another adapter?")
            keys |= hits
        return keys

    def _common_base(self, other: Any, operation: str) -> str | None:
        """The base of this adapter and another one, with which it is combined."""
        if not isinstance(other, Adapter):
            fact = f"an adapter {operation} {type(other).__name__}; both must be ll.Adapter"
            raise ArgumentError(f"{fact} (from a folder: ll.load_adapter(path)).")
        return Adapter.require_one_base([self, other], "two bases do not combine")

    if not TYPE_CHECKING:  # A type checker would take every name for one of the adapter.

        def __getattr__(self, name: str) -> Any:
            """Return what has a new name, or refuse with what may be meant."""
            if name in guesses.FORMER_OF_ADAPTER:
                names = guesses.FORMER_OF_ADAPTER
                return getattr(self, guesses.present_name("adapter", name, names))
            return guesses.missing_attribute(self, name, guesses.OF_ADAPTER)

    def __getitem__(self, path: str) -> ModuleUpdate:
        """The update of one module.

        Args:
            path: the module's path, or a glob that matches it alone.

        Raises:
            SiteError: no such module, or a glob that matches several.
            ArgumentError: a path that is not a string.
        """
        keys = self._matching(path)
        matched = [key for key in self.modules if key in keys]
        if len(matched) > 1:
            fact = f"{path!r} matches {len(matched)} modules of {self.name}: {first_few(matched)}"
            raise SiteError(f"{fact}; name one, or keep them all with adapter.only({path!r}).")
        return self.modules[matched[0]]

    def __contains__(self, path: object) -> bool:
        return path in self.modules

    def __iter__(self) -> Iterator[str]:
        """The paths of its modules, in the order of `modules`."""
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    @staticmethod
    def require_one_base(
        adapters: Iterable[Adapter], why: str, *, in_shell: str | None = None
    ) -> str | None:
        """The one base that these adapters name; None where none of them names any.

        Args:
            adapters: the adapters that are combined or compared.
            why: the reason that they need one base, for the error.
            in_shell: what to do about it at the command line, if it is one model; by default what
                is done in Python.

        Raises:
            AdapterError: two name different bases.
        """
        stated = [adapter for adapter in adapters if adapter.base_model]
        if not stated:
            return None
        first = stated[0]
        for other in stated:
            if other.base_model != first.base_model:
                remedy = (
                    "if it is one model, give both one name: dataclasses.replace(adapter, "
                    "base_model=…)."
                )
                if in_shell is None:
                    in_shell = f"in Python, {remedy}"
                raise AdapterError(
                    f"{first.name} names the base {first.base_model!r}, {other.name} "
                    f"{other.base_model!r}; {why}",
                    remedy=remedy,
                    in_shell=in_shell,
                )
        return first.base_model

    def __repr__(self) -> str:
        updates = self.modules.values()
        ranks = {update.rank for update in updates if isinstance(update, LoRAFactors)}
        without_factors = sum(isinstance(update, TrainedModule) for update in updates)
        parts = [many(len(self), "module")]
        if ranks:
            parts.append(f"rank {sorted(ranks)}")
        if without_factors:
            parts.append(f"{without_factors} without factors")
        if self.base_model:
            parts.append(f"base {self.base_model!r}")
        return f"Adapter({self.name!r}: {', '.join(parts)})"


def null_draws(
    adapter: Adapter, seed: int, draws: Sequence[int], parts: Parts
) -> Iterator[Adapter]:
    """Each of these draws as `Adapter.null` gives it; what they share is computed once.

    Args:
        adapter: the adapter.
        seed: the seed of all draws.
        draws: their numbers.
        parts: the output rows of each part of a fused module, as for `Adapter.null`.
    """
    updates = extensions.null_updates(adapter.modules, seed, draws, parts)
    for draw, modules in zip(draws, updates, strict=True):
        label = f"{draw}" if seed == 0 else f"{seed}.{draw}"
        name = f"null {label} of {adapter.name}"
        yield Adapter(modules, name=name, base_model=adapter.base_model)
