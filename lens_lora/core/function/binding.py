"""Making the function g(ε) of prompts and a readout: what `lens.function` does."""

from __future__ import annotations

from lens_lora.core.function.function import Function
from lens_lora.core.model import LoraLens, extensions
from lens_lora.core.model.public_call import HOW_TO_MAKE_A_LENS
from lens_lora.core.readout import PromptsLike, Readout
from lens_lora.core.readout.responses import AnswerLike
from lens_lora.errors import ArgumentError


@extensions.function_of.provide
def function_of(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout | None = None,
    response: AnswerLike | None = None,
    *,
    progress: bool = True,
) -> Function:
    """Bind g to these prompts, once; see `LoraLens.function`."""
    if not isinstance(lens, LoraLens):
        raise ArgumentError(f"the lens is a {type(lens).__name__}", remedy=HOW_TO_MAKE_A_LENS)
    lens.check_state()
    asked = lens.prompts(prompts)
    rows = asked
    if response is not None:
        with_response = lens.prompts(asked, response)
        if readout is None:
            # Each token of the response is drawn from the logits of the token before it.
            rows = with_response.one_token_earlier()
        else:
            asked = with_response
            rows = with_response
    f = Function(lens=lens, prompts=asked, rows=rows, progress=progress)
    return f if readout is None else f.about(readout)
