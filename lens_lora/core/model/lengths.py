"""Rotary tables that depend on a row's length: each row of a pass gets the one that it has alone.

Two kinds of rotary embedding choose their frequencies by n, the number of positions of a pass:

    longrope   the short factors where n ≤ L, the long ones beyond
    dynamic    the base grows with n beyond L: θ · (s n / L − (s − 1))^(d / (d − 2))

transformers takes n from the whole batch, which is padded to its longest row, and the table of
`dynamic` also stays as an earlier, longer pass left it. So a prompt's logits would depend on its
neighbours and on what was run before. A lens runs prompts of any lengths together, and therefore

1. computes such an embedding once for each table that its rows need, as for a batch of these rows
   alone, and from the state in which transformers made it;
2. gives each row its own table, beside which the pass is the usual one (`Rotary.by_row`);
3. puts the state back at the end of the pass, so that the model is as its user left it.

Where tokens follow a text one by one, n grows with each. `Rotary.alike_up_to` says how far a text
may grow before its table is another one, and with it the logits at every earlier place.

Cost: a table of [positions, d_head] for each length that needs its own. Nothing for other models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lens_lora.compat import RotaryRule, replace_forward, rotary_rules, rotary_state
from lens_lora.spans import Temporary


@dataclasses.dataclass(frozen=True, eq=False)
class Rotary:
    """The rotary embeddings of a model that depend on the number of positions; perhaps none.

    Attributes:
        rules: each such module, and how its output depends on that number.
    """

    rules: Sequence[tuple[nn.Module, RotaryRule]]

    @classmethod
    def of(cls, model: nn.Module) -> Rotary:
        """Find the rotary embeddings of a model that depend on it. No forward pass."""
        rules: list[tuple[nn.Module, RotaryRule]] = []
        for module in model.modules():
            rules += [(module, rule) for rule in rotary_rules(module)]
        return cls(rules)

    def __bool__(self) -> bool:
        return bool(self.rules)

    def alike_up_to(self, length: int) -> float:
        """The most positions that a text of this length may grow to under the same tables."""
        return min((rule.alike_up_to(length) for _, rule in self.rules), default=float("inf"))

    def as_made(self) -> AbstractContextManager[None]:
        """Within the block no earlier pass has made a table grow; then what was there is back."""
        return Temporary(self._begin)

    def by_row(self, lengths: Sequence[int]) -> AbstractContextManager[None]:
        """Within the block, row i of a pass is computed as a row of lengths[i] positions alone.

        Args:
            lengths: the number of tokens of each row of the pass, without padding. The pass has
                these rows, or copies of a single one.
        """

        def replace(span: Temporary) -> None:
            self._begin(span)
            for module in self._modules():
                own = Rotary([(table, rule) for table, rule in self.rules if table is module])
                replace_forward(span, module, _TablesByRow(module.forward, own, lengths))

        return Temporary(replace)

    def make_anew(self) -> None:
        """Put every table into the state in which transformers made it."""
        for module, rule in self.rules:
            rule.make_anew(module)

    def _begin(self, span: Temporary) -> None:
        for module in self._modules():
            span.way_back(rotary_state(module))
        self.make_anew()

    def _modules(self) -> list[nn.Module]:
        """Each embedding once."""
        return list(dict.fromkeys(module for module, _ in self.rules))


def context_of_copy(hf_model: Any, cfg: Any) -> float:
    """The most tokens over which a HookedTransformer computes what the model that it copies does.

    It has one rotary table, that of short prompts, and the attention window that its own
    configuration names. Eight tokens, on which both are compared, show neither.
    """
    limits = [rule.limit for _, rule in Rotary.of(hf_model).rules]
    window = _window(hf_model.config)
    has_window = getattr(cfg, "use_local_attn", False) and getattr(cfg, "window_size", 0) == window
    if window is not None and not has_window:
        limits.append(window)
    return min(limits, default=float("inf"))


def _window(config: Any) -> int | None:
    """How many tokens the attention of some layer sees; None where every layer sees all."""
    layers = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layers is None:
        return window if getattr(config, "use_sliding_window", True) else None
    return window if "sliding_attention" in layers else None


class _TablesByRow:
    """The forward of a rotary embedding, for rows that need different tables."""

    def __init__(self, forward: Callable[..., Any], rotary: Rotary, lengths: Sequence[int]) -> None:
        self._forward = forward
        self._rotary = rotary
        # The table that each rule takes for a row; rows that agree in all of them go together.
        tables_of_rows: list[tuple[int, ...]] = []
        longest: dict[tuple[int, ...], int] = {}
        for length in lengths:
            tables = tuple(rule.table(length) for _, rule in rotary.rules)
            tables_of_rows.append(tables)
            longest[tables] = max(length, longest.get(tables, 0))
        distinct = list(longest)
        self._longest = list(longest.values())
        self._table_of_row = [distinct.index(tables) for tables in tables_of_rows]

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what transformers computes, cos and sin or one tensor: [row, position, …]."""
        positions = position_ids.shape[-1]
        computed: list[Any] = []
        for longest in self._longest:
            self._rotary.make_anew()
            computed.append(self._forward(x, position_ids[..., :longest], *args, **kwargs))
        if isinstance(computed[0], Tensor):
            return self._by_row(computed, positions)
        return tuple(self._by_row(parts, positions) for parts in zip(*computed, strict=True))

    def _by_row(self, tables: Sequence[Tensor], positions: int) -> Tensor:
        """Each row's own table; padding, which no token reads, repeats the last position."""
        places = torch.arange(positions, device=tables[0].device)
        widened: list[Tensor] = []
        for table in tables:
            last_place = table.shape[1] - 1
            widened.append(table[:, places.clamp(max=last_place)])
        if len(widened) == 1:
            return widened[0]
        rows: list[Tensor] = []
        for row, index in enumerate(self._table_of_row):
            table = widened[index]
            # transformers may give positions once for all rows: the table then has a single row.
            last_row = len(table) - 1
            rows.append(table[min(row, last_row)])
        return torch.stack(rows)
