"""The updates of any PEFT method, measured by running its layers.

What a tuner layer adds to its base layer is δ(x) = layer(x) − base(x). If that is a change of
weights, then δ(x) = ΔW x + Δb, so that

    linear module:  Δb = δ(0),   ΔW = δ(I) − Δb      (the rows of I are the inputs)
    embedding:      ΔW = δ(every id)

1. The methods of a layer are not trusted: `get_delta_weight` is a rotation in one layer and a
   factor in another, and not every layer computes what `merge` leaves.
2. δ is compared with ΔW x + Δb on random input of three sizes. A layer that computes anything else
   (a router, a mean over the batch) is refused.
3. The base with all these changes must give PEFT's logits, since a method may change more.

A layer is copied to float64, so that ΔW loses no digits in the difference; it is rounded once, to
float32 or to the base's dtype if that is wider. Where PEFT itself computes in float32 (DeFT, C3A),
its rounding error remains.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora.compat import float64_device, is_memory_short
from lens_lora.core import LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.core.adapter import MERGED, MERGED_FOLDER, converted, refuse_without_delta
from lens_lora.errors import UnsupportedAdapterError, located
from lens_lora.formats.live_layers import (
    base_within,
    configs_and_base,
    require_unmerged,
    updates_of_layers,
)
from lens_lora.formats.own_forward import difference_of, is_transposed, logits_of

# Rows of the identity that are run at a time: 64 MB for a width of 4096.
_INPUTS = 2048
# Sizes of random input: at one of them a function that is not linear shows that it bends.
_SIZES = (0.1, 1.0, 10.0)
# Random inputs of each size.
_DRAWS = 8
# How far δ may be from ΔW x + Δb, relative to δ. The second number holds if PEFT computes in
# float32 and δ is so small beside the output that rounding hides it.
_AGREEMENT = 1e-4
_LOST = 1e-2
# A difference within this many machine precisions of the output counts as rounding.
_ROUNDINGS = 16
# Up to a quarter of the smaller side, factors take less memory than ΔW.
_RANK_SHARE = 4

_Model = TypeVar("_Model", bound=nn.Module)
_Size = TypeVar("_Size", float, Tensor)


# --- An adapter


def measured_updates(
    model: Any, name: str, config: Any, base: Any = None
) -> dict[str, ModuleUpdate]:
    """The updates of an adapter's layers, measured by running each, and of modules trained too.

    Args:
        model: a model with the adapter live in it. It is not changed.
        name: the name of the adapter.
        config: the adapter's configuration.
        base: the true base, with which the updates are checked; None for the base that the model
            holds.

    Raises:
        UnsupportedAdapterError: the method changes something else than weights.
    """
    refuse_without_delta(config)
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise UnsupportedAdapterError(
            f"bias={bias!r} trains biases in the base itself.",
            remedy=f"Merge it and compare with the true base: {MERGED}.",
            in_shell=f"Give the folder that {MERGED_FOLDER} writes.",
        )
    require_unmerged(model)
    peft_model = twin(model)
    layers = _active_layers(peft_model, name)
    _, live = configs_and_base(peft_model)
    updates = updates_of_layers(live, name, config)
    for path, layer in layers.items():
        with located(f"module {path}"):
            update = _layer_update(layer)
        if update is not None:
            updates[path] = update
    plain_base = base_within(peft_model) if base is None else twin(base)
    _require_peft_s_logits(peft_model, plain_base, updates)
    return updates


def twin(model: _Model) -> _Model:
    """A copy of a model in evaluation mode, with parameters of its own over the same memory."""
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
        else:
            memo[id(parameter)] = parameter
    return copy.deepcopy(model, memo).eval()


def _active_layers(peft_model: Any, name: str) -> dict[str, Any]:
    """The outermost tuner layers, by path, with this adapter switched on."""
    from peft.functional import set_adapter
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    set_adapter(peft_model, name)
    outer: dict[str, Any] = {}
    _, live = configs_and_base(peft_model)
    for path, module in live.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(True)
            if not any(path.startswith(f"{before}.") for before in outer):
                outer[path] = module
    return {path: module for path, module in outer.items() if isinstance(module, BaseTunerLayer)}


def _require_peft_s_logits(peft_model: Any, base: Any, updates: Mapping[str, ModuleUpdate]) -> None:
    """Refuse updates that, added to the base, do not give the PeftModel's logits.

    A method may change more than its layers. Adapters with trained rows or stored embeddings, which
    a tied head may follow, are not compared: these are PEFT's own wrappers.
    """
    trained = [update for update in updates.values() if isinstance(update, TrainedModule)]
    if any(update.tied or update.tokens is not None for update in trained):
        return
    for path, update in updates.items():
        module = base.get_submodule(path)
        if isinstance(update, LoRAFactors):
            module.register_forward_hook(functools.partial(_add_update, update))
        else:
            _replace_parameters(module, update)
    logits = logits_of(base, {})
    expected = logits_of(peft_model, {})
    difference = difference_of(logits, expected, base.parameters())
    if not difference.is_rounding:
        raise UnsupportedAdapterError(
            "with the changes of all layers the base does not give PEFT's logits: they differ by "
            f"{difference.largest:.2g}, and the logits span {difference.span:.2g}. The method "
            "changes more than the weights of these layers."
        )


def _replace_parameters(module: nn.Module, update: TrainedModule) -> None:
    for key in ("weight", "bias"):
        value = getattr(update, key)
        if value is not None:
            parameter = nn.Parameter(value.to(getattr(module, key)), requires_grad=False)
            module.register_parameter(key, parameter)


def _add_update(update: LoRAFactors, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A forward hook that adds an update to a module's output."""
    change = lora_output(update, module, args[0].to(output.device), output.dtype)
    if update.lora_bias is not None:
        change = change + update.lora_bias.to(output)
    return output + change


