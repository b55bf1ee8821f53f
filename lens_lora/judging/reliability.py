"""First-order numbers that must not be trusted.

Each question has its own end: a_l =
∂g/∂ε_l at the base is read as what adding one site does, and a_l at the adapted model as what
leaving it out takes away. What the number misses is second order and all beyond it:

    add one         g(e_l) − g(0) − a_l(0)     = ∫₀¹ (1 − t) H_ll(t e_l) dt        ½ H_ll(0) + …
    leave one out   g(1) − g(1 − e_l) − a_l(1) = −∫₀¹ (1 − t) H_ll(1 − t e_l) dt   −½ H_ll(1) + …

Screen, flag, fix, after "When Attribution Patching Lies" (arXiv 2606.09899), but by intervention:
H_ll costs more than running the site.

1. Screen. The sites that carry the attribution are run, and the correction is what a_l misses.
2. Flag. score = the smaller of a and a + correction over the larger: ½ where a is half of the
   effect or twice it, 0 where it has the wrong sign. Flagged where the score is under the threshold
   and the site is material: |a| or |correction| above a share of Σ|a|, and above three noise
   floors. The paper's |a| / (|a| + |correction|) is the same where a is too small, and above ½ for
   any a that is too large.
3. Fix. The flagged sites' numbers are those that were measured, the others keep a_l.

Precision and recall of these flags, and what the same passes buy otherwise: docs/faithfulness.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import final, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.arguments import number, word
from lens_lora.compat import in_float64
from lens_lora.core import (
    SIGMAS,
    Attribution,
    Drawn,
    Effects,
    How,
    LoraLens,
    PromptsLike,
    Readout,
    alone,
    only_prompt,
)
from lens_lora.core.analyses.first_order import first_order_of
from lens_lora.core.analyses.patching import patch_sites_of
from lens_lora.core.function.asked import Asked, ask
from lens_lora.core.results.base import flat
from lens_lora.errors import ArgumentError


@final
class Reliability(Drawn):
    """Each site's first-order number with what it misses, in the readout's units.

    `plot` is a_l against a_l + correction of a prompt's sites, the flagged ones apart.

    Attributes:
        attribution: a_l at the question's own end, ε = 0 to add one and 1 to leave one out.
        correction: [batch, site], what a_l misses of the effect, measured; NaN where it was not (a
            site under the floor at every prompt).
        fixed: [batch, site], with fix=True: the measured effect where flagged, a_l elsewhere.
        how: the effect that a_l is asked to predict, 'add_one' or 'leave_one_out'.
        threshold: a score under it is flagged.
        material: [batch], in the readout's units: what a site's |a| or |correction| must exceed.
        passes: forward and backward passes over the prompts, by step.
    """

    attribution: Attribution
    correction: Float[Tensor, "batch site"]
    fixed: Float[Tensor, "batch site"] | None
    how: How
    threshold: float
    material: Float[Tensor, " batch"]
    passes: Mapping[str, int]

    @property
    def readout(self) -> str:
        """What was read."""
        return self.attribution.readout

    @property
    def units(self) -> str:
        """Of all numbers."""
        return self.attribution.units

    @property
    def score(self) -> Float[Tensor, "batch site"]:
        """Of a and a + correction, the smaller over the larger; NaN where not screened."""
        return score_of(self.attribution.per_site, self.correction)

    @property
    def flagged(self) -> Bool[Tensor, "batch site"]:
        """Material sites whose score is under the threshold."""
        return self._wrong(self.correction)

    @property
    def screened(self) -> Bool[Tensor, "batch site"]:
        """Where the correction is known."""
        return ~self.correction.isnan()

    @property
    def corrected(self) -> Float[Tensor, "batch site"]:
        """a_l + correction; a_l where not screened."""
        return self.attribution.per_site + self.correction.nan_to_num()

    def _wrong(self, missed: Float[Tensor, "batch site"]) -> Bool[Tensor, "batch site"]:
        a = self.attribution.per_site
        largest = torch.maximum(a.abs(), missed.abs())
        return (score_of(a, missed) < self.threshold) & (largest > self.material[:, None])

    def flagged_sites(self, prompt: int | None = None) -> tuple[str, ...]:
        """A prompt's flagged sites, the largest correction first.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such prompt, or several and none named.
        """
        row = only_prompt(prompt, len(self.correction), "flags")
        order = self.correction[row].abs().nan_to_num().argsort(descending=True).tolist()
        return tuple(self.attribution.sites[i].name for i in order if self.flagged[row, i])

    def against(self, effects: Effects | Float[Tensor, "batch site"]) -> pd.DataFrame:
        """Flags against the sites that are truly wrong: one row per prompt, and 'all'.

        A site is wrong where the score of its true error, effect − a_l, would be flagged. Columns:
        sites, wrong, flagged, hit (both), precision, recall, base_rate (the precision of flags at
        random), and Σ|effect − number| / Σ|effect| of a_l (error), `corrected` and `fixed`.

        Args:
            effects: measured effects of single sites, of the same question.

        Raises:
            ArgumentError: effects of another question, of groups, or of other prompts or sites.
        """
        truth = self._effects(effects)
        a = self.attribution.per_site.to(truth)
        wrong, flagged = self._wrong(truth - a), self.flagged
        sites = torch.full_like(wrong[:, 0], truth.shape[1], dtype=torch.long)
        counts = {"sites": sites, "wrong": wrong.sum(1), "flagged": flagged.sum(1)}
        counts["hit"] = (wrong & flagged).sum(1)
        fixed = {} if self.fixed is None else {"error_fixed": self.fixed.to(truth)}
        numbers = {"error": a, "error_corrected": self.corrected.to(truth), **fixed}
        sums = {name: (truth - n).abs().sum(1) for name, n in numbers.items()}
        frame = pd.DataFrame({name: n.cpu().numpy() for name, n in (counts | sums).items()})
        size = pd.Series(truth.abs().sum(1).cpu().numpy())
        frame.loc["all"], size.loc["all"] = frame.sum(), size.sum()
        frame[list(sums)] = frame[list(sums)].div(size, axis=0)
        frame["precision"] = frame["hit"] / frame["flagged"]
        frame["recall"] = frame["hit"] / frame["wrong"]
        frame["base_rate"] = frame["wrong"] / frame["sites"]
        return frame.astype(dict.fromkeys(counts, int)).rename_axis("prompt")

    def _effects(self, effects: Effects | Tensor) -> Float[Tensor, "batch site"]:
        expected = tuple(self.correction.shape)
        if isinstance(effects, Effects):
            if effects.key != self.how or not effects.is_by_site:
                flags = f"the flags are of {self.how} on {expected[1]} single sites"
                groups = f"{len(effects.groups)} groups"
                raise ArgumentError(f"effects of {effects.key} on {groups}; {flags}.")
            effects = effects.values
        if tuple(effects.shape) != expected:
            fact = f"effects of shape {tuple(effects.shape)}, flags of {expected} [batch, site]"
            raise ArgumentError(f"{fact}; measure both with the same lens and prompts.")
        return in_float64(effects.to(self.correction.device))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: first order, share, correction, score, fixed, flagged."""
        frame = self.attribution.to_frame().rename(columns={"value": "first_order"})
        fixed = {} if self.fixed is None else {"fixed": self.fixed}
        numbers = {"correction": self.correction, "score": self.score, **fixed}
        return frame.assign(**flat(numbers), flagged=self.flagged.cpu().flatten().numpy())


