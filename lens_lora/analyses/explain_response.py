"""What an adapter changed in a whole response, and which modules changed it.

1. Each token's distribution at base and adapted model, exactly (`token_shifts`).
2. Which modules hold the divergence of the whole response: first order of KL at ε = 1, which is
   what leaving a module out takes from it, to first order.
3. The same of log p of the tokens that changed most, one by one: which module moved which token.
4. Unless fast, exactly: log p of every token with each layer left out of the adapted model.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.token_shifts import TokenShifts, token_shifts_of
from lens_lora.engine.asked import Asked
from lens_lora.engine.batching import covectors_at_once
from lens_lora.engine.function import read_tokens
from lens_lora.engine.gate_graph import gate_graph
from lens_lora.engine.token_points import tokens_at_gates
from lens_lora.hooked.sites import group_sites, indicator
from lens_lora.readouts.answers import AnswerLike, AnswerLogProb
from lens_lora.readouts.divergence import KL
from lens_lora.readouts.generated import Generated
from lens_lora.results import drawing
from lens_lora.results.attribution import Attribution
from lens_lora.results.measured import Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["ResponseExplanation", "explain_response"]

_MOVED = 8


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ResponseExplanation(Result):
    """One prompt's response, explained; every part has a batch of one.

    Attributes:
        is_generated: whether the adapted model said it itself.
        shifts: how each token's distribution moved.
        modules: first order of KL(response) at ε = 1, by site.
        moved: [token, site], first order of log p(y_t) at ε = 1, of the tokens that changed most.
        moved_tokens: which tokens those are, by KL.
        left_out: [group, token], ℓ_t(1) − ℓ_t(1 − e_G): what leaving a layer out takes from the
            token's log-probability, exactly; None if fast.
        groups: the layers that were left out.
    """

    is_generated: bool
    shifts: TokenShifts
    modules: Attribution
    moved: Float[Tensor, "moved site"]
    moved_tokens: tuple[int, ...]
    left_out: Float[Tensor, "group token"] | None = None
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
        """Whether no layer was left out."""
        return self.left_out is None

    def to_frame(self) -> pd.DataFrame:
        """One row per token: as of `shifts`, and unless fast what each layer holds of log p."""
        frame = self.shifts.to_frame()
        if self.left_out is None:
            return frame
        rows = zip(self.groups, self.left_out.double().cpu().tolist(), strict=True)
        return frame.assign(**{f"left_out_{name}": values for name, values in rows})

    def story(self) -> str:
        """The explanation in plain words, a paragraph a line, claiming no more than the numbers."""
        return drawing.story(self)

    def figures(self) -> dict[str, Figure]:
        """The report's pictures by name."""
        return drawing.figures(self)

    def report(self, title: str | None = None) -> str:
        """A self-contained HTML page.

        Args:
            title: by default the prompt.
        """
        return drawing.report(self, title=title)

    def save_report(self, path: str | Path) -> Path:
        """Write `report` to a file; returns the path.

        Args:
            path: of the page.
        """
        path = Path(path)
        path.write_text(self.report(), encoding="utf-8")
        return path


def explain_response(
    prompts: Asked, response: AnswerLike, *, is_generated: bool, fast: bool, progress: bool
) -> ResponseExplanation:
    """All that this package can say of one response.

    Cost, with N layers: about six forward and two backward passes, a backward pass for each of the
    eight tokens that changed most, and unless fast at most N forward passes.

    Args:
        prompts: one prompt, without a readout.
        response: what is said after it.
        is_generated: whether the adapted model said it itself.
        fast: without leaving layers out.
        progress: show a bar.

    Raises:
        TokenError, PromptError: a response that does not fit the model.
        NumericsError: a logit or a derivative that is not finite.
    """
    asked = prompts.about(AnswerLogProb(response))
    with tqdm(total=3 + (not fast), desc="explain", leave=False, disable=not progress) as bar:
        bar.set_description("each token's distribution")
        shifts = token_shifts_of(asked)
        bar.update()
        bar.set_description("modules of the divergence")
        modules = first_order_of(asked.about(KL(response)), at=1.0)
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
        return found if fast else _without_layers(asked, found, progress)


def _slopes_of(asked: Asked, tokens: list[int]) -> Float[Tensor, "moved site"]:
    """∂ℓ_t/∂ε_l at ε = 1 of some tokens: a covector each, through one graph."""
    lens, reading = asked.lens, asked.reading

    def chosen() -> Float[Tensor, "moved batch"]:
        return read_tokens(lens, reading)[:, tokens].T

    graph = gate_graph(lens, reading.prompts, lens.gates(1.0), chosen)
    step = covectors_at_once(lens, reading.prompts)
    return graph.slopes_of_each(step, progress=False)[:, 0]


def _without_layers(
    asked: Asked, found: ResponseExplanation, progress: bool
) -> ResponseExplanation:
    lens = asked.lens
    groups = group_sites(lens.sites, "layer")
    off = 1 - indicator(groups, len(lens.sites))
    points = torch.cat([torch.ones_like(off[:1]), off]).to(lens.device, lens.gate_dtype)
    values = tokens_at_gates(
        lens, asked.reading, points, progress=progress, what="each layer left out"
    )
    return dataclasses.replace(found, left_out=values[:1] - values[1:], groups=tuple(groups))
