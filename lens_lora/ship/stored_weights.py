"""The adapted model whose linear weights are stored in another form, as an adapter over the base.

With Q what storing makes of a weight, a linear map of the base becomes

    Q(W) + ΔW        the adapter over a stored base
    Q(W + ΔW)        merged, and then stored

Either is W plus a dense change, so that it is laid over the base like any other adapter: the base's
weights are not touched, and no copy of the model is made. Embeddings, head, norms and biases stay
as the adapter has them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora.core import Adapter, Host, LoRAFactors, LoraLens, ModuleUpdate
from lens_lora.errors import LensLoraError, UnsupportedAdapterError
from lens_lora.families import outside_layer

Rounding = Callable[[Tensor], Tensor]

# Kinds that stand outside the blocks, and are not rounded.
_OUTSIDE = ("embed", "pos_embed", "unembed")
# Blocks of weights that share a scale.
_BLOCK = 32
NF4_BLOCK = 64
# The values of a 4-bit normal float, as QLoRA defines them: quantiles of a normal distribution.
_NF4 = (
    -1.0,
    -0.6961928,
    -0.5250731,
    -0.3949175,
    -0.2844414,
    -0.1847734,
    -0.0910500,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.3379152,
    0.4407098,
    0.5626170,
    0.7229568,
    1.0,
)


class LinearWeight(NamedTuple):
    """A linear map of a block.

    Attributes:
        W: the base's weight, as Hugging Face has it.
        change: ΔW; None if the adapter does not change it.
        bias_change: Δb; None if there is none.
    """

    W: Float[Tensor, "out in"]
    change: Float[Tensor, "out in"] | None
    bias_change: Float[Tensor, " out"] | None

    def stored(self, rounding: Rounding, *, merged: bool) -> Float[Tensor, "out in"]:
        """The stored weight less W, in float64.

        Args:
            rounding: turns a weight into what is stored of it; it gets float32, in which converters
                compute.
            merged: whether ΔW is added before the weight is stored, and not beside it.
        """
        W = self.W.detach().cpu().double()
        change = torch.zeros_like(W) if self.change is None else self.change
        if merged:
            return rounding((W + change).float()).double() - W
        return rounding(W.float()).double() + change - W


def stored_as(
    lens: LoraLens,
    rounding: Rounding,
    *,
    merged: bool,
    weights: Mapping[str, LinearWeight] | None = None,
) -> Adapter:
    """The adapter that turns the base into the model as it is stored. No forward pass.

    It holds a dense change of every linear map of the blocks: 4 bytes a weight.

    Args:
        lens: the adapter over its base.
        rounding: turns a weight [out, in] into what is stored of it.
        merged: whether ΔW is added before a weight is stored, and not beside it.
        weights: what `linear_weights` returns, if it was called already.

    Raises:
        UnsupportedAdapterError: a model with stacks of experts.
        ModelStateError: the base's own weights are quantised, or were processed and no base is at
            hand; the model or the adapter was changed after the lens was made.
    """
    if weights is None:
        weights = linear_weights(lens)
    dtype = torch.promote_types(lens.dtype, torch.float32)
    modules: dict[str, ModuleUpdate] = {}
    for key, update in lens.adapter.modules.items():
        if key.partition("@")[0] not in weights:
            modules[key] = update
    for path, linear in weights.items():
        change = linear.stored(rounding, merged=merged).to(dtype)
        bias_change = None if linear.bias_change is None else linear.bias_change.to(dtype)
        modules[path] = dataclasses.replace(LoRAFactors.dense(change), lora_bias=bias_change)
    return Adapter(modules, name=lens.adapter.name, base_model=lens.adapter.base_model)


def linear_weights(lens: LoraLens) -> dict[str, LinearWeight]:
    """Every linear map of the blocks, by its path in the Hugging Face model. No forward pass.

    Args:
        lens: the adapter over its base.

    Raises:
        UnsupportedAdapterError, ModelStateError: as for `stored_as`.
    """
    lens.check_state()
    if getattr(lens.model.cfg, "num_experts", None):
        raise _no_forms("this model's experts")
    stand_in = Adapter(dict(_stand_ins(lens.host)), name="weights")
    changes = _changes(lens)
    parts_of: dict[str, list[_Part]] = defaultdict(list)
    for every in lens.with_adapter(stand_in, check=False).updates:
        site = every.site
        W = lens.host.base_weight(site, "a form of its weights")
        change = changes.get(site.name)
        weight: Tensor | None = None
        bias: Tensor | None = None
        if change is not None:
            weight = change.weight
            bias = change.bias
        parts_of[site.path].append(_Part(site.rows, LinearWeight(W, weight, bias)))
    return {path: _joined(parts) for path, parts in parts_of.items()}


def _stand_ins(host: Host) -> Iterator[tuple[str, ModuleUpdate]]:
    """An update that adds nothing for every linear map of the blocks."""
    for path in host.family.linear_paths(host.n_layers):
        place = host.family.place(path)
        if place is None or any(kind in _OUTSIDE for kind in place.kinds):
            continue
        layer = place.layer
        if layer is None:
            layer = outside_layer(place.kinds[0], host.n_layers)
        try:
            shapes = [host.shape(layer, kind) for kind in place.kinds if host.ports(layer, kind)]
            experts = host.experts(layer, place.kinds[0])
        except LensLoraError:
            # A module that this size of the family does not have.
            continue
        if experts:
            raise _no_forms(path)
        height = sum(out for out, _ in shapes)
        _, width = shapes[0]
        yield path, LoRAFactors(torch.zeros(1, width), torch.zeros(height, 1))


def _no_forms(experts: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{experts}: the weights of experts are stored in forms that are not made here",
        remedy="compare exports of such a model by `lens-lora verify`.",
    )


class _Change(NamedTuple):
    """ΔW and Δb of a site, in the Hugging Face basis."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None