def score_of(a: Float[Tensor, "*rest"], missed: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """min / max of a and a + missed: 0 where their signs differ, 1 where both are zero."""
    effect = a + missed
    ratio = torch.minimum(a / effect, effect / a).clamp(min=0)
    score = torch.where((a == 0) | (effect == 0), (a == effect).to(ratio), ratio)
    return score.masked_fill(effect.isnan(), torch.nan)


_THRESHOLD, _FLOOR = 0.5, 0.01  # off by more than a factor of two; a hundredth of Σ|a|


@alone
def reliability(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    how: How = "add_one",
    threshold: float = _THRESHOLD,
    floor: float = _FLOOR,
    fix: bool = False,
    progress: bool = True,
) -> Reliability:
    """Screen a_l as the answer to one question, flag what to distrust, and with fix=True mend it.

    To add one, a_l is first order at ε = 0; to leave one out, at ε = 1.

    Cost beyond first_order and the noise floor (four forward passes): each site above the floor at
    some prompt is run, a forward pass, or about half where the model's blocks branch. Nothing more
    for fix.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        how: 'add_one', g(e_l) − g(0), or 'leave_one_out', g(1) − g(1 − e_l).
        threshold: of the score; 0.5 flags what is off by more than a factor of 2, 0.8 of 1.25.
        floor: share of Σ|a| under which a site is not material. 0 measures them all.
        fix: also give the numbers with the measured effects of the flagged sites put in.
        progress: show a bar.

    Raises:
        ArgumentError: another `how`, or a threshold or floor outside its range; a KL to add one.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    word("how", how, get_args(How))
    if not 0 < number("threshold", threshold) < 1:
        raise ArgumentError(f"threshold={threshold}; a score lies between 0 and 1.")
    if not 0 <= number("floor", floor) < 1:
        raise ArgumentError(f"floor={floor}; expected a share of Σ|a|, from 0 to below 1.")
    asked = ask(lens, prompts, readout)
    if how == "add_one":
        asked = asked.require_slope_at_base()

    def run(carrying: Bool[Tensor, " site"]) -> Float[Tensor, "batch carrying"]:
        sites = {lens.sites[i].name: (i,) for i in carrying.nonzero()[:, 0].tolist()}
        if not sites:
            return asked.ends.new_zeros(asked.reading.batch, 0)
        return patch_sites_of(asked, how, sites, progress).values

    first = first_order_of(asked, at=float(how == "leave_one_out"))
    return judged(asked, first, how, run, threshold, floor, fix=fix)


def judged(
    asked: Asked,
    first: Attribution,
    how: How,
    run: Callable[[Bool[Tensor, " site"]], Float[Tensor, "batch carrying"]],
    threshold: float = _THRESHOLD,
    floor: float = _FLOOR,
    *,
    fix: bool = False,
) -> Reliability:
    """First order at the question's end against the effects of the sites that carry it."""
    a, noise = first.per_site, asked.effect_noise(first.at)
    material = torch.maximum(floor * a.abs().sum(1), SIGMAS * noise.to(a))
    carrying = (a.abs() > material[:, None]).any(0)
    correction = torch.full_like(a, torch.nan)
    correction[:, carrying] = run(carrying).to(a) - a[:, carrying]
    passes = {"first order": 2, "screen": int(carrying.sum())}
    screened = Reliability(first, correction, None, how, threshold, material, passes)
    if not fix:
        return screened
    return dataclasses.replace(screened, fixed=torch.where(screened.flagged, screened.corrected, a))
