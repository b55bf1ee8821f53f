"""Sums, differences and mixtures of adapters.

    a + b                   both at once; the parts stay apart, as 'path@name'
    a − b, a.mixed(b, w)    one adapter: ΔW_a − ΔW_b,  (1 − w) ΔW_a + w ΔW_b

In one adapter the factors of a module that both adapt are stacked along the rank, which is exact
(PEFT's `add_weighted_adapter` calls that "cat"); a change of bias is summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat

from lens_lora.adapters.arithmetic import finite, refuse_dora_twice, stacked, tagged
from lens_lora.errors import AdapterError, ArgumentError

if TYPE_CHECKING:
    from typing_extensions import Self

    from lens_lora.adapters.trained import ModuleUpdate

__all__ = ["Sums"]


class Sums:
    """What `Adapter` has of sums."""

    modules: Mapping[str, ModuleUpdate]
    name: str
    base_model: str | None
    truncation_error: Mapping[str, float]

    def __add__(self, other: Self) -> Self:
        """Both adapters at once; weight them with `scaled`. Their sites stay separate.

        Args:
            other: an adapter of the same base model and another name.

        Raises:
            ArgumentError: `other` is no adapter.
            AdapterError: the same name twice, different bases, or DoRA on a module of both (whose
                ΔW is not additive).
        """
        base = self._common_base(other, "+")
        mine, theirs = tagged(self.modules, self.name), tagged(other.modules, other.name)
        twice = set(mine) & set(theirs)
        if twice or self.name == other.name:
            raise AdapterError(
                f"both adapters are called {self.name!r}; give one another name: "
                "adapter.named('…')."
            )
        both = {**mine, **theirs}
        refuse_dora_twice(both)
        return self._replaced(
            modules=both,
            name=f"{self.name} + {other.name}",
            base_model=base,
            truncation_error={**self.truncation_error, **other.truncation_error},
        )

    def __sub__(self, other: Self) -> Self:
        """What the first adds and the second does not: ΔW − ΔW′ as one adapter, which `save` holds.

        Args:
            other: an adapter of the same base model.

        Raises:
            ArgumentError: `other` is no adapter.
            AdapterError: different bases, or a module of both whose updates do not add up (DoRA,
                trained whole, a trained bias).
        """
        return self._stacked(other, (1.0, -1.0), "-", f"{self.name} - {getattr(other, 'name', '')}")

    def mixed(self, other: Self, weight: SupportsFloat = 0.5) -> Self:
        """(1 − w) ΔW + w ΔW′ as one adapter, which `save` holds; beyond 0 to 1 it extrapolates.

        Args:
            other: an adapter of the same base model.
            weight: w, of the other; the rest is this one's.

        Raises:
            ArgumentError: `other` is no adapter, or a weight that is no finite number.
            AdapterError: different bases, or a module of both whose updates do not add up (DoRA,
                trained whole, a trained bias).
        """
        share = finite(weight, "mixed")
        name = f"{1 - share:g} {self.name} + {share:g} {getattr(other, 'name', '')}"
        return self._stacked(other, (1 - share, share), "mixed with", name)

    def _stacked(self, other: Self, weights: tuple[float, float], sign: str, name: str) -> Self:
        base = self._common_base(other, sign)
        return self._replaced(
            modules=stacked(((self.modules, weights[0]), (other.modules, weights[1]))),
            name=name,
            base_model=base,
            truncation_error={},
        )

    def _common_base(self, other: Self, sign: str) -> str | None:
        if not isinstance(other, Sums):
            raise ArgumentError(
                f"an adapter {sign} {type(other).__name__}; both must be ll.Adapter (of a folder: "
                "ll.load_adapter(path))."
            )
        if self.base_model and other.base_model and self.base_model != other.base_model:
            raise AdapterError(
                f"{self.name} names the base {self.base_model!r}, {other.name} "
                f"{other.base_model!r}; a sum needs one base model."
            )
        return self.base_model or other.base_model

    def _replaced(self, **fields: Any) -> Self:
        this: Any = self
        return dataclasses.replace(this, **fields)
