"""Functions that the lens calls and folders above the core provide (see `core/provided.py`).

A lens is sites, maps, hooks and gates over a host. What it does beyond that, such as generating
text or comparing its base with the one that the adapter names, stands in a folder above the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model.basis import SiteMap, Update
from lens_lora.core.model.sites import Heads, Names, Site
from lens_lora.core.provided import declared
from lens_lora.core.readout.positions import Positions
from lens_lora.core.readout.prompts import Prompts, PromptsLike
from lens_lora.core.readout.readout import Readout
from lens_lora.core.readout.responses import AnswerLike, Generated
from lens_lora.families import BridgedFamily

if TYPE_CHECKING:
    from lens_lora.core import Function, LoraLens, Scale
    from lens_lora.spans import Temporary


# Called as writer(inputs, output) after a map has run. It returns the output to use instead, or
# None to keep the one that the map made.
Writer = Callable[[tuple[Tensor, ...], Tensor], Tensor | None]


@runtime_checkable
class Probe(Protocol):
    """A run of the base with random updates of an adapter's modules.

    Attributes:
        logits: the logits of that run.
    """

    logits: Tensor


# --- A hooked model and its base


@declared
def family_of_bridge(model: Any, heads: Heads) -> BridgedFamily:
    """The family of a TransformerBridge, read from the bridge itself. No forward pass.

    Provided by `hosts/bridged.py`.
    """
    raise NotImplementedError


@declared
def named_as_model(adapter: Adapter, model: Any) -> Adapter:
    """The adapter, its modules named as this model names them: experts by their stack.

    Provided by `hosts/single_experts.py`.

    Raises:
        AdapterError: an expert that the model lacks, or an update that the stack cannot take.
    """
    raise NotImplementedError


@declared
def require_own_parameters(model: Any, adapter: Adapter) -> None:
    """Check that modules which were trained whole compute what their parameters say.

    Provided by `hosts/bridged.py`.

    Raises:
        AdapterError: a module with a forward of its own, such as 0.5 W z.
    """
    raise NotImplementedError


@declared
def check_modules(
    model: Any,
    hf_model: nn.Module | None,
    adapter: Adapter,
    done: frozenset[str],
    *,
    eps: Callable[[], float],
    probe: Probe | None,
) -> frozenset[str]:
    """Check that a lens would compute the adapter's modules on this model exactly.

    Provided by `hosts/probe.py`.

    Args:
        model: the hooked model.
        hf_model: the Hugging Face model to compare with; None if it is not at hand.
        adapter: the adapter.
        done: the modules that were checked before. They are not run again.
        eps: returns the precision in which the model computes; it is called only if a module is
            checked.
        probe: a finished probe of the base, to be used instead of a new one.

    Returns:
        frozenset[str]: every module that is checked now, `done` included.

    Raises:
        ModelStateError: a module is not computed exactly, or cannot be checked without `hf_model`.
    """
    raise NotImplementedError


@declared
def note_on_base(lens: LoraLens, *, is_refused: bool) -> str:
    """The warning about the base of a new lens; '' where there is none. No forward pass.

    Provided by `hosts/given_base.py`.

    Args:
        lens: the new lens.
        is_refused: whether to refuse a base that holds the adapter already, instead of warning.

    Raises:
        ModelStateError: the base holds the adapter already.
    """
    raise NotImplementedError


@declared
def note_on_names(named: str | None, names: Sequence[str]) -> str:
    """The warning about the base by names alone; '' where they agree, or one is missing.

    Provided by `hosts/given_base.py`.

    Args:
        named: the base that the adapter names.
        names: the names by which the model's base is known.
    """
    raise NotImplementedError


# --- Modules that a lens cannot be laid over


@declared
def refuse_unusable_weights(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Refuse weights that are split over processes, or quantised by an unknown method.

    Provided by `hosts/unusable.py`.

    Raises:
        ModelStateError: naming such a weight.
    """
    raise NotImplementedError


@declared
def refuse_unusable_bridge(model: Any, modules: Mapping[nn.Module, str]) -> None:
    """Refuse a TransformerBridge that computes another function than its Hugging Face model.

    Provided by `hosts/unusable.py`.

    Args:
        model: the bridge.
        modules: its modules and those of its Hugging Face model, with their names.

    Raises:
        ModelStateError: naming the module, with the remedy.
    """
    raise NotImplementedError


@declared
def refuse_without_float64(modules: Iterable[nn.Module]) -> None:
    """Refuse stacks of experts in float64 that are computed by a kernel which lacks it.

    Provided by `hosts/experts.py`.

    Raises:
        ModelStateError: naming the experts, with the remedy.
    """
    raise NotImplementedError


# --- Quantised modules


