"""Second order: H v, the derivative of every site's first order along v.

    (H v)_l = d/dt ∂g/∂ε_l (at + t v) at t = 0,   H_lm = ∂²g/∂ε_l ∂ε_m      (note, §6, item 4)

1. A forward and a backward pass with ε in the graph give the slopes ∂g/∂ε_l, themselves in it.
2. A backward pass through both gives the derivative of Σ_l v_l ∂g/∂ε_l by every ε: H v, for H is
   symmetric.
3. Many directions go back through one graph, as a batch of a bounded number of tokens.
4. Prompts have nothing to do with one another, so no graph is of more tokens than that either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.calculus.function import read_value
from lens_lora.calculus.gate_graph import gate_graph
from lens_lora.calculus.slopes import require_finite_sites
from lens_lora.lens import LoraLens
from lens_lora.reading import Reading

__all__ = ["hessian_product", "hessian_products", "in_groups"]

TOKENS_AT_ONCE = 512


def hessian_product(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "site"],
    direction: Float[Tensor, "site"],
) -> Float[Tensor, "batch site"]:
    """H v per prompt and site, in the readout's units.

    Cost: one forward and two backward passes, about 2 FB. Memory: of the graph, of a group of
    prompts at a time.
    """

    def of_some(some: Reading) -> Float[Tensor, "batch site"]:
        one = hessian_products(lens, some, at, direction[None], progress=False)
        return next(iter(one))[:, 0]

    return in_groups(reading, of_some)


def in_groups(
    reading: Reading, work: Callable[[Reading], Float[Tensor, "some *out"]]
) -> Float[Tensor, "batch *out"]:
    """What is found of each prompt, a group of prompts at a time."""
    return torch.cat([work(some) for some in reading.groups(TOKENS_AT_ONCE)])


def hessian_products(
    lens: LoraLens,
    reading: Reading,
    at: Float[Tensor, "site"],
    directions: Float[Tensor, "direction site"],
    *,
    progress: bool = True,
    what: str = "Hessian products",
) -> Iterator[Float[Tensor, "batch chunk site"]]:
    """H v of many directions, a chunk of them at a time, in their order.

    Cost: one forward and one backward, and a backward through both for each direction, batched.

    Raises:
        NumericsError: a product that is not finite, naming the site.
    """
    directions = directions.to(at)
    step = max(1, TOKENS_AT_ONCE // reading.prompts.tokens.numel())
    silent = not progress or len(directions) <= step
    graph = gate_graph(lens, reading.prompts, at, lambda: read_value(lens, reading))
    slopes = graph.slopes()
    with tqdm(total=len(directions), desc=what, leave=False, disable=silent) as bar:
        for some in directions.split(step):
            covectors = some[:, None].expand(-1, *graph.gates.shape)
            products = graph.pulled_back(slopes, covectors).transpose(0, 1)
            products = reading.by_prompt(products)
            require_finite_sites(lens, products.transpose(1, 2))
            yield products
            bar.update(len(some))
