"""First-order numbers that must not be trusted as the answer to one question.

Each question has its own end of the path. a_l = ∂g/∂ε_l at the base is read as what adding one site
does, and a_l at the adapted model as what leaving it out takes away. What the number misses is
second order and all beyond it:

    add one         g(e_l) − g(0) − a_l(0)     = ∫₀¹ (1 − t) H_ll(t e_l) dt        ½ H_ll(0) + …
    leave one out   g(1) − g(1 − e_l) − a_l(1) = −∫₀¹ (1 − t) H_ll(1 − t e_l) dt   −½ H_ll(1) + …

The three steps are those of "When Attribution Patching Lies" (arXiv 2606.09899). But each
correction is measured by an intervention, as H_ll costs more than running the site.

1. Screen. The sites that carry the attribution are run, and the correction is what a_l misses.
2. Flag. The score is the smaller of a and a + correction over the larger: ½ where a is half of the
   effect or twice it, 0 where it has the wrong sign. A site is flagged if its score is under the
   threshold and it is material: |a| or |correction| is above a share of Σ|a|, and above three noise
   floors. The paper's score |a| / (|a| + |correction|) is the same where a is too small, and above
   ½ for any a that is too large.
3. Fix. The flagged sites get the numbers that were measured, the others keep a_l.

Precision and recall of these flags, and what else the same passes could buy, are measured in
docs/faithfulness.md.
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
from lens_lora.core import SIGMAS, Attribution, Effects, Function, How, OfMeasured, analysis, tables
from lens_lora.errors import ArgumentError

# A score under this is flagged: the number is off by more than a factor of two.
_THRESHOLD = 0.5
# A site is material from this share of Σ|a| on.
_FLOOR = 0.01
# The gate value at which first order answers each question.
_END: dict[str, float] = {"add_one": 0.0, "leave_one_out": 1.0}

_BySite = Float[Tensor, "batch site"]
# Called with the sites that are to be run; returns the effect of each of them.
_EffectsOf = Callable[[Bool[Tensor, " site"]], Float[Tensor, "batch some"]]


@final
class Reliability(OfMeasured):
    """Each site's first-order number with what it misses, in the readout's units.

    `plot` is a_l against a_l + correction of a prompt's sites, the flagged ones apart.

    Attributes:
        attribution: a_l at the question's own end, ε = 0 to add one and 1 to leave one out.
        correction: [batch, site], what a_l misses of the effect, measured; NaN where it was not (a
            site under the floor at every prompt).
        fixed: [batch, site], the measured effect where flagged, a_l elsewhere; None without
            fix=True.
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
    def measured(self) -> Attribution:
        """The attribution, with its exact ends."""
        return self.attribution

    @property
    def readout(self) -> str:
        """The label of the readout."""
        return self.attribution.readout

    @property
    def units(self) -> str:
        """The units of all numbers."""
        return self.attribution.units

    @property
    def score(self) -> Float[Tensor, "batch site"]:
        """The smaller of a and a + correction over the larger; NaN where not screened."""
        return score_of(self.attribution.per_site, self.correction)

    @property
    def flagged(self) -> Bool[Tensor, "batch site"]:
        """Material sites whose score is under the threshold."""
        return self._is_wrong(self.correction)

    @property
    def screened(self) -> Bool[Tensor, "batch site"]:
        """Whether the correction of each site is known."""
        return ~self.correction.isnan()

    @property
    def corrected(self) -> Float[Tensor, "batch site"]:
        """First order with the correction; a_l alone where it is not screened."""
        return self.attribution.per_site + self.correction.nan_to_num()

    def _is_wrong(self, missed: _BySite) -> Bool[Tensor, "batch site"]:
        """Whether a_l, which misses this much of the effect, would be flagged."""
        a = self.attribution.per_site
        is_off = score_of(a, missed) < self.threshold
        is_material = torch.maximum(a.abs(), missed.abs()) > self.material[:, None]
        return is_off & is_material

    def flagged_sites(self, prompt: int | None = None) -> tuple[str, ...]:
        """A prompt's flagged sites, the largest correction first.

        Args:
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: there is no such prompt, or there are several and none is named.
        """
        row = self.only_prompt(prompt, "flags")
        sizes = self.correction[row].abs().nan_to_num()
        order = sizes.argsort(descending=True).tolist()
        flagged = self.flagged[row]
        return tuple(self.attribution.sites[i].name for i in order if flagged[i])

    def against(self, effects: Effects | Float[Tensor, "batch site"]) -> pd.DataFrame:
        """Flags against the sites that are truly wrong: one row per prompt, and 'all'.

        A site is wrong if its true error, effect − a_l, would be flagged as a correction. Columns:
        sites, wrong, flagged, hit (both), precision, recall, base_rate (the precision of flags at
        random), and Σ|effect − number| / Σ|effect| of a_l (error), `corrected` and `fixed`.

        Args:
            effects: measured effects of single sites, of the same question.

        Raises:
            ArgumentError: effects of another question, of groups, or of other prompts or sites.
        """
        truth = self._measured_effects(effects)
        a = self.attribution.per_site.to(truth)
        wrong = self._is_wrong(truth - a)
        flagged = self.flagged

        counts = {
            "sites": torch.full_like(wrong[:, 0], truth.shape[1], dtype=torch.long),
            "wrong": wrong.sum(1),
            "flagged": flagged.sum(1),
            "hit": (wrong & flagged).sum(1),
        }
        estimates = {"error": a, "error_corrected": self.corrected.to(truth)}
        if self.fixed is not None:
            estimates["error_fixed"] = self.fixed.to(truth)
        errors = {name: (truth - values).abs().sum(1) for name, values in estimates.items()}

        frame = pd.DataFrame()
        for name, column in (counts | errors).items():
            frame[name] = column.cpu().numpy()
        size_of_effects = pd.Series(truth.abs().sum(1).cpu().numpy())
        # The ratios of all prompts are ratios of sums.
        frame.loc["all"] = frame.sum()
        size_of_effects.loc["all"] = size_of_effects.sum()
        for name in errors:
            frame[name] = frame[name] / size_of_effects
        frame["precision"] = frame["hit"] / frame["flagged"]
        frame["recall"] = frame["hit"] / frame["wrong"]
        frame["base_rate"] = frame["wrong"] / frame["sites"]
        return frame.astype(dict.fromkeys(counts, int)).rename_axis("prompt")

    def _measured_effects(self, effects: Effects | Tensor) -> _BySite:
        """The values of effects, in float64, once it is sure that they answer the same question."""
        expected = tuple(self.correction.shape)
        if isinstance(effects, Effects):
            if effects.key != self.how or not effects.is_by_site:
                raise ArgumentError(
                    f"effects of {effects.key} on {len(effects.groups)} groups; the flags are of "
                    f"{self.how} on {expected[1]} single sites."
                )
            effects = effects.values
        if tuple(effects.shape) != expected:
            raise ArgumentError(
                f"effects of shape {tuple(effects.shape)}, flags of {expected} [batch, site]",
                remedy="measure both with the same lens and prompts.",
            )
        return in_float64(effects.to(self.correction.device))

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: first order, share, correction, score, fixed, flagged."""
        frame = self.attribution.to_frame()
        numbers = {"correction": self.correction, "score": self.score}
        if self.fixed is not None:
            numbers["fixed"] = self.fixed
        return frame.assign(**tables.flat(numbers), flagged=self.flagged.cpu().flatten().numpy())


def score_of(a: Float[Tensor, "*rest"], missed: Float[Tensor, "*rest"]) -> Float[Tensor, "*rest"]:
    """The smaller of a and a + missed over the larger.

    It is 0 where their signs differ, and 1 where both are zero.

    Args:
        a: first order.
        missed: what it misses of the effect.
    """
    effect = a + missed
    ratio = torch.minimum(a / effect, effect / a).clamp(min=0)
    # Where one of them is zero the score is 1 if both are, and 0 otherwise.
    has_zero = (a == 0) | (effect == 0)
    are_equal = (a == effect).to(ratio)
    score = torch.where(has_zero, are_equal, ratio)
    return score.masked_fill(effect.isnan(), torch.nan)


@analysis
def reliability(
    g: Function,
    *,
    how: How = "add_one",
    threshold: float = _THRESHOLD,
    floor: float = _FLOOR,
    fix: bool = False,
) -> Reliability:
    """Screen a_l as the answer to one question, flag what to distrust, and with fix=True mend it.

    To add one, a_l is first order at ε = 0; to leave one out, at ε = 1.

    Cost beyond first_order: four forward passes for the noise floor, and a forward pass for each
    site above the floor at some prompt, or about half of one where the model's blocks branch.
    Nothing more for fix.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, the number that is read from the logits.
        how: 'add_one', g(e_l) − g(0), or 'leave_one_out', g(1) − g(1 − e_l).
        threshold: a score below it is flagged; 0.5 flags what is off by more than a factor of 2,
            and 0.8 what is off by more than a factor of 1.25.
        floor: share of Σ|a| under which a site is not material. 0 measures them all.
        fix: also give the numbers with the measured effects of the flagged sites put in.
        progress: show a bar.

    Raises:
        ArgumentError: another `how`, or a threshold or floor outside its range; a KL with
            how='add_one'.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a derivative is not finite; the error names the site.
    """
    word("how", how, get_args(How))
    if not 0 < number("threshold", threshold) < 1:
        raise ArgumentError(f"threshold={threshold}; a score lies between 0 and 1.")
    if not 0 <= number("floor", floor) < 1:
        raise ArgumentError(f"floor={floor}; expected a share of Σ|a|, from 0 to below 1.")
    first = _first_order(g, how)
    return judged(g, first, how, lambda sites: _effects(g, how, sites), threshold, floor, fix=fix)


def _first_order(g: Function, how: How) -> Attribution:
    """First order at the end of the path at which it answers this question."""
    at = _END[how]
    return Attribution.of(g, g.slopes(at), method="first_order", at=at, mode="reverse")


def _effects(g: Function, how: How, sites: Bool[Tensor, " site"]) -> Float[Tensor, "batch some"]:
    """The exact effect of each of these sites by itself."""
    indices = sites.nonzero()[:, 0].tolist()
    base, adapted = g.ends
    if not indices:
        return base.new_zeros(len(base), 0)
    each = {str(index): (index,) for index in indices}
    members = g.lens.sites.indicator(each)
    if how == "add_one":
        return (g.corners(members) - base).T
    return (adapted - g.corners(1 - members)).T


def judged(
    g: Function,
    first: Attribution,
    how: How,
    effects_of: _EffectsOf,
    threshold: float = _THRESHOLD,
    floor: float = _FLOOR,
    *,
    fix: bool = False,
) -> Reliability:
    """Judge first order by the effects of the sites that carry it.

    Cost: four forward passes for the noise floor, and those of `effects_of`.

    Args:
        g: the function that first order is of.
        first: first order at the question's own end.
        how: the question: 'add_one' or 'leave_one_out'.
        effects_of: the effect of each site that is to be run.
        threshold, floor, fix: as for `reliability`.
    """
    a = first.per_site
    noise_floor = g.noise((1.0, -1.0), at=first.at).to(a)
    material = torch.maximum(floor * a.abs().sum(1), SIGMAS * noise_floor)
    carrying = (a.abs() > material[:, None]).any(0)
    correction = torch.full_like(a, torch.nan)
    correction[:, carrying] = effects_of(carrying).to(a) - a[:, carrying]
    screened = Reliability(
        attribution=first,
        correction=correction,
        fixed=None,
        how=how,
        threshold=threshold,
        material=material,
        passes={"first order": 2, "screen": int(carrying.sum())},
    )
    if not fix:
        return screened
    fixed = torch.where(screened.flagged, screened.corrected, a)
    return dataclasses.replace(screened, fixed=fixed)
