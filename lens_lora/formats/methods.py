"""The updates of any PEFT method, measured by running its layers.

What a tuner layer adds to its base layer is δ(x) = layer(x) − base(x). If that is a change of
weights, then δ(x) = ΔW x + Δb, so that

    Δb = δ(0),   ΔW = δ(I) − Δb    (the rows of I are inputs),   of an embedding  ΔW = δ(every id).

1. No name of a method is trusted: `get_delta_weight` is a rotation in one and a factor in another,
   and what `merge` leaves is not what every layer computes.
2. δ is compared with ΔW x + Δb on random input of three sizes. A layer that computes anything else
   (a router, a mean over the batch) is refused.
3. The base with all these changes must give PEFT's logits, since a method may change more.

A layer is copied to float64, so that the difference loses nothing of ΔW, which is rounded once: to
the base's dtype, or float32. Where PEFT itself computes in float32 (DeFT, C3A), its error remains.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import float64_device, is_memory_short, without_warnings
from lens_lora.core import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter import (
    MERGED,
    MERGED_FOLDER,
    base_of,
    converted,
    dense_factors,
    extensions,
    refuse_without_delta,
)
from lens_lora.errors import (
    AdapterError,
    ArgumentError,
    UnsupportedAdapterError,
    is_of_the_system,
    located,
)
from lens_lora.formats import from_models
from lens_lora.formats.own_forward import apart, is_transposed

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

_INPUTS = 2048  # rows of the identity at a time: 64 MB for a width of 4096
_SIZES = (0.1, 1.0, 10.0)  # of random input: a function that bends shows at one of them
# How far δ may be from ΔW x + Δb, relative to δ. Where PEFT computes in float32, a δ that is small
# beside the output is lost in its rounding, and the second number holds.
_AGREEMENT, _LOST = 1e-4, 1e-2
_ROUNDINGS = 16  # that make up rounding, relative to the output
_RANK_SHARE = 4  # up to a quarter of the smaller side, factors are the smaller way to hold ΔW

_CPU = torch.device("cpu")
_Updates = dict[str, ModuleUpdate]  # by module path

# --- An adapter: live, or a folder over its base


@extensions.live_updates.provide
def live_updates(
    peft_model: PeftModel, adapter_name: str
) -> tuple[dict[str, ModuleUpdate], str | None]:
    """The updates of one adapter of a live model; what no tensor holds is measured."""
    return from_models.live_updates(peft_model, adapter_name, measured_updates)


@extensions.updates_over_base.provide
def updates_over_base(
    folder: Path, config: PeftConfig, base_for: Callable[[str | None], nn.Module]
) -> tuple[_Updates, str | None]:
    """(updates by module path, the base it names) of a folder, laid by PEFT over its base.

    The base is asked for by that name, once it is known that the method has a ΔW. It stays as it
    is: PEFT works on modules and parameters of their own over the same memory.
    """
    from peft import get_peft_model

    with located(folder):
        refuse_without_delta(config)
        name = base_of(config)  # before PEFT writes the name of this base there
        base = base_for(name)
        _require_plain(base)
        try:
            # PEFT draws initial values before it loads the file's.
            with without_warnings(), torch.random.fork_rng([]):
                model = get_peft_model(_twin(base), config)
                keys = model.load_adapter(str(folder), "default", torch_device="cpu")
        except Exception as error:
            if is_of_the_system(error) or is_memory_short(error):
                raise
            # Modules that are not there, and shapes that differ.
            is_misfit = isinstance(error, ValueError | RuntimeError)
            raise AdapterError(
                f"PEFT cannot lay it over this {type(base).__name__} "
                f"({type(error).__name__}: {error})",
                remedy="is that the base it was trained on?" if is_misfit else "",
            ) from error
        missing, unknown = _missing(model, keys.missing_keys), keys.unexpected_keys
        if missing or unknown:
            raise AdapterError(
                f"{len(missing)} tensors are missing from the file, and {len(unknown)} in it "
                f"belong to no module of this base: {[*missing, *unknown][:3]}."
            )
        measured = functools.partial(measured_updates, base=base)
        return from_models.live_updates(model, "default", measured)[0], name


def _missing(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """The keys whose tensor was loaded under no other key either, as that of a shared bank is."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(p) for key, p in parameters.items() if key not in keys}
    return [key for key in keys if id(parameters.get(key)) not in loaded]


