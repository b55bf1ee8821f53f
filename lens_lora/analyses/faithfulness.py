"""Which few modules carry the shift? Keep or drop the top k of a ranking, by real interventions.

1. Rank each prompt's sites by value · sign(shift), the largest first: what pushes the readout the
   way in which the adapter moved it. Norms (‖ΔW‖, ‖δz‖) are ranked as they are.
2. With T_k the first k sites and e_T the gates that are 1 on T and 0 elsewhere,

       keep(k) = (g(e_T) − g(0)) / (g(1) − g(0)),   drop(k) = (g(1 − e_T) − g(0)) / (g(1) − g(0)).

   keep runs from 0 to 1 and drop from 1 to 0, not always between: keeping half can overshoot.
3. The area under each curve by the trapezoid rule over the fraction of sites: a good ranking has a
   high one of keep and a low one of drop.
4. With `test` the sites are ranked once, by the mean over the prompts of value · sign(shift), and
   that order is judged on the test prompts: also by CPR and CMD (`circuit_metrics`). A ranking that
   is judged on the prompts that it was made on knows more of them than an explanation can.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.analyses import rankings
from lens_lora.analyses.circuit_metrics import scored
from lens_lora.analyses.kept_curves import counts_of, mean_of_draws, moved_by
from lens_lora.arguments import number, whole
from lens_lora.engine.asked import Asked, ask
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.choosing import only_prompt
from lens_lora.results.keys import RANDOM
from lens_lora.results.measured import SIGMAS, Measured, header

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Faithfulness", "faithfulness", "faithfulness_of"]

_SHOWN, _CARRIED = 0.2, 0.9


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(Measured):
    """Share of the shift that remains where the top of a ranking is kept, or dropped.

    Attributes:
        names: the rankings' keys: 'first_order@0', 'path', 'weight_norm', 'random', …, or names
            that the caller gave.
        fractions: of the sites, from 0 to 1.
        counts: how many sites each fraction is.
        keep, drop: [method, batch, fraction], shares of the prompt's shift; NaN for a prompt whose
            shift is within three noise floors.
        orders: name → [batch, site], indices into sites, first ranked first; 'random' has none.
        noise_floor: [batch], σ of the shift from rounding.
        draws: random orders that the random curve is the mean of.
        cpr, cmd: [method], of the test prompts together; None without `test`.
        ranked_on: the tokens of the prompts that the sites were ranked on, where others are judged.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    names: tuple[str, ...]
    fractions: Float[Tensor, "fraction"]
    counts: tuple[int, ...]
    keep: Float[Tensor, "method batch fraction"]
    drop: Float[Tensor, "method batch fraction"]
    orders: Mapping[str, Int[Tensor, "batch site"]]
    noise_floor: Float[Tensor, "batch"]
    draws: int
    cpr: Float[Tensor, "method"] | None = None
    cmd: Float[Tensor, "method"] | None = None
    ranked_on: tuple[tuple[str, ...], ...] = ()

    @property
    def area_keep(self) -> Float[Tensor, "method batch"]:
        """Area under the keep curve: higher is better."""
        return torch.trapezoid(self.keep, self.fractions, dim=-1)

    @property
    def area_drop(self) -> Float[Tensor, "method batch"]:
        """Area under the drop curve: lower is better."""
        return torch.trapezoid(self.drop, self.fractions, dim=-1)

    def kept_share(self, name: str, fraction: float = _SHOWN) -> Float[Tensor, "batch"]:
        """Share of the shift that the top `fraction` of the sites keeps, at the nearest one run.

        Args:
            name: of the ranking.
            fraction: of the sites.

        Raises:
            ArgumentError: no such ranking, or a fraction outside 0 to 1.
        """
        return self.keep[self._index(name), :, self._nearest(fraction)]

    def carrying(self, name: str, share: float = _CARRIED) -> Float[Tensor, "batch"]:
        """The smallest fraction run that keeps at least `share` of the shift; NaN for none.

        Args:
            name: of the ranking.
            share: of the shift.

        Raises:
            ArgumentError: no such ranking.
        """
        enough = self.keep[self._index(name)] >= number("share", share)
        first = self.fractions[enough.int().argmax(-1)]
        return torch.where(enough.any(-1), first, torch.full_like(first, float("nan")))

    def kept(self, name: str, fraction: float = _SHOWN, prompt: int | None = None) -> pd.DataFrame:
        """The top sites of one prompt, in order, as `adapter.only` takes them: site and module.

        Args:
            name: of the ranking.
            fraction: of the sites, at the nearest one run.
            prompt: an index; without it, the only prompt.

        Raises:
            ArgumentError: no such ranking, or random, which is the mean of many; no such prompt,
                or several and none named.
        """
        self._index(name)
        if name not in self.orders:
            raise ArgumentError(
                f"{name!r} is the mean of {self.draws} orders; it has no top sites."
            )
        index = only_prompt(prompt, len(self.base), "rankings")
        count = self.counts[self._nearest(fraction)]
        top = [self.sites[i] for i in self.orders[name][index, :count].tolist()]
        return pd.DataFrame({"site": [s.name for s in top], "module": [s.module for s in top]})

    def to_frame(self) -> pd.DataFrame:
        """One row per ranking, prompt and fraction: count, shares kept and left."""
        methods, batch, steps = self.keep.shape
        return pd.DataFrame(
            {
                "method": np.repeat(self.names, batch * steps),
                "prompt": np.tile(np.repeat(np.arange(batch), steps), methods),
                "fraction": np.tile(self.fractions.numpy(), methods * batch),
                "count": np.tile(self.counts, methods * batch),
                "keep": self.keep.flatten().numpy(),
                "drop": self.drop.flatten().numpy(),
            }
        )

    def summary(self) -> pd.DataFrame:
        """One row per ranking: areas, the share a fifth keeps, the fraction that carries 90 %.

        Means over prompts; of the last, over those where some fraction does. With `test` also CPR
        and CMD.
        """
        shown = float(self.fractions[self._nearest(_SHOWN)])
        held_out = {"cpr": self.cpr, "cmd": self.cmd}
        return pd.DataFrame(
            {
                "area_keep": self.area_keep.nanmean(1).tolist(),
                "area_drop": self.area_drop.nanmean(1).tolist(),
                f"keep_top_{shown:.0%}": [float(self.kept_share(n).nanmean()) for n in self.names],
                f"carries_{_CARRIED:.0%}": [float(self.carrying(n).nanmean()) for n in self.names],
                **{name: of.tolist() for name, of in held_out.items() if of is not None},
            },
            index=pd.Index(self.names, name="method"),
        )

    def plot(self, prompt: int | None = None) -> Figure:
        """Both curves, one colour a ranking.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, prompt)

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise ArgumentError(f"ranking {name!r}: expected one of {', '.join(self.names)}.")
        return self.names.index(name)

    def _nearest(self, fraction: float) -> int:
        if not 0 <= number("fraction", fraction) <= 1:
            raise ArgumentError(f"fraction {fraction}: expected a number from 0 to 1.")
        return int((self.fractions - fraction).abs().argmin())


@alone
def faithfulness(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    attribution: rankings.Scores | Mapping[str, rankings.Scores],
    *,
    test: tuple[PromptsLike, Readout] | None = None,
    fractions: Sequence[float] | None = None,
    baselines: bool = True,
    greedy: bool = False,
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """Keep-top-k and drop-top-k curves of rankings of the sites, each point a real intervention.

    Cost: 2 forward passes per ranking (`draws` of them for random) and fraction between 0 and 1,
    batched; 13 for the ends, the noise and ‖δz‖; S(S+1)/2 for the greedy oracle. With `test`, 2
    more per ranking and size of MIB's, and 2 for the ends of the prompts that are ranked on.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        attribution: of these prompts and this readout, effects of single sites, or a tensor of
            contributions in the readout's units ([site], or [batch, site]); or {name: any of
            these}. A score without a sign is ranked rightly once multiplied by the shift's.
        test: other prompts and their readout, on which the ranking is judged: held out, so that the
            curves say what it is worth beyond the prompts that it was made on.
        fractions: of the sites, above 0 at least one; 0, one site, and 1 are always there.
        baselines: also rank by ‖ΔW‖, by ‖δz‖ at the base model, and at random.
        greedy: also add at each step the site that moves the readout furthest towards g(1).
        draws: random orders whose mean is the random curve.
        seed: of the random orders.
        progress: show a bar.

    Raises:
        ArgumentError: scores of something else; fractions outside 0 to 1; greedy on many sites, or
            with `test`; a `test` that is no pair.
        NumericsError: a non-finite readout.
    """
    asked, judged = ask(lens, prompts, readout), None
    if test is not None:
        if not isinstance(test, tuple) or len(test) != 2:
            raise ArgumentError("test: expected (prompts, readout), the pair that is held out.")
        judged = ask(lens, *test)
    return faithfulness_of(
        asked,
        attribution,
        judged=judged,
        fractions=fractions,
        baselines=baselines,
        greedy=greedy,
        draws=draws,
        seed=seed,
        progress=progress,
    )


def faithfulness_of(
    asked: Asked,
    attribution: rankings.Scores | Mapping[str, rankings.Scores],
    *,
    judged: Asked | None = None,
    fractions: Sequence[float] | None = None,
    baselines: bool = True,
    greedy: bool = False,
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> Faithfulness:
    """`faithfulness` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout that the sites are ranked by.
        attribution: as for `faithfulness`, and so `fractions`, `baselines` and the rest.
        judged: the prompts held out, with their readout; None to judge on those ranked by.
        fractions, baselines, greedy, draws, seed, progress: as for `faithfulness`.
    """
    counts = counts_of(fractions, len(asked.lens.sites))
    draws, seed = whole("draws", draws, 1), whole("seed", seed, 0)
    given, judge = rankings.named(attribution), judged or asked
    random = rankings.random_orders(len(asked.lens.sites), judge.reading.batch, draws, seed)
    held_out: dict[str, Any] = {}
    if judged is None:
        orders = rankings.orders_of(
            asked, given, baselines=baselines, greedy=greedy, progress=progress
        )
        every = _stacked(orders, random if baselines else None)
    else:
        if greedy:
            raise ArgumentError("greedy ranks each prompt's own sites: leave it out with test.")
        orders, by_size = rankings.orders_for(judged, asked, given, baselines=baselines)
        every, by_size = (_stacked(o, random if baselines else None) for o in (orders, by_size))
        found = scored(judged, every, by_size, progress=progress)
        held_out = {
            "cpr": mean_of_draws(found.cpr, len(orders)),
            "cmd": mean_of_draws(found.cmd, len(orders)),
        }
        held_out["ranked_on"] = asked.str_tokens
    base, adapted = judge.ends.cpu().double()
    labels: dict[str, Any] = {**header(judge), "base": base, "adapted": adapted, **held_out}
    floor, shift = judge.noise_floor.cpu().double(), adapted - base
    moved = moved_by(judge, every, counts, progress)
    clear = torch.where(shift.abs() > SIGMAS * floor, shift, torch.full_like(shift, float("nan")))
    keep, drop = (mean_of_draws(m / clear[:, None], len(orders)) for m in moved)
    return Faithfulness(
        names=(*orders, RANDOM) if baselines else tuple(orders),
        fractions=torch.tensor(counts, dtype=torch.float64) / len(asked.lens.sites),
        counts=counts,
        keep=keep,
        drop=drop,
        orders={name: order.cpu() for name, order in orders.items()},
        noise_floor=floor,
        draws=draws,
        **labels,
    )


def _stacked(orders: rankings.Orders, random: Tensor | None) -> Int[Tensor, "order batch site"]:
    """The named orders, and the random ones after them."""
    every = torch.stack(list(orders.values()))
    return every if random is None else torch.cat([every, random.to(every.device)])