def _changes(lens: LoraLens) -> dict[str, _Change]:
    """The change of the weight at each site; the changes of several adapters are summed."""
    changes: dict[str, _Change] = {}
    for every in lens.updates:
        if every.norm is not None or every.linear.experts:
            continue
        update = every.linear
        weight = update.scale * update.B.double().cpu() @ update.A.double().cpu()
        bias = None if update.bias is None else update.bias.double().cpu()
        name, _, _ = every.site.name.partition("@")
        earlier = changes.get(name)
        if earlier is not None:
            weight = weight + earlier.weight
            biases = [each for each in (earlier.bias, bias) if each is not None]
            bias = torch.stack(biases).sum(0) if biases else None
        changes[name] = _Change(weight, bias)
    return changes


class _Part(NamedTuple):
    """A part of a fused map, such as q of qkv, or a whole map.

    Attributes:
        rows: its rows in the fused map; None for a whole map.
        linear: the part itself.
    """

    rows: Int[Tensor, " out"] | None
    linear: LinearWeight


def _joined(parts: Sequence[_Part]) -> LinearWeight:
    """The parts of a fused map as one, each with its own rows."""
    first = parts[0]
    if len(parts) == 1 and first.rows is None:
        return first.linear
    height = sum(len(part.W) for _, part in parts)
    W = first.linear.W.new_zeros(height, first.linear.W.shape[1])
    change: Tensor | None = None
    if any(part.change is not None for _, part in parts):
        change = torch.zeros(W.shape, dtype=torch.float64)
    bias: Tensor | None = None
    if any(part.bias_change is not None for _, part in parts):
        bias = torch.zeros(height, dtype=torch.float64)
    for rows, part in parts:
        assert rows is not None
        W[rows] = part.W
        if change is not None and part.change is not None:
            change[rows] = part.change
        if bias is not None and part.bias_change is not None:
            bias[rows] = part.bias_change
    return LinearWeight(W, change, bias)


# --- Another precision


def in_dtype(lens: LoraLens, dtype: torch.dtype) -> LoraLens:
    """The adapter over a copy of the model that computes in another dtype.

    Args:
        lens: the adapter over its base.
        dtype: the dtype of weights and activations.
    """
    # A hooked model would print that its dtype changes.
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = copy.deepcopy(lens.model).to(dtype)
    hf_model = lens.hf_model
    if hf_model is not None:
        hf_model = copy.deepcopy(hf_model).to(dtype)
    # No check: it would warn that the base, which is rounded, is not the adapter's.
    return LoraLens(model, lens.adapter, hf_model, check=None, prepend_bos=lens.prepend_bos)


# --- What storing makes of a weight


def in_8_bit(weight: Tensor) -> Tensor:
    """Blocks of 32 entries that share a scale, each entry in 8 bits, as Q8_0 of llama.cpp."""
    return _in_blocks(weight, _BLOCK, lambda block: (127 * block).round() / 127)


def in_4_bit(weight: Tensor) -> Tensor:
    """Blocks of 32 entries that share a scale, each entry in 4 bits."""
    return _in_blocks(weight, _BLOCK, lambda block: (7 * block).round() / 7)


def in_nf4(weight: Tensor) -> Tensor:
    """Blocks of 64 entries that share a scale, each entry a 4-bit normal float, as QLoRA has it."""
    levels = torch.tensor(_NF4).to(weight)
    edges = (levels[1:] + levels[:-1]) / 2
    return _in_blocks(weight, NF4_BLOCK, lambda block: levels[torch.bucketize(block, edges)])


def in_bfloat16(weight: Tensor) -> Tensor:
    """Each entry in bfloat16."""
    return weight.bfloat16().to(weight)


def _in_blocks(weight: Tensor, size: int, rounding: Rounding) -> Tensor:
    """Round blocks of entries, each divided by its largest magnitude."""
    flat = weight.flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    scale = padded.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    rounded = rounding(padded / scale) * scale
    return rounded.flatten()[: len(flat)].reshape(weight.shape)