@declared
def quantised_linears(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Every quantised linear module among these.

    Provided by `hosts/quantised.py`.
    """
    raise NotImplementedError


@declared
def quantised_name(module: nn.Module) -> str | None:
    """'4 bit' or '8 bit' for a quantised linear module, None for any other.

    Provided by `hosts/quantised.py`.
    """
    raise NotImplementedError


@declared
def dequantised(module: nn.Module, dtype: torch.dtype | None = None) -> Float[Tensor, "out in"]:
    """Ŵ of a quantised linear module, made anew at each call.

    Provided by `hosts/quantised.py`.
    """
    raise NotImplementedError


@declared
def differentiable_products(modules: tuple[nn.Module, ...]) -> AbstractContextManager[None]:
    """Within the block these quantised modules have derivatives of every order.

    Provided by `hosts/quantised.py`.
    """
    raise NotImplementedError


# --- Stacks of experts


@declared
def experts_by_layer(model: nn.Module) -> dict[int, nn.Module]:
    """The stack of experts of each layer that has one, by the layer's number.

    Provided by `hosts/experts.py`.
    """
    raise NotImplementedError


@declared
def as_one_map(owner: Any, weight: Tensor) -> Float[Tensor, "out in"]:
    """The weights of all experts, [W_1 … W_E], [out, expert · in]; a router's weight as it is.

    Provided by `hosts/experts.py`.
    """
    raise NotImplementedError


@declared
def expert_shape(owner: Any, weight: Tensor) -> tuple[int, int]:
    """(out, in) of each expert's map, or of a router's.

    Provided by `hosts/experts.py`.
    """
    raise NotImplementedError


@declared
def expert_map(update: Update, dtype: torch.dtype, device: torch.device) -> SiteMap:
    """The map of a stack of experts, on the device where the model lies.

    Provided by `hosts/experts.py`.
    """
    raise NotImplementedError


@declared
def write_at(span: Temporary, module: nn.Module, name: str, writer: Writer) -> None:
    """Until the span ends, `writer` changes what the map of this parameter makes.

    The module is a stack of experts or a router, and has no hook points.

    Provided by `hosts/experts.py`.

    Raises:
        ModelStateError: the experts are spread over processes.
    """
    raise NotImplementedError


# --- Prompts, and what follows them


@declared
def tokenizer_differences(tokenizer: Any, folder: Path) -> list[str]:
    """How the tokenizer of an adapter's folder differs from the model's, in words.

    Provided by `formats/tokenizers.py`.
    """
    raise NotImplementedError


@declared
def continued(model: Any, prompts: Prompts, response: AnswerLike) -> Prompts:
    """The prompts with a response after each, both in one row: see `LoraLens.prompts`.

    Provided by `responses/answers.py`.
    """
    raise NotImplementedError


@declared
def generated(
    lens: LoraLens,
    prompts: PromptsLike,
    max_new_tokens: int,
    scale: Scale,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    eos_token_id: int | Sequence[int] | None,
    progress: bool,
) -> Generated:
    """Generate text after each prompt: see `LoraLens.generate`.

    Provided by `responses/generate.py`.
    """
    raise NotImplementedError


# --- Analyses, and what they need


@declared
def ablate(
    span: Temporary,
    lens: LoraLens,
    source: Any,
    names: Names | None,
    positions: Positions,
    sinks: bool,
) -> Any:
    """Ablate directions at hook points, until the span ends: see `LoraLens.ablate_directions`.

    The source is typed there as here: a tensor, a mapping of tensors, a `Contrast` of a folder
    above, or an autoencoder of another library. What is returned is the model.

    Provided by `directions/removal.py`.
    """
    raise NotImplementedError


@declared
def function_of(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout | None = None,
    response: AnswerLike | None = None,
    *,
    progress: bool = True,
) -> Function:
    """Make g(ε) over these prompts: see `LoraLens.function`.

    Provided by `core/function/binding.py`.
    """
    raise NotImplementedError


@declared
def rerouted_tokens(g: Function) -> dict[str, Float[Tensor, " batch"]]:
    """How many tokens of each prompt have other experts at ε = 1 than at 0, by layer of experts.

    Two forward passes; none where the model has no stacks of experts.

    Provided by `hosts/rerouted.py`.
    """
    raise NotImplementedError


@declared
def null_adapters(lens: LoraLens, seed: int, draws: int) -> Iterator[Adapter]:
    """The null draws of a lens's adapter: see `LoraLens.null_adapters`.

    Provided by `hosts/null_adapters.py`.
    """
    raise NotImplementedError


@declared
def slopes_of_adapters(
    g: Function,
    adapters: Callable[[], Iterable[Adapter]],
    sites: Sequence[Site],
    like: Sequence[Adapter],
) -> Float[Tensor, "adapter batch site"]:
    """∂g/∂ε_l at 0 of many adapters: see `Function.slopes_of_adapters`.

    Provided by `banks/base_half.py`.
    """
    raise NotImplementedError
