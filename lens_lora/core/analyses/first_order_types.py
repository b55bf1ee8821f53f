"""The calls of `first_order`, for type checkers, and the Protocol of the rules that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypedDict, overload, runtime_checkable

from typing_extensions import Unpack

from lens_lora.core.function.function import Function
from lens_lora.core.function.modes import Mode
from lens_lora.core.model import Gauge, LoraLens
from lens_lora.core.model.sites import Group
from lens_lora.core.readout import PromptsLike, Readout
from lens_lora.core.results.attribution import Attribution, GroupAttribution


@runtime_checkable
class Rules(Protocol):
    """Rules that hold parts of the model constant in derivatives."""

    @property
    def key(self) -> str:
        """The name of these rules, which ends the result's `method`."""
        ...

    def held(self, g: Function) -> AbstractContextManager[None]:
        """A context in which derivatives of g follow the rules, and no value changes.

        Args:
            g: the function.

        Raises:
            ModelStateError: this model cannot keep them.
        """
        ...


class Options(TypedDict, total=False):
    """The options of `first_order` as a function of g."""

    at: float
    mode: Mode
    by: tuple[str, ...] | str
    gauge: Gauge
    rules: Rules | None


class CallOptions(Options, total=False):
    """The options of the public call."""

    max_memory: float | None
    progress: bool


@runtime_checkable
class FirstOrder(Protocol):
    """The calls of `first_order`, for type checkers: the result follows from the arguments."""

    @overload
    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout,
        **options: Unpack[CallOptions],
    ) -> Attribution: ...
    @overload
    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout,
        *,
        group: Group,
        **options: Unpack[CallOptions],
    ) -> GroupAttribution: ...
    @overload
    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Sequence[Readout],
        **options: Unpack[CallOptions],
    ) -> tuple[Attribution, ...]: ...
    @overload
    def of(self, g: Function, **options: Unpack[Options]) -> Attribution: ...
    @overload
    def of(self, g: Function, *, group: Group, **options: Unpack[Options]) -> GroupAttribution: ...
