"""The former name of a function that remembers, for folders that have not gone over to it yet."""

# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function import rounding
from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function, function_of
from lens_lora.core.function.rounding import curvature_noise as curvature_noise
from lens_lora.core.function.rounding import of_stream as of_stream
from lens_lora.core.function.rounding import unit as unit
from lens_lora.core.model import LoraLens
from lens_lora.core.readout import Prompts, PromptsLike, Reading, Readout
from lens_lora.core.readout.readout import require_readout


class Asked:
    """`g`, the function that remembers, in the words that it had before."""

    def __init__(self, lens: LoraLens, prompts: Prompts, g: Evaluations | None = None) -> None:
        self.lens: LoraLens = lens
        self.prompts: Prompts = prompts
        self._g = g

    @property
    def g(self) -> Evaluations:
        if self._g is None:
            raise RuntimeError("asked without a readout, and g is needed")
        return self._g

    def about(self, readout: Readout) -> Asked:
        f = Function(self.lens, self.prompts, self.prompts, None, None)
        return Asked(self.lens, self.prompts, Evaluations(f.about(require_readout(readout))))

    def over(self, lens: LoraLens) -> Asked:
        return Asked(lens, self.prompts, Evaluations(self.g.over(lens)))

    def require_slope_at_base(self) -> Asked:
        self.g.require_slope_at_base()
        return self

    @property
    def readout(self) -> Readout:
        return self.g._named_readout()

    @property
    def reading(self) -> Reading:
        return self.g.reading

    @property
    def ends(self) -> Float[Tensor, "end batch"]:
        return self.g.ends

    def along(self, scales: Sequence[float], progress: bool = True) -> Float[Tensor, "batch scale"]:
        return self.g.with_progress(progress).along(scales).T

    def at_gates(
        self, gates: Float[Tensor, "point site"], *, progress: bool = True, what: str
    ) -> Float[Tensor, "batch point"]:
        return self.g.with_progress(progress)._values(gates, what).T

    def slopes(self, at: float, axes: tuple[str, ...] = ()) -> Float[Tensor, "batch site *by"]:
        return self.g.slopes(at, axes)

    def know(self, values: Mapping[float, Float[Tensor, " batch"]]) -> None:
        for at, value in values.items():
            self.g.know(at, value)

    @property
    def base_noise(self) -> Float[Tensor, " batch"]:
        return self.g.noise([1.0], at=0.0)

    @property
    def adapted_noise(self) -> Float[Tensor, " batch"]:
        return self.g.noise([1.0], at=1.0)

    @property
    def noise_floor(self) -> Float[Tensor, " batch"]:
        return self.g.floor

    def effect_noise(self, scale: float) -> Float[Tensor, " batch"]:
        return self.g.noise((1.0, -1.0), at=scale)

    @property
    def slope_draws(self) -> rounding.Draws:
        return self.g._slope_draws()

    def noise(self, coefficients: Sequence[float], at: float) -> Float[Tensor, " batch"]:
        return self.g.noise(coefficients, at)

    def header(self) -> dict[str, Any]:
        return self.g.header()

    def labels(self) -> dict[str, Any]:
        return self.g.labels()

    @property
    def response_tokens(self) -> tuple[tuple[str, ...], ...]:
        return self.g.response_tokens()

    def describe(self) -> dict[str, str]:
        return self.lens.describe(self.prompts)

    @property
    def str_tokens(self) -> tuple[tuple[str, ...], ...]:
        if self._g is None:
            return self.lens.str_tokens(self.prompts)
        return self._g.str_tokens


def ask(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, max_memory: float | None = None
) -> Asked:
    """Tokenise the prompts and look up the readout's tokens, once."""
    return ask_prompts(lens, prompts, max_memory).about(readout)


def ask_prompts(lens: LoraLens, prompts: PromptsLike, max_memory: float | None = None) -> Asked:
    """Tokenise the prompts of a question without a readout."""
    if isinstance(lens, LoraLens) and max_memory is not None:
        lens = lens.within(max_memory)
    f = function_of(lens, prompts)
    return Asked(f.lens, f.prompts)


def question_of(g: Function) -> Asked:
    """The former words for a function that remembers."""
    return Asked(g.lens, g.prompts, Evaluations.of(g))
