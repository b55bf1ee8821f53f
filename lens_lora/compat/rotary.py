"""Rotary embeddings of transformers whose table depends on the number of positions of a pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class RotaryRule(NamedTuple):
    """How a rotary embedding's table depends on the number of positions of a pass.

    Attributes:
        is_dynamic: whether the base grows with the number of positions; if not, that number chooses
            between two sets of factors.
        limit: the largest number of positions with the table of the original context.
        prefix: the beginning of the names of its buffers, if one module has tables for several
            types of layer; else ''.
    """

    is_dynamic: bool
    limit: int
    prefix: str

    def table(self, length: int) -> int:
        """A number that is equal for two lengths if they have the same table."""
        if self.is_dynamic:
            return max(length, self.limit)
        return int(length > self.limit)

    def alike_up_to(self, length: int) -> float:
        """The largest length with the same table as this length."""
        if length <= self.limit:
            return self.limit
        if self.is_dynamic:
            return length
        return float("inf")

    def make_anew(self, module: Any) -> None:
        """Set a dynamic table back to that of a new model; with two sets of factors, do nothing."""
        if not self.is_dynamic:
            return
        original = getattr(module, f"{self.prefix}original_inv_freq")
        current = getattr(module, f"{self.prefix}inv_freq")
        setattr(module, f"{self.prefix}inv_freq", original.to(current.device, copy=True))
        setattr(module, f"{self.prefix}max_seq_len_cached", module.original_max_seq_len)


def rotary_rules(module: nn.Module) -> list[RotaryRule]:
    """The rules of a rotary embedding's tables that depend on the number of positions.

    The kind of a table is in an attribute that transformers does not document, and so are the
    numbers by which it chooses the table.
    """
    # vars() reads the module itself: a bridge's component forwards attributes to what it wraps.
    attributes = vars(module)
    rope_type = attributes.get("rope_type")
    # A module with tables for several types of layer has a dictionary here.
    rope_type_by_layer_type = rope_type if isinstance(rope_type, dict) else {"": rope_type}
    rules: list[RotaryRule] = []
    for layer_type, kind in rope_type_by_layer_type.items():
        prefix = f"{layer_type}_" if layer_type else ""
        if isinstance(kind, str) and "dynamic" in kind:
            limit = int(attributes["original_max_seq_len"])
            rules.append(RotaryRule(is_dynamic=True, limit=limit, prefix=prefix))
        elif kind == "longrope":
            limit = _original_context(attributes["config"], layer_type)
            rules.append(RotaryRule(is_dynamic=False, limit=limit, prefix=prefix))
    return rules


def _original_context(config: Any, layer_type: str) -> int:
    """The number of positions beyond which longrope uses its long factors.

    transformers 5 has it in `rope_parameters`, and transformers 4 in the configuration itself.
    """
    name = "original_max_position_embeddings"
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return int(getattr(config, name, config.max_position_embeddings))
    if layer_type:
        parameters = parameters[layer_type]
    return int(parameters[name])


def rotary_state(module: nn.Module) -> Callable[[], None]:
    """Record a rotary embedding's tables, and return a function that restores them.

    A pass may replace a table, or write into it, and set attributes such as `max_seq_len_cached`.
    """
    recorded_attributes = _public_attributes(module)
    recorded_buffers = dict(module._buffers)
    copies: dict[str, Tensor] = {}
    for name, buffer in recorded_buffers.items():
        if buffer is not None:
            copies[name] = buffer.clone()

    def put_back() -> None:
        for name in _public_attributes(module):
            if name not in recorded_attributes:
                del vars(module)[name]
        vars(module).update(recorded_attributes)
        module._buffers.clear()
        module._buffers.update(recorded_buffers)
        for name, copy in copies.items():
            buffer = module._buffers[name]
            if buffer is not None and not torch.equal(buffer, copy):
                buffer.copy_(copy)

    return put_back


def _public_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, without parameters, buffers, submodules and hooks."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}
