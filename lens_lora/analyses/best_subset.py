"""What is attainable: the sites that keep most of a shift, of all sets of so many sites.

1. One set for all prompts. What it keeps is CPR's ratio of means over prompts, each in the
   direction of its own shift, of exact runs with the set's gates at 1 and the others at 0.
2. Among all sets it is searched for by optimised gates and by swaps (`analyses/subset_search.py`).
   It is the best set that was found, not provably the best there is; on ten sites or fewer a search
   of all sets finds another one rarely.
3. A ranking's own share, as a share of this: how much of what is attainable it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses import rankings
from lens_lora.analyses.subset_search import Found, Search, best_set
from lens_lora.arguments import number, numbers_of, one_entry, whole
from lens_lora.engine.asked import Asked, ask
from lens_lora.engine.function import gated_readout
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results import drawing
from lens_lora.results.measured import SIGMAS, Measured, header

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["BestSubset", "best_subset"]

_AT = (0.0, 0.5, 1.0)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BestSubset(Measured):
    """The sets of sites that keep most of the shift, one for each size asked for.

    Attributes:
        counts: how many sites each set has.
        members: [size, site], which sites are in it.
        kept: [size], share of the shift of all prompts together, measured.
        kept_by_prompt: [size, batch], of each prompt's own shift; NaN within three noise floors.
        found_by: of each set, where the search that found it began ('gates', or the key of a
            ranking), with '+swaps' where exchanges improved on it.
        gradients: forward passes with a backward pass that the search took, of all prompts each.
        forwards: forward passes beside them, of all prompts each.
        sites, base, adapted, str_tokens, readout, units, meta: as in `Measured`.
    """

    counts: tuple[int, ...]
    members: Bool[Tensor, "size site"]
    kept: Float[Tensor, "size"]
    kept_by_prompt: Float[Tensor, "size batch"]
    found_by: tuple[str, ...]
    gradients: int
    forwards: int

    @property
    def fractions(self) -> Float[Tensor, "size"]:
        """Of all sites."""
        return torch.tensor(self.counts, dtype=torch.float64) / len(self.sites)

    def chosen(self, count: int | None = None) -> pd.DataFrame:
        """The sites of one set, as `adapter.only` takes them: site and module.

        Args:
            count: how many sites it has; without it, the only set.

        Raises:
            ArgumentError: no such set, or several and none named.
        """
        of = [self.sites[i] for i in self.members[self.row(count)].nonzero()[:, 0]]
        return pd.DataFrame({"site": [s.name for s in of], "module": [s.module for s in of]})

    def row(self, count: int | None = None) -> int:
        """Which set has so many sites.

        Args:
            count: how many; without it, the only set.

        Raises:
            ArgumentError: no such set, or several and none named.
        """
        if count is None and len(self.counts) == 1:
            return 0
        if count not in self.counts:
            raise ArgumentError(f"count={count}: expected one of {self.counts}.")
        return self.counts.index(count)

    def plot(self, count: int | None = None) -> Figure:
        """One set as a map of the sites; several sizes as a curve of what they keep.

        Args:
            count: the set of so many sites; without it, the only set, or the curve over sizes.

        Raises:
            ArgumentError: no such set.
        """
        return drawing.figure(self, count)

    def to_frame(self) -> pd.DataFrame:
        """One row per size: how many sites, what they keep, and what found them."""
        return pd.DataFrame(
            {
                "fraction": self.fractions.tolist(),
                "count": list(self.counts),
                "kept": self.kept.tolist(),
                "found_by": list(self.found_by),
            }
        )


@alone
def best_subset(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    size: float | Sequence[float] = 0.2,
    k: int | Sequence[int] | None = None,
    starts: rankings.Scores | Mapping[str, rankings.Scores] | None = None,
    steps: int = 30,
    progress: bool = True,
) -> BestSubset:
    """The best sets of so many sites that are found, and what they keep of the shift.

    What a ranking keeps can be read beside it: no ranking given in `starts` keeps more.

    Cost: 3 forward and backward passes, and for each size `steps` more, as many forward passes, and
    for each round of swaps (of ten or so) one forward and backward and twenty forward passes; the
    result says how many. Of 210 sites at 20 %, some 50 forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`; the sets are of all of them together.
        readout: u_y, what is read of the logits.
        size: fraction of the sites, or several.
        k: in place of size, the number of sites, or several.
        starts: of these prompts and this readout: attributions, effects, tensors, or {name: any of
            these}, whose tops (in the mean over prompts) the search also begins at.
        steps: of the optimised gates.
        progress: show a bar.

    Raises:
        ArgumentError: sizes outside 0 to 1, or no such number of sites; starts of something else; a
            shift that rounding may be all of.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a non-finite readout or slope.
    """
    asked = ask(lens, prompts, readout)
    counts, steps = _counts(len(lens.sites), size, k), whole("steps", steps, 1)
    _require_shift(asked)
    given = {} if starts is None else rankings.named(starts)
    scores = rankings.scores_towards(asked, given, baselines=False)
    total = steps * len(counts)
    with tqdm(total=total, desc="best subset", leave=False, disable=not progress) as bar:
        search = Search(asked, steps, bar)
        found = _found(search, counts, {name: s.mean(0).cpu() for name, s in scores.items()})
    members = torch.stack([one.members for one in found])
    return BestSubset(
        counts=counts,
        members=members,
        kept=torch.tensor([one.kept for one in found], dtype=torch.float64),
        kept_by_prompt=_by_prompt(asked, members),
        found_by=tuple(one.start for one in found),
        gradients=search.gradients,
        forwards=search.forwards,
        **header(asked),
    )


def _found(
    search: Search, counts: tuple[int, ...], scores: Mapping[str, Float[Tensor, "site"]]
) -> list[Found]:
    at_some = torch.ones(search.sites, dtype=torch.float64)
    slopes = {f"first_order@{at:g}": search.gradient(at * at_some) for at in _AT}
    return [best_set(search, count, scores, slopes) for count in counts]


def _by_prompt(asked: Asked, members: Bool[Tensor, "size site"]) -> Float[Tensor, "size batch"]:
    gates = members.double()
    found = gated_readout(asked.lens, asked.reading, gates, progress=False, what="sets").cpu()
    base, shift = asked.ends[0].cpu().double(), (asked.ends[1] - asked.ends[0]).cpu().double()
    clear = torch.where(shift.abs() > SIGMAS * asked.noise_floor.cpu(), shift, torch.nan)
    return ((found.double() - base[:, None]) / clear[:, None]).T.contiguous()


def _require_shift(asked: Asked) -> None:
    size = float((asked.ends[1] - asked.ends[0]).abs().mean())
    noise = float(asked.noise_floor.mean())
    if not size > SIGMAS * noise:
        raise ArgumentError(
            f"the adapter moves this readout by {size:.2g} ± {noise:.2g}, and of that rounding may "
            "be all: there is nothing for a subset to keep. Ask about what the adapter changes."
        )


def _counts(
    sites: int, size: float | Sequence[float], k: int | Sequence[int] | None
) -> tuple[int, ...]:
    if k is not None:
        counts = [whole("k", one, 1) for one in (k if _is_several(k) else [k])]  # type: ignore[union-attr]
    else:
        given = numbers_of("size", size) if _is_several(size) else [number("size", size)]
        for one in given:
            if not 0 < one <= 1:
                raise ArgumentError(f"size {one:g}: expected a fraction above 0, at most 1.")
        counts = [max(1, round(one * sites)) for one in given]
    if not counts or max(counts) > sites:
        raise ArgumentError(f"{k=}: expected numbers of sites from 1 to {sites}.")
    return tuple(sorted(set(counts)))


def _is_several(value: object) -> bool:
    return not isinstance(one_entry(value), int | float)
