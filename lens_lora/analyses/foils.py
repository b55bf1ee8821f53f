"""Foils: scores that know a part of what first order knows, to be beaten before it is believed.

    sign(a_l) · ‖ΔW_l‖_F       the sign of first order, and the size of the weight change
    s ‖δz_l‖ · ‖Jᵀu_y‖         both norms of a_l, without the cosine between them
    sign(a_l) · noise          the sign alone: sizes drawn at random

s is the sign of the prompt's shift, so that what is ranked first pushes the way the adapter went.
Plain norms and random orders are baselines of `faithfulness` already.
"""

from __future__ import annotations

import dataclasses

import torch

from lens_lora.analyses.components import squared_norms
from lens_lora.analyses.first_order import first_order_of
from lens_lora.analyses.rankings import weight_norms
from lens_lora.arguments import whole
from lens_lora.engine.asked import Asked, ask
from lens_lora.hooked.alone import alone
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import PromptsLike
from lens_lora.readouts.readout import Readout
from lens_lora.results.attribution import Attribution
from lens_lora.results.keys import NORM_PRODUCT, SIGNED_RANDOM, SIGNED_WEIGHT_NORM

__all__ = ["foils", "foils_of"]


@alone
def foils(
    lens: LoraLens, prompts: PromptsLike, readout: Readout, *, seed: int = 0
) -> dict[str, Attribution]:
    """Scores of equal information beside first order at the base model, by their keys.

    For `compare` and `faithfulness`: a method that a foil ties with has not been shown to know
    more. Their numbers are in no unit that can be summed.

    Cost: two forward passes and two forward and backward passes.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read of the logits.
        seed: of the random sizes.

    Returns:
        'signed_weight_norm', 'norm_product' and 'signed_random', each with values [batch, site].

    Raises:
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    asked = ask(lens, prompts, readout).require_slope_at_base()
    return foils_of(asked, first_order_of(asked), seed=seed)


def foils_of(asked: Asked, first: Attribution, *, seed: int = 0) -> dict[str, Attribution]:
    """`foils` of a question that is already tokenised.

    Args:
        asked: the lens, the prompts and the readout.
        first: first order at ε = 0, by site.
        seed: as for `foils`.
    """
    signs = first.per_site.sign()
    generator = torch.Generator(device="cpu").manual_seed(whole("seed", seed, 0))
    noise = torch.rand(signs.shape, generator=generator, dtype=torch.float64)
    squares, by_prompt = squared_norms(asked), asked.reading.by_prompt
    norms = [by_prompt(squares[name]).sqrt() for name in ("delta", "gradient")]
    values = {
        SIGNED_WEIGHT_NORM: signs * weight_norms(asked.lens).to(signs),
        NORM_PRODUCT: first.shift.sign()[:, None].to(signs) * norms[0] * norms[1],
        SIGNED_RANDOM: signs * noise.to(signs),
    }
    return {
        key: dataclasses.replace(first, values=of.to(signs), method=key, mode="")
        for key, of in values.items()
    }
