"""What two adapters do to a model's distributions on prompts, as vectors of one metric.

    cos_F = vᵀFv′ / √(vᵀFv · v′ᵀFv′),   v = Σ_l J δz_l,   F_t = diag p₀,t − p₀,t p₀,tᵀ

1. v is the joint first-order shift of all logits (a dual forward pass), at every token of the
   prompts but the first; vᵀFv′ is the covariance of the two shifts under p₀, summed over tokens.
2. The same of the exact shifts f(1) − f(0), which at full strength may be something else.
3. Sums over tokens and prompts stand inside each root.

Cost of a pair: two dual forward passes, three forward passes; of one more adapter half of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.adapters.random_directions import null_adapter
from lens_lora.analyses.null_test import fused_parts
from lens_lora.engine.asked import Asked
from lens_lora.engine.forward import joint_tangent
from lens_lora.engine.function import gated_logits, require_finite
from lens_lora.engine.reverse import site_slopes
from lens_lora.hooked.sites import Site
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = ["cosine_of", "on_prompts", "products"]

_TOKENS = 512  # read at once: each holds its logits and four shifts


def products(
    lens: LoraLens, others: Callable[[], Iterable[LoraLens]], prompts: Prompts
) -> Float[Tensor, "kind other pair batch"]:
    """vᵀFv′, vᵀFv and v′ᵀFv′ of each prompt, in nats: first order, then exact.

    Args:
        lens: v is of this one.
        others: makes lenses over the same model, one at a time; v′ is of each of them.
        prompts: with the tokens that are read.

    Raises:
        ModelStateError: the model has an operation without a forward-mode derivative.
        NumericsError: logits that are not finite.
    """
    found = [_of_some(lens, others, some) for some in _a_few_at_a_time(prompts)]
    values = torch.cat(found, -1)
    require_finite(values, "the shift of the logits")
    return values


def cosine_of(
    products: Float[Tensor, "*kind pair batch"], prompt: int | None = None
) -> Float[Tensor, "*kind"]:
    """vᵀFv′ / √(vᵀFv · v′ᵀFv′); NaN where a shift is zero.

    Args:
        products: as `products` gives them.
        prompt: an index; without it, sums over prompts stand inside each root.
    """
    rows = slice(None) if prompt is None else slice(prompt, prompt + 1)
    both, one, other = products[..., rows].double().sum(-1).unbind(-1)
    return both / (one * other).sqrt()


def _of_some(lens: LoraLens, others: Callable[[], Iterable[LoraLens]], prompts: Prompts) -> Tensor:
    with torch.no_grad():
        base = gated_logits(lens, prompts, lens.gates(0.0))
        root = base.softmax(-1).sqrt()
        mask = prompts.read_mask.to(base)[..., None]

        def weighted(shift: Tensor) -> Tensor:
            """√p₀ ∘ (v − p₀ᵀv), whose products are those of F."""
            centred = shift - (root * root * shift).sum(-1, keepdim=True)
            return (root * centred * mask).flatten(1)

        def both(of: LoraLens) -> tuple[Tensor, Tensor]:
            at = of.gates(0.0)
            first = joint_tangent(of, prompts, at, torch.ones_like(at))
            exact = gated_logits(of, prompts, of.gates(1.0)) - base
            return weighted(first), weighted(exact)

        mine = both(lens)
        theirs = (both(other) for other in others())
        each = [[_three(v, w) for v, w in zip(mine, their, strict=True)] for their in theirs]
    return torch.stack([torch.stack(kinds) for kinds in each], 1).cpu()


def _three(v: Tensor, w: Tensor) -> Float[Tensor, "pair batch"]:
    pairs = ((v, w), (v, v), (w, w))
    return torch.stack([(a * b).sum(1) for a, b in pairs])


def _a_few_at_a_time(prompts: Prompts) -> Iterator[Prompts]:
    step = max(1, _TOKENS // prompts.tokens.shape[1])
    for first in range(0, prompts.batch, step):
        yield prompts.rows(first, min(first + step, prompts.batch))


def on_prompts(
    asked: Asked,
    about: Asked | None,
    second: LoraLens,
    names: Sequence[str],
    draws: int,
    seed: int,
    progress: bool,
) -> dict[str, Tensor]:
    """The fields of `AdapterComparison` that need prompts.

    Args:
        asked: the first adapter and the prompts.
        about: the same with a readout; None without one.
        second: the other adapter over the same model.
        names: of the sites that both adapt.
        draws, seed: of the random directions, as for `null_adapter`.
        progress: show a bar.

    Raises:
        ArgumentError: a readout without a derivative at the base.
        UnsupportedAdapterError: random directions of DoRA or of trained modules.
        ModelStateError: the model has an operation without a forward-mode derivative.
    """
    lens, parts = asked.lens, fused_parts(second)
    if about is not None:
        about.require_slope_at_base()

    def random() -> Iterator[LoraLens]:
        for draw in range(draws):
            yield lens.with_adapter(null_adapter(second.adapter, seed, draw, parts=parts))

    silent = not progress or not draws
    with tqdm(total=draws, desc="null adapters", leave=False, disable=silent) as bar:

        def each() -> Iterator[LoraLens]:
            yield second
            for other in random():
                yield other
                bar.update()

        found = products(lens, each, asked.prompts.at_each_token())
    fields = {"function": found[:, 0], "null_function": found[:, 1:]}
    if about is not None:
        at = [site_slopes(of, about.reading, of.gates(0.0)) for of in (lens, second)]
        fields["effects"] = torch.stack(
            [_at(values, of.sites, names) for values, of in zip(at, (lens, second), strict=True)]
        )
        null = [(site_slopes(of, about.reading, of.gates(0.0)), of.sites) for of in random()]
        if null:
            fields["null_effects"] = torch.stack([_at(*own, names) for own in null])
    return fields


def _at(values: Tensor, sites: Sequence[Site], names: Sequence[str]) -> Tensor:
    order = {site.name: i for i, site in enumerate(sites)}
    return values[:, [order[name] for name in names]].detach().cpu().double()
