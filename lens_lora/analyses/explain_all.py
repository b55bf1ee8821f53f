"""Several prompts explained, each as by `explain`, and what they have in common.

1. Prompts of like length and the same kind of margin go through the quick analyses together, in the
   same passes (`analyses/explain_margin.py`); unless fast, the slow ones follow prompt by prompt.
2. The explanations come back in the order of the prompts, each a result of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, final

import pandas as pd

from lens_lora.analyses.explain_margin import Explanation, explain_margins
from lens_lora.arguments import whole
from lens_lora.engine.asked import Asked, ask_prompts
from lens_lora.engine.texts import by_length
from lens_lora.errors import ArgumentError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.answer_tokens import AnswerLike, items_of
from lens_lora.readouts.answers import margin_between
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.results import drawing
from lens_lora.results.measured import Paged

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["Explanations", "explain_all"]

_MOST_TOKENS = 2048


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanations(Paged):
    """Several prompts' margins, each explained.

    Attributes:
        each: an explanation a prompt, in their order.
    """

    each: tuple[Explanation, ...]

    def __len__(self) -> int:
        return len(self.each)

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.each)

    def __getitem__(self, index: int) -> Explanation:
        return self.each[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt and site: what `Explanation.to_frame` has."""
        frames = [one.to_frame() for one in self.each]
        return pd.concat(frames, keys=range(len(frames)), names=["prompt", None]).reset_index(0)

    def figures(self) -> dict[str, Figure]:
        """Pictures of all prompts: `"margins"`, and `"layers"`, first order by layer."""
        return drawing.figures(self)

    def story(self) -> str:
        """A sentence or more of each prompt, a prompt a line."""
        return drawing.story(self)


@alone
def explain_all(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> Explanations:
    """`explain` of several prompts, those of like length in the same passes.

    Cost: of each prompt as of `explain`. With fast=True, short prompts share their passes; as those
    of one prompt share some already, sixteen prompts take one and a half to two and a half times as
    many passes of sixteen rows as one prompt takes of one.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        doc, pre: an answer each, or a list of them, one per prompt; of several tokens in nats,
            else in logits.
        fast: without intervening on single sites, coupling, path integral, and curves.
        null: how many null adapters to compare with; 0 for none, else at least 2.
        progress: show a bar.

    Raises:
        PromptError: a prompt that does not fit the model.
        TokenError: as for `explain`, or a wrong number of answers.
        ModelStateError: the model has an operation without a forward-mode derivative.
        ArgumentError: null of 1, or below 0.
        NumericsError: a derivative that is not finite, naming the site.
    """
    asked = ask_prompts(lens, prompts)
    if whole("null", null, 0) == 1:
        raise ArgumentError(f"null={null}; expected 0 for none, or at least 2 null adapters.")
    batch = asked.prompts.batch
    margin_between(lens.model, doc, pre, asked.prompts).over(lens.model, asked.prompts)
    docs, pres = items_of(doc, batch), items_of(pre, batch)
    found: dict[int, Explanation] = {}
    for chosen in _together(asked, docs, pres):
        part = Asked(lens, asked.prompts.chosen(chosen))
        answers = ([of[i] for i in chosen] for of in (docs, pres))
        made = explain_margins(part, *answers, fast=fast, null=null, progress=progress)
        found |= zip(chosen, made, strict=True)
    return Explanations(tuple(found[i] for i in range(len(found))))


def _together(
    asked: Asked, docs: Sequence[AnswerLike], pres: Sequence[AnswerLike]
) -> Iterator[list[int]]:
    """Prompts that may share their passes: of like length, with margins in the same units."""
    model, prompts = asked.lens.model, asked.prompts
    units = [
        margin_between(model, docs[i], pres[i], prompts.row(i)).units for i in range(prompts.batch)
    ]
    for indices, _ in by_length(prompts, _MOST_TOKENS):
        for kind in dict.fromkeys(units):
            if chosen := [i for i in indices if units[i] == kind]:
                yield chosen
