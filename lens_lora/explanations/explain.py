"""`explain`: all that this package can say about prompts, in one call.

For one prompt or several, `margins.py` explains a margin between two answers, and `readouts.py` any
other readout. For one prompt, `responses.py` explains a whole response, given or generated.
"""

from __future__ import annotations

from typing import overload

from lens_lora.arguments import whole
from lens_lora.core import LoraLens, PromptsLike, Readout, alone
from lens_lora.errors import ArgumentError, PromptError, named, setting
from lens_lora.explanations.explanation import (
    Explanation,
    Explanations,
    ReadoutExplanation,
    ResponseExplanation,
)
from lens_lora.explanations.margins import explained_margins
from lens_lora.explanations.readouts import explained_readout
from lens_lora.explanations.responses import explained_response
from lens_lora.responses.answers import AnswerLike, Generated


@overload
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike,
    pre: AnswerLike,
    *,
    fast: bool = ...,
    null: int = ...,
    progress: bool = ...,
) -> Explanation | Explanations: ...
@overload
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    *,
    readout: Readout,
    fast: bool = ...,
    null: int = ...,
    progress: bool = ...,
) -> ReadoutExplanation: ...
@overload
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    *,
    response: AnswerLike | None = ...,
    fast: bool = ...,
    progress: bool = ...,
) -> ResponseExplanation: ...
@alone
def explain(
    lens: LoraLens,
    prompts: PromptsLike,
    doc: AnswerLike | None = None,
    pre: AnswerLike | None = None,
    *,
    response: AnswerLike | None = None,
    readout: Readout | None = None,
    fast: bool = False,
    null: int = 0,
    progress: bool = True,
) -> Explanation | Explanations | ReadoutExplanation | ResponseExplanation:
    """Everything that this package can say about prompts: a margin, a readout, a whole response.

    With `doc` and `pre`: what the adapter did to the margin between the two. With `readout`: what
    it did to that number, such as the `Projection` of a hook point on a persona's direction. With
    `response`: which of its tokens changed, and which modules changed them. With none of these, the
    response is what the adapted model says, up to 64 tokens.

    Cost of a margin, with S sites in N layers: fast, about 70 forward passes and ten backward; in
    full, 2S forward passes for the interventions (about half where the model's blocks branch), 100
    for the keep and drop curves, N dual forward and backward passes for the coupling, and 14
    forward and backward for the path integral. Each null adapter adds two forward passes and a
    backward. What both models answer takes three passes over the prompt, and one over two tokens
    for each token that is said. A response costs about six forward and two backward passes, and a
    backward pass for each of the eight tokens that changed most; in full also 2N forward passes,
    and the path integral. A readout costs, for all prompts together, what a margin costs, without
    the passes for answers and for the tokens that the adapter promotes.

    Args:
        lens: the adapter over the model.
        prompts: one or several: strings, conversations, ids, or `Prompts`; with a response, one.
        doc, pre: a string each (with its leading space), a token id or ids, or a list of them, one
            per prompt; of several tokens in nats, else in logits.
        response: what is said after the prompt: a string, ids, or what `lens.generate` returned.
        readout: any readout that has a slope at the base model, of the logits or inside the model.
        fast: skip interventions on single sites, coupling, path integral and curves; for a
            response, skip the runs without each layer, and the path integral.
        null: the number of null adapters to compare with; 0 for none, otherwise at least 2.
        progress: show a bar.

    Returns:
        With doc and pre an `Explanation` of one prompt, also where it came in a list of one, and
        `Explanations` of several, in their order. Of a readout a `ReadoutExplanation` of all
        prompts, in its units. Of a response a `ResponseExplanation`.

    Raises:
        PromptError: several prompts and a response, or a prompt that does not fit the model.
        TokenError: an answer that is no token of the model, a word that lost its leading space,
            or doc equal to pre; a response that does not fit the model.
        ModelStateError: the model has an operation without a forward-mode derivative.
        ArgumentError: null of 1, below 0, or of a response; one answer without the other; more
            than one of two answers, a response and a readout; a readout without a slope at the
            base model.
        NumericsError: a logit or a derivative that is not finite; names the site where it can.
    """
    f = lens.function(prompts, progress=progress)
    batch = f.prompts.batch
    if whole("null", null, 0) == 1:
        expected = "expected 0 for none, or at least 2 null adapters"
        raise ArgumentError(f"{setting('null', null)}; {expected}.")
    if isinstance(doc, Readout):
        raise ArgumentError(
            f"doc is an answer, and {doc.label} is a readout",
            remedy="pass it by name: explain(lens, prompts, readout=…).",
        )
    if readout is not None:
        _require_readout_only(doc, pre, response)
        return explained_readout(f, readout, fast=fast, null=null)
    if doc is None or pre is None:
        _require_response_only(doc, pre, null, batch)
        is_generated = response is None or isinstance(response, Generated)
        if response is None:
            response = lens.generate(f.prompts, progress=progress)
        return explained_response(f, response, is_generated=is_generated, fast=fast)
    if response is not None:
        raise ArgumentError("doc and pre, and a response: explain takes two answers or a response.")
    explanations = explained_margins(f, doc, pre, fast=fast, null=null)
    return explanations[0] if batch == 1 else Explanations(explanations)


def _require_readout_only(doc: object, pre: object, response: object) -> None:
    """Refuse answers or a response where a readout is given."""
    asked = {"doc": doc, "pre": pre, "response": response}
    given = [named(name) for name, value in asked.items() if value is not None]
    if given:
        raise ArgumentError(
            f"{' and '.join(given)} beside {named('readout')}: explain takes two answers, a "
            "response, or a readout",
            remedy="call it for each.",
        )


def _require_response_only(doc: object, pre: object, null: int, batch: int) -> None:
    if doc is not None or pre is not None:
        given, other = ("doc", "pre") if pre is None else ("pre", "doc")
        raise ArgumentError(
            f"{named(given)} without {named(other)}: explain takes two answers, or a response."
        )
    if null:
        answers = f"{named('doc')} and {named('pre')}"
        why = f"null adapters are compared on a margin ({answers})"
        raise ArgumentError(f"{setting('null', null)}: {why}.")
    if batch != 1:
        raise PromptError(
            f"{batch} prompts: a response is explained for one prompt",
            remedy="with doc and pre explain takes several, and ll.sweep takes hundreds.",
            in_shell="with --doc and --pre explain takes several, and `lens-lora sweep` hundreds.",
        )
