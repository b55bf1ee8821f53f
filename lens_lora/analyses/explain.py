"""All that is known of one prompt, in one result: for a terminal, a page, a notebook.

Of two answers' margin: `analyses/explain_margin.py`. Of a whole response, given or generated:
`analyses/explain_response.py`.
"""

from __future__ import annotations

from typing import overload

from lens_lora.analyses.explain_margin import Explanation, explain_margins
from lens_lora.analyses.explain_response import ResponseExplanation, explain_response
from lens_lora.arguments import whole
from lens_lora.engine.asked import ask_prompts
from lens_lora.errors import ArgumentError, PromptError
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.answer_tokens import AnswerLike
from lens_lora.readouts.prompts import PromptsLike

__all__ = ["explain"]


@overload
def explain(
    lens: LoraLens,
    prompt: PromptsLike,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = ...,
    null: int = ...,
    progress: bool = ...,
) -> Explanation: ...
@overload
def explain(
    lens: LoraLens,
    prompt: PromptsLike,
    *,
    response: AnswerLike | None = ...,
    fast: bool = ...,
    progress: bool = ...,
) -> ResponseExplanation: ...
@alone
def explain(
    lens: LoraLens,
    prompt: PromptsLike,
    doc: AnswerLike | None = None,
    pre: AnswerLike | None = None,
    *,
    response: AnswerLike | None = None,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> Explanation | ResponseExplanation:
    """All that this package can say of one prompt: of two answers' margin, or of a whole response.

    With `doc` and `pre`, what the adapter did to the margin between the two. With `response`, or
    with neither, in which case the adapted model says up to 64 tokens: which tokens of it changed,
    and which modules changed them (a `ResponseExplanation`; its own cost is with
    `analyses.explain_response`).

    Cost, with S sites in N layers: fast, about 70 forward passes and ten backward; in full, 2S
    forward passes for the interventions (about half where the model's blocks branch), 100 for the
    keep and drop curves, N dual forward and backward passes for the coupling, and 14 forward and
    backward for the path integral. A null adapter takes two forward passes and a backward.

    Args:
        lens: the adapter over the model.
        prompt: one: a string, a conversation, or ids [1, pos].
        doc, pre: a string each (with its leading space), a token id or ids; of several tokens in
            nats, else in logits.
        response: what is said after the prompt: a string, ids, or what `lens.generate` returned.
        fast: without intervening on single sites, coupling, path integral, and curves; of a
            response, without leaving out layers.
        null: how many null adapters to compare with; 0 for none, else at least 2.
        progress: show a bar.

    Raises:
        PromptError: several prompts, or one that does not fit the model.
        TokenError: an answer that is no token of the model, a word that lost its leading space,
            or doc equal to pre.
        ModelStateError: the model has an operation without a forward-mode derivative.
        ArgumentError: null of 1, below 0, or of a response; one answer without the other, or
            answers beside a response.
        NumericsError: a derivative that is not finite, naming the site.
    """
    prompts = ask_prompts(lens, prompt)
    if prompts.prompts.batch != 1:
        raise PromptError(
            f"explain takes one prompt, not {prompts.prompts.batch}: ll.explain_all takes several, "
            "and ll.sweep hundreds."
        )
    if whole("null", null, 0) == 1:
        raise ArgumentError(f"null={null}; expected 0 for none, or at least 2 null adapters.")
    if doc is None or pre is None:
        _require_response_only(doc, pre, null)
        is_generated = response is None
        if response is None:
            response = lens.generate(prompts.prompts, progress=progress)
        return explain_response(
            prompts, response, is_generated=is_generated, fast=fast, progress=progress
        )
    if response is not None:
        raise ArgumentError("doc and pre, and a response: explain takes two answers or a response.")
    return explain_margins(prompts, doc, pre, fast=fast, null=null, progress=progress)[0]


def _require_response_only(doc: object, pre: object, null: int) -> None:
    if doc is not None or pre is not None:
        given, other = ("doc", "pre") if pre is None else ("pre", "doc")
        raise ArgumentError(f"{given} without {other}: explain takes two answers, or a response.")
    if null:
        raise ArgumentError(f"null={null}: null adapters are compared on a margin (doc and pre).")