def lora_output(update: LoRAFactors, module: Any, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """The product s·BA of a module's input, scaled as the module scales its own output.

    Args:
        update: the factors.
        module: the module whose input it is; an embedding may scale its output.
        inputs: token ids of an embedding, else activations.
        dtype: the dtype in which it is computed.
    """
    A = update.A.to(inputs.device, dtype)
    B = update.B.to(inputs.device, dtype)
    u = inputs.to(dtype) @ A.T if inputs.is_floating_point() else A.T[inputs]
    return u @ B.T * (update.scale * float(getattr(module, "embed_scale", 1.0)))


# --- A layer


def _layer_update(layer: Any) -> ModuleUpdate | None:
    """The change of a base layer by its tuner layer's active adapter; None if it is zero."""
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
        bias, delta, size = _measured_change(_in_float64(layer))
        if not delta.any() and not bias.any():
            return None
        factors = _factors(delta, _rounding(size), dtype)
    cpu = torch.device("cpu")
    lora_bias: Tensor | None = None
    if bias.any():
        lora_bias = bias.to(cpu, dtype)
    return dataclasses.replace(
        factors,
        A=converted(factors.A, factors.A.dtype, cpu),
        B=converted(factors.B, factors.B.dtype, cpu),
        lora_bias=lora_bias,
    )


def _in_float64(layer: Any) -> Any:
    """A float64 copy of the layer, with the tensors in plain dictionaries, which torch leaves."""
    device = float64_device(layer.get_base_layer().weight.device)
    wide = copy.deepcopy(layer).to(device).double()
    for module in wide.modules():
        for attribute in vars(module).values():
            if isinstance(attribute, dict):
                _widen_tensors(attribute)
    return wide.eval()


def _widen_tensors(tensors: dict[Any, Any]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensors[name] = tensor.double()


def _measured_change(
    layer: Any,
) -> tuple[Float[Tensor, " out"], Float[Tensor, "out in"], float]:
    """Δb and ΔW of a layer, checked on random input, and the size of W and ΔW together.

    Args:
        layer: the layer, in float64.
    """
    base = layer.get_base_layer()
    weight = base.weight
    is_embedding = isinstance(base, nn.Embedding)
    input_axis = 0 if is_transposed(base) else 1
    width = weight.shape[input_axis]
    added = functools.partial(_added_by, layer, base)

    # Every token, or every unit vector: what is added to each is a row of ΔWᵀ, plus Δb.
    each_input = torch.arange(width) if is_embedding else torch.eye(width, dtype=torch.float64)
    by_part: list[Tensor] = []
    for part in each_input.split(_INPUTS):
        as_batch = part.to(weight.device)[None]
        by_part.append(added(as_batch).squeeze(0))
    rows = torch.cat(by_part)
    bias = torch.zeros_like(rows[0])
    if not is_embedding:
        bias = added(weight.new_zeros(1, 1, width))[0, 0]
    change = (rows - bias).T

    inputs = _random_inputs(width, is_embedding).to(weight.device)
    if is_embedding:
        expected = change.T[inputs]
        scale = float(getattr(base, "embed_scale", 1.0))
    else:
        expected = inputs @ change.T + bias
        scale = 1.0
    _require_same(layer, added(inputs), expected, layer(inputs))
    return bias, change / scale, float(weight.norm() + change.norm()) / scale


def _added_by(layer: Any, base: Any, inputs: Tensor) -> Tensor:
    """The change δ(x) that the layer adds to the output of its base layer."""
    try:
        return layer(inputs) - base(inputs)
    except Exception as error:
        if is_memory_short(error):
            raise
        raise _refusal(layer, f"it cannot be run alone in float64 ({error})") from error


def _random_inputs(width: int, is_embedding: bool) -> Tensor:
    """Random token ids [size, draw], or random activations of three sizes [size, draw, in]."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(_SIZES), _DRAWS)
    if is_embedding:
        return torch.randint(width, shape, generator=generator)
    inputs = torch.randn((*shape, width), generator=generator, dtype=torch.float64)
    return inputs * inputs.new_tensor(_SIZES)[:, None, None]


def _require_same(layer: Any, change: Tensor, expected: Tensor, output: Tensor) -> None:
    """Refuse a layer whose change δ on random input is not ΔW x + Δb."""
    difference = _largest_by_size(change - expected)
    size = _largest_by_size(change)
    whole = _largest_by_size(output)
    in_float32 = _ROUNDINGS * torch.finfo(torch.float32).eps * whole
    allowed = (_AGREEMENT * size).maximum(in_float32).minimum(_LOST * size)
    if not bool((difference <= allowed + _rounding(whole)).all()):
        share = float((difference / size).max())
        raise _refusal(
            layer,
            "what it adds is not a change of weights, or is so small that PEFT's rounding to "
            f"float32 shows: on random input, ΔW x + Δb misses it by {share:.1g} of its size",
        )


def _largest_by_size(outputs: Float[Tensor, "size draw out"]) -> Float[Tensor, " size"]:
    return outputs.abs().flatten(1).amax(1)


def _rounding(size: _Size) -> _Size:
    """The error that rounding to float64 may make in numbers of this size."""
    return _ROUNDINGS * torch.finfo(torch.float64).eps * size


def _factors(delta: Float[Tensor, "out in"], rounding: float, dtype: torch.dtype) -> LoRAFactors:
    """ΔW as factors if its rank is small, else as a dense matrix; only rounding is cut off.

    If the rank is small, the products of ΔW with a few random vectors span its columns.
    """
    count = min(delta.shape) // _RANK_SHARE
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(delta.shape[1], count, generator=generator, dtype=torch.float64)
    span, _ = torch.linalg.qr(delta @ drawn.to(delta.device))
    if not count or float((delta - span @ (span.T @ delta)).norm()) > rounding:
        return LoRAFactors.dense(delta.to(dtype))
    left, sizes, right = torch.linalg.svd(span.T @ delta, full_matrices=False)
    rank = max(int((sizes > rounding).sum()), 1)
    B = span @ (left[:, :rank] * sizes[:rank])
    A = right[:rank]
    return LoRAFactors(A.to(dtype), B.to(dtype))


def _trained_norm(layer: Any) -> TrainedModule | None:
    """A norm that LN Tuning trained: its layer runs a copy of the norm with other parameters."""
    copies = getattr(layer, "ln_tuning_layers", None)
    if copies is None:
        raise _refusal(layer, "its weight is a vector, and only LN Tuning of norms is read")
    (name,) = layer.active_adapters
    if name not in copies:
        return None
    parameters = copies[name].named_parameters()
    trained = {key: parameter.detach().clone().cpu() for key, parameter in parameters}
    return TrainedModule(weight=trained.get("weight"), bias=trained.get("bias"))


def _refusal(layer: Any, why: str) -> UnsupportedAdapterError:
    method = type(layer).__module__.removeprefix("peft.tuners.").partition(".")[0]
    return UnsupportedAdapterError(f"a {type(layer).__name__} of PEFT's {method}: {why}.")