def _require_plain(base: Any) -> None:
    inside = base.modules() if isinstance(base, nn.Module) else ()
    names = {type(module).__module__.partition(".")[0] for module in inside}
    if not hasattr(base, "config") or names & {"peft", "transformer_lens"}:
        raise ArgumentError(
            f"base is a {type(base).__name__}; expected a Hugging Face model that neither PEFT nor "
            "transformer-lens has changed: AutoModelForCausalLM.from_pretrained(name)."
        )


def measured_updates(model: Any, name: str, config: Any, base: Any = None) -> _Updates:
    """What each layer of this adapter adds when it is run, and the modules trained beside them.

    They are compared with PEFT over the true base, or else over the base in the PeftModel.
    """
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    refuse_without_delta(config)
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise UnsupportedAdapterError(
            f"bias={bias!r} trains biases in the base itself.",
            remedy=f"Merge it and compare with the true base: {MERGED}.",
            in_shell=f"Give the folder that {MERGED_FOLDER} writes.",
        )
    from_models.require_unmerged(model)
    twin = _twin(model)
    set_adapter(twin, name)
    outer: dict[str, Any] = {}
    live = from_models.configs_and_base(twin)[1]
    for path, module in live.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(True)
            if not any(path.startswith(f"{before}.") for before in outer):
                outer[path] = module
    updates = from_models.updates_of_layers(live, name, config)
    for path, module in outer.items():
        if isinstance(module, BaseTunerLayer):
            with located(f"module {path}"):
                update = _layer_update(module)
            if update is not None:
                updates[path] = update
    _require_whole(twin, from_models.base_within(twin) if base is None else _twin(base), updates)
    return updates


def _twin(model: Any) -> Any:
    """A copy in evaluation mode, with parameters of its own over the same memory."""
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        is_plain = type(p) is nn.Parameter
        memo[id(p)] = nn.Parameter(p.detach(), p.requires_grad) if is_plain else p
    return copy.deepcopy(model, memo).eval()


def _require_whole(peft_model: Any, base: Any, updates: Mapping[str, ModuleUpdate]) -> None:
    """Refuse updates that, added to the base, do not give the PeftModel's logits.

    Layers may be all that a method changes, or not. Trained rows and stored embeddings, which a
    tied head may follow, are PEFT's own wrappers and are not compared.
    """
    trained = (update for update in updates.values() if isinstance(update, TrainedModule))
    if any(update.tied or update.tokens is not None for update in trained):
        return
    for path, update in updates.items():
        module = base.get_submodule(path)
        if isinstance(update, LoRAFactors):
            module.register_forward_hook(functools.partial(_added, update))
            continue
        for key in ("weight", "bias"):
            value = getattr(update, key)
            if value is not None:
                module.register_parameter(key, nn.Parameter(value.to(getattr(module, key)), False))
    off, span, is_near = apart(
        from_models.logits_of(base, {}), from_models.logits_of(peft_model, {}), base.parameters()
    )
    if not is_near:
        raise UnsupportedAdapterError(
            f"the base with the changes of all layers is {off:.2g} off PEFT's logits, of a range "
            f"of {span:.2g}: the method changes more than the weights of these layers."
        )


