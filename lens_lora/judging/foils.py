"""Foils: scores that know only a part of what first order knows.

A method that does not beat them has not been shown to know more.

       sign(a_l) · ‖ΔW_l‖_F       the sign of first order, and the size of the weight change
       s ‖δz_l‖ · ‖Jᵀu_y‖         both norms of a_l, without the cosine between them
       sign(a_l) · noise          the sign alone: sizes drawn at random

Here s is the sign of the prompt's shift, so that the norms push the way the adapter went.
"""

from __future__ import annotations

import dataclasses

import torch

from lens_lora.arguments import whole
from lens_lora.core import (
    Attribution,
    Evaluations,
    LoraLens,
    PromptsLike,
    Readout,
    alone,
    squared_norms,
)
from lens_lora.judging.rankings import weight_norms

# The keys of the foils; `Attribution.key` adds no gate value to them.
SIGNED_WEIGHT_NORM = "signed_weight_norm"
NORM_PRODUCT = "norm_product"
SIGNED_RANDOM = "signed_random"


@alone
def foils(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, *, seed: int = 0
) -> dict[str, Attribution]:
    """Scores that know a part of first order at the base model, by their keys.

    They are meant for `compare` and `faithfulness`: a method that a foil ties with has not been
    shown to know more. Their numbers are in no unit that can be summed.

    Cost: one forward pass and two forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, the number that is read from the logits.
        seed: the seed of the random sizes.

    Returns:
        'signed_weight_norm', 'norm_product' and 'signed_random', each with values [batch, site].

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a derivative is not finite; the error names the site.
    """
    f = lens.function(prompts)
    g = Evaluations(f.about(Readout.required(readout)))
    slopes = g.slopes(0.0)
    first = Attribution.of(g, slopes, method="first_order", at=0.0)
    squares = squared_norms(g)
    delta = g.reading.by_prompt(squares["delta"]).sqrt()
    gradient = g.reading.by_prompt(squares["gradient"]).sqrt()
    signs = slopes.sign()
    towards = first.shift.sign()[:, None].to(signs)
    generator = torch.Generator(device="cpu").manual_seed(whole("seed", seed, 0))
    noise = torch.rand(signs.shape, generator=generator, dtype=torch.float64)
    scores = {
        SIGNED_WEIGHT_NORM: signs * weight_norms(g.lens).to(signs),
        NORM_PRODUCT: towards * delta * gradient,
        SIGNED_RANDOM: signs * noise.to(signs),
    }
    attributions: dict[str, Attribution] = {}
    for key, values in scores.items():
        attributions[key] = dataclasses.replace(first, values=values.to(signs), method=key)
    return attributions
