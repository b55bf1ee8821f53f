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
        return length if self.is_dynamic else float("inf")

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
    types = vars(module).get("rope_type")
    by_prefix = {"": types}
    if isinstance(types, dict):
        by_prefix = {f"{layer_type}_": kind for layer_type, kind in types.items()}
    rules: list[RotaryRule] = []
    for prefix, kind in by_prefix.items():
        if isinstance(kind, str) and "dynamic" in kind:
            limit = int(vars(module)["original_max_seq_len"])
            rules.append(RotaryRule(True, limit, prefix))
        elif kind == "longrope":
            layer_type = prefix.removesuffix("_")
            limit = _original_context(vars(module)["config"], layer_type)
            rules.append(RotaryRule(False, limit, prefix))
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
    """Record a rotary embedding's tables, and return a function that restores them."""
    attributes = vars(module)
    plain = {name: value for name, value in attributes.items() if not name.startswith("_")}
    buffers = dict(module._buffers)
    entries: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        if buffer is not None:
            entries[name] = buffer.clone()

    def put_back() -> None:
        new_names = [name for name in attributes if not name.startswith("_") and name not in plain]
        for name in new_names:
            del attributes[name]
        attributes.update(plain)
        module._buffers.clear()
        module._buffers.update(buffers)
        for name, buffer in buffers.items():
            if buffer is not None and not torch.equal(buffer, entries[name]):
                buffer.copy_(entries[name])

    return put_back