def _added(update: LoRAFactors, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    change = lora_output(update, module, args[0].to(output.device), output.dtype)
    return output + (change if update.lora_bias is None else change + update.lora_bias.to(output))


def lora_output(update: LoRAFactors, module: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """s·BA of a module's input, which is multiplied as the module's own output is."""
    A, B = (factor.to(inputs.device, dtype) for factor in (update.A, update.B))
    u = inputs.to(dtype) @ A.T if inputs.is_floating_point() else A.T[inputs]
    return u @ B.T * (update.scale * float(getattr(module, "embed_scale", 1.0)))


# --- A layer


def _layer_update(layer: Any) -> ModuleUpdate | None:
    """What a tuner layer's active adapter adds to its base layer; None if that is nothing."""
    base = layer.get_base_layer()
    weight = getattr(base, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.is_meta or not weight.is_floating_point():
        kind = type(base).__name__
        raise _refusal(layer, f"its {kind} is quantised, not in memory, or no linear module")
    if weight.ndim == 1:
        return _trained_norm(layer)
    if weight.ndim != 2:
        raise _refusal(layer, f"its weight is {tuple(weight.shape)}; expected a matrix")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        bias, delta, size = _affine(_in_float64(layer))
        factors = _factors(delta, _rounding(size), dtype)
    if not delta.any() and not bias.any():
        return None
    A, B = (converted(factor, factor.dtype, _CPU) for factor in (factors.A, factors.B))
    factors = dataclasses.replace(factors, A=A, B=B)
    return dataclasses.replace(factors, lora_bias=bias.to("cpu", dtype)) if bias.any() else factors


def _in_float64(layer: Any) -> Any:
    """A copy of the layer, and of the tensors in dictionaries of its own, which torch leaves."""
    twin = copy.deepcopy(layer).to(float64_device(layer.get_base_layer().weight.device)).double()
    for module in twin.modules():
        for held in (value for value in vars(module).values() if isinstance(value, dict)):
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    held[name] = tensor.double()
    return twin.eval()


def _affine(layer: Any) -> tuple[Float[Tensor, " out"], Float[Tensor, "out in"], float]:
    """(Δb, ΔW, the size of the outputs that they are differences of), checked on random input."""
    base = layer.get_base_layer()
    weight, is_embedding = base.weight, isinstance(base, nn.Embedding)
    width = weight.shape[0 if is_transposed(base) else 1]

    def delta(inputs: Tensor) -> Tensor:
        try:
            return layer(inputs) - base(inputs)
        except Exception as error:
            if is_memory_short(error):
                raise
            raise _refusal(layer, f"it cannot be run alone in float64 ({error})") from error

    identity = torch.arange(width) if is_embedding else torch.eye(width, dtype=torch.float64)
    rows = [delta(part.to(weight.device)[None])[0] for part in identity.split(_INPUTS)]
    nothing = weight.new_zeros(1, 1, width)
    bias = torch.zeros_like(rows[0][0]) if is_embedding else delta(nothing)[0, 0]
    change = (torch.cat(rows) - bias).T
    generator = torch.Generator().manual_seed(0)
    if is_embedding:
        inputs = torch.randint(width, (len(_SIZES), 8), generator=generator).to(weight.device)
        expected = change.T[inputs]
    else:
        shape = (len(_SIZES), 8, width)
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
        inputs = inputs * inputs.new_tensor(_SIZES)[:, None, None]
        expected = inputs @ change.T + bias
    _require_same(layer, delta(inputs), expected, layer(inputs))
    scale = float(getattr(base, "embed_scale", 1.0)) if is_embedding else 1.0
    return bias, change / scale, float(weight.norm() + change.norm()) / scale


def _require_same(layer: Any, change: Tensor, expected: Tensor, output: Tensor) -> None:
    """Refuse a layer of which the change on random input is not that of its ΔW and Δb."""
    tensors = (change - expected, change, output)
    off, size, whole = (tensor.abs().flatten(1).amax(1) for tensor in tensors)
    single = _ROUNDINGS * torch.finfo(torch.float32).eps * whole
    allowed = (_AGREEMENT * size).maximum(single).minimum(_LOST * size)
    if not bool((off <= allowed + _rounding(whole)).all()):
        apart = f"on random input ΔW x + Δb is off by {float((off / size).max()):.1g} of it"
        small = "or so small that PEFT's rounding to float32 shows"
        why = f"what it adds is a function of its input, and no change of weights, {small}: {apart}"
        raise _refusal(layer, why)


def _rounding(size: Any) -> Any:
    return _ROUNDINGS * torch.finfo(torch.float64).eps * size


def _factors(delta: Float[Tensor, "out in"], rounding: float, dtype: torch.dtype) -> LoRAFactors:
    """ΔW as factors of its rank where that is small, else whole; nothing but rounding is cut."""
    count = min(delta.shape) // _RANK_SHARE
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(delta.shape[1], count, generator=generator, dtype=torch.float64)
    span, _ = torch.linalg.qr(delta @ drawn.to(delta.device))
    if not count or float((delta - span @ (span.T @ delta)).norm()) > rounding:
        return dense_factors(delta.to(dtype))
    left, sizes, right = torch.linalg.svd(span.T @ delta, full_matrices=False)
    rank = max(int((sizes > rounding).sum()), 1)
    B, A = span @ (left[:, :rank] * sizes[:rank]), right[:rank]
    return LoRAFactors(A.to(dtype), B.to(dtype))


def _trained_norm(layer: Any) -> TrainedModule | None:
    """A norm that LN Tuning trained: its layer runs a copy of the norm with other parameters."""
    copies = getattr(layer, "ln_tuning_layers", None)
    if copies is None:
        raise _refusal(layer, "its weight is a vector, and only LN Tuning of norms is read")
    (name,) = layer.active_adapters
    if name not in copies:
        return None
    trained = {key: p.detach().clone().cpu() for key, p in copies[name].named_parameters()}
    return TrainedModule(weight=trained.get("weight"), bias=trained.get("bias"))


def _refusal(layer: Any, why: str) -> UnsupportedAdapterError:
    method = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return UnsupportedAdapterError(f"a {type(layer).__name__} of PEFT's {method}: {why}.")
