"""What an adapter changed in a whole response, and which modules changed it.

1. Each token's distribution at base and adapted model, exactly (`token_shifts`).
2. Which modules hold the divergence of the whole response: first order of KL at ε = 1, which is
   what leaving a module out takes from it, to first order.
3. The same of log p of the tokens that changed most, one by one: which module moved which token.
4. Unless fast: the path integral of KL, a complete split of it among modules; and exactly, log p of
   every token with each layer alone added to the base model, and left out of the adapted one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.path import path_attribution_of
from lens_lora.analyses.token_shifts import TokenShifts, token_shifts_of
from lens_lora.engine.asked import Asked
from lens_lora.engine.gate_graph import slopes_of_each
from lens_lora.engine.read import differentiable_tokens
from lens_lora.engine.token_points import tokens_at_gates
from lens_lora.hooked.sites import group_sites, indicator
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.answers import AnswerLogProb
from lens_lora.readouts.divergence import KL
from lens_lora.readouts.generated import Generated
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Paged

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ResponseExplanation", "explain_response"]

_MOVED = 8
_TOL, _MAX_NODES = 1e-2, 16


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ResponseExplanation(Paged):
    """One prompt's response, explained; every part has a batch of one.

    Attributes:
        is_generated: whether the adapted model said it itself.
        shifts: how each token's distribution moved.
        modules: first order of KL(response) at ε = 1, by site.
        moved: [token, site], first order of log p(y_t) at ε = 1, of the tokens that changed most.
        moved_tokens: which tokens those are, by KL.
        path: the path integral of KL(response), by site; None if fast, as what follows.
        add_one: [group, token], ℓ_t(e_G) − ℓ_t(0): what a layer alone adds to the base model's
            log-probability of a token, exactly.
        leave_one_out: [group, token], ℓ_t(1) − ℓ_t(1 − e_G): what leaving it out takes away.
        groups: those layers.
    """

    is_generated: bool
    shifts: TokenShifts
    modules: Attribution
    moved: Float[Tensor, "moved site"]
    moved_tokens: tuple[int, ...]
    path: Attribution | None = None
    add_one: Float[Tensor, "group token"] | None = None
    leave_one_out: Float[Tensor, "group token"] | None = None
    groups: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[str, ...]:
        """Its tokens."""
        return self.shifts.str_tokens[0]

    @property
    def response(self) -> tuple[str, ...]:
        """Its tokens y_1 … y_T."""
        return self.shifts.response[0]

    @property
    def is_fast(self) -> bool:
        """Whether no layer was added or left out."""
        return self.add_one is None or self.leave_one_out is None

    def to_frame(self) -> pd.DataFrame:
        """One row per token: as of `shifts`, and unless fast what each layer does to log p."""
        frame = self.shifts.to_frame()
        for how, values in (("add_one", self.add_one), ("leave_one_out", self.leave_one_out)):
            if values is not None:
                rows = zip(self.groups, values.cpu().double().tolist(), strict=True)
                frame = frame.assign(**{f"{how}, {name}": row for name, row in rows})
        return frame

    def story(self) -> str:
        """The explanation in plain words, a paragraph a line, claiming no more than the numbers."""
        return drawing.story(self)

    def figures(self) -> dict[str, Figure]:
        """The report's pictures by key: `"text"`, `"tokens"`, `"add_one"`, `"leave_one_out"`."""
        return drawing.figures(self)


def explain_response(
    prompts: Asked, response: AnswerLike, *, is_generated: bool, fast: bool, progress: bool
) -> ResponseExplanation:
    """All that this package can say of one response.

    Cost, with N layers: about six forward and two backward passes, and a backward pass for each of
    the eight tokens that changed most; unless fast also at most 2N forward passes (about half
    where the model's blocks branch), and 14 forward and backward for the path integral.

    Args:
        prompts: one prompt, without a readout.
        response: what is said after it.
        is_generated: whether the adapted model said it itself.
        fast: without adding layers, leaving them out, and the path integral.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a response that does not fit the model.
        NumericsError: a logit or a derivative that is not finite.
    """
    asked, kl = prompts.about(AnswerLogProb(response)), prompts.about(KL(response))
    with tqdm(total=3 if fast else 5, desc="explain", leave=False, disable=not progress) as bar:
        bar.set_description("each token's distribution")
        shifts = token_shifts_of(asked)
        bar.update()
        bar.set_description("modules of the divergence")
        modules = first_order_of(kl, at=1.0)
        bar.update()
        bar.set_description("modules of the tokens that changed most")
        most = shifts.kl[0, 0].argsort(descending=True)[:_MOVED].tolist()
        moved = _slopes_of(asked, most)
        bar.update()
        found = ResponseExplanation(
            is_generated=is_generated or isinstance(response, Generated),
            shifts=shifts,
            modules=modules,
            moved=moved,
            moved_tokens=tuple(most),
        )
        return found if fast else _in_full(asked, kl, found, bar, progress)


def _slopes_of(asked: Asked, tokens: list[int]) -> Float[Tensor, "moved site"]:
    """∂ℓ_t/∂ε_l at ε = 1 of some tokens: a covector each, through one graph."""
    lens, reading = asked.lens, asked.reading

    def chosen() -> Float[Tensor, "moved batch"]:
        return differentiable_tokens(lens, reading)[:, tokens].T

    return slopes_of_each(lens, reading, lens.gates(1.0), chosen, progress=False)[:, 0]


def _in_full(
    asked: Asked, kl: Asked, found: ResponseExplanation, bar: tqdm, progress: bool
) -> ResponseExplanation:
    """The same with what takes many passes: the path integral, and real interventions."""
    bar.set_description("path integral")
    path = path_attribution_of(kl, tol=_TOL, max_nodes=_MAX_NODES, progress=progress)
    bar.update()
    lens = asked.lens
    groups = group_sites(lens.sites, "layer")
    alone = indicator(groups, len(lens.sites))
    ends = torch.tensor([[0.0], [1.0]], dtype=alone.dtype, device=alone.device)
    points = torch.cat([ends.expand(-1, len(lens.sites)), alone, 1 - alone])
    values = tokens_at_gates(
        lens,
        asked.reading,
        points.to(lens.device, lens.gate_dtype),
        progress=progress,
        what="each layer added and left out",
    )
    base, adapted, rest = values[0], values[1], values[2:]
    bar.update()
    return dataclasses.replace(
        found,
        path=path,
        add_one=rest[: len(groups)] - base,
        leave_one_out=adapted - rest[len(groups) :],
        groups=tuple(groups),
    )
