"""A function that remembers: the cache of one public call.

Several analyses ask the same of one g: both ends, g along the path, what rounding does. Within one
public call the model and its hooks stay as they are, so each is run once. What was not run yet
goes in one batch: the ends ride along with the first corners, or with the first slopes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.function.function import Function
from lens_lora.core.function.reverse import require_finite_sites
from lens_lora.core.model import LoraLens
from lens_lora.core.readout import PromptsLike, Readout


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluations(Function):
    """The same function, which runs each point once. It is a cache, and lives within one call.

    Hooks that you put on the model, or take off it, in the meantime are not seen in what it has
    run already, and neither are rules under which derivatives are taken. `lens_lora.analysis` makes
    one for each call; a `Function` of your own becomes one by `Evaluations.of(g)`.

    Attributes:
        asked: the question to the engine, which holds what is known.
        lens, prompts, rows, readout, progress: see `Function`.
    """

    asked: Asked = dataclasses.field(kw_only=True)
    # ∂g/∂ε_l of whole sites, by strength.
    _site_slopes: dict[float, Tensor] = dataclasses.field(
        default_factory=dict[float, Tensor], init=False
    )

    @classmethod
    def of(cls, g: Function) -> Evaluations:
        """The function with a memory that is empty yet; one that has a memory as it is.

        Args:
            g: a function with a readout.
        """
        if isinstance(g, Evaluations):
            return g
        g._require_same_model()
        return cls.about_question(g._asked(), progress=g.progress)

    @classmethod
    def about_question(cls, asked: Asked, *, progress: bool = True) -> Evaluations:
        """The function of a question to the engine, with what is known of it already.

        Args:
            asked: with a readout.
            progress: whether long calls show a bar.
        """
        return cls(
            asked.lens,
            asked.prompts,
            asked.reading.prompts,
            asked.readout,
            asked.reading,
            progress,
            asked=asked,
        )

    def _asked(self) -> Asked:
        return self.asked

    def _require_same_model(self) -> None:
        """The model was checked when this was made, and stays as it is within the call."""

    def _values(
        self, points: Float[Tensor, "point site"], what: str
    ) -> Float[Tensor, "point batch"]:
        """Points with the same gate at every site are strengths, which are remembered."""
        is_uniform = (points == points[:, :1]).all(1)
        if bool(is_uniform.all()):
            return self._along(points[:, 0].tolist())
        return self.asked.at_gates(points, progress=self.progress, what=what).T

    def _along(self, strengths: Sequence[float]) -> Float[Tensor, "point batch"]:
        return self.asked.along(strengths, self.progress).T

    def _slopes(
        self, points: Float[Tensor, "point site"], axes: tuple[str, ...], lens: LoraLens
    ) -> Float[Tensor, "point batch site *by"]:
        """At one strength the ends that are not known yet may ride along, and g there is known.

        The slopes of whole sites are remembered; their parts, which may be large, are not.
        """
        is_strength = len(points) == 1 and bool((points[0] == points[0, 0]).all())
        if not is_strength or "token" in axes:
            return super()._slopes(points, axes, lens)
        strength = float(points[0, 0])
        if not axes and strength in self._site_slopes:
            return self._site_slopes[strength][None]
        slopes = self.asked.slopes(strength, axes, lens)
        self._remember_slopes(strength, slopes)
        return slopes[None]

    def _remember_slopes(self, strength: float, slopes: Float[Tensor, "batch site *by"]) -> None:
        of_sites = slopes if slopes.ndim == 2 else slopes.flatten(2).sum(2)
        self._site_slopes[strength] = of_sites

    @property
    def floor(self) -> Float[Tensor, " batch"]:
        """σ of `shift` from rounding alone; what is not known yet is drawn in one batch."""
        return self.asked.noise_floor

    def slopes_with_noise(self, along: Sequence[float] = ()) -> Float[Tensor, "batch site"]:
        """∂g/∂ε_l at the base; in the same passes what `noise` and `remainder_noise` rest on.

        Five forward and backward passes, and ten forward ones, batched; and one for each strength.
        Where the slopes are known, they are not run again.

        Args:
            along: strengths at which g is to be known as well.

        Raises:
            NumericsError: a derivative that is not finite, naming the site.
        """
        if 0.0 in self._site_slopes:
            return self._site_slopes[0.0]
        slopes = self.asked.slopes_with_floors((), along, self.progress)
        require_finite_sites(self.lens, slopes)
        self._remember_slopes(0.0, slopes)
        return slopes


def evaluations(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, *, progress: bool = True
) -> Evaluations:
    """g over these prompts with a memory, for one public call.

    Raises:
        ArgumentError: something that is no lens, or no readout.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        ModelStateError: the model is not as it was when the lens was made.
    """
    return Evaluations.about_question(ask(lens, prompts, readout), progress=progress)
