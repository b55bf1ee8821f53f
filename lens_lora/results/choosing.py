"""Which prompt a table or picture is of, which entries are the largest, and in which order.

`prompt=None` is the mean over prompts where the values of different prompts can be averaged (sites,
groups, hook points), and the only prompt where they cannot (positions, curves along ε, stories,
rankings of tokens).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from lens_lora.arguments import whole
from lens_lora.errors import ArgumentError

__all__ = ["largest", "layer_order", "only_prompt", "prompt_rows"]

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def prompt_rows(prompt: int | None, batch: int) -> slice:
    """The rows of one prompt, or those of all prompts, to be averaged.

    Args:
        prompt: an index, or None for all prompts.
        batch: how many prompts the result has.

    Raises:
        ArgumentError: the result has no such prompt.
    """
    if prompt is None:
        return slice(None)
    index = only_prompt(prompt, batch)
    return slice(index, index + 1)


def only_prompt(prompt: int | None, batch: int, what: str = "values") -> int:
    """The index of the prompt meant: the one named, or the only one.

    Args:
        prompt: an index, or None for the only prompt.
        batch: how many prompts the result has.
        what: what cannot be averaged, for the error: 'positions', 'curves along ε'.

    Raises:
        ArgumentError: no such prompt, or several prompts and none named.
    """
    if prompt is None:
        if batch == 1:
            return 0
        raise ArgumentError(
            f"{what} of {batch} prompts have no mean; choose one with prompt=…, from 0 to "
            f"{batch - 1}."
        )
    if not 0 <= (prompt := whole("prompt", prompt)) < batch:
        raise ArgumentError(f"prompt {prompt}: the result has prompts 0 to {batch - 1}.")
    return prompt


def largest(values: Tensor, k: int) -> list[int]:
    """Flat indices of the k entries of largest magnitude, the largest first; NaN is left out.

    Args:
        values: of any shape.
        k: how many.

    Raises:
        ArgumentError: a k that is no whole number, or below 0.
    """
    sizes = values.flatten().abs().nan_to_num(-1.0)
    order = sizes.argsort(descending=True, stable=True)[: whole("k", k, 0)]
    return order[sizes[order] >= 0].tolist()


def layer_order(names: Sequence[str]) -> list[int]:
    """Indices that put the blocks' names in the order of layers; others keep their places.

    A TransformerBridge has its hook points in the order of the alphabet: 0, 1, 10, 11, …, 2.

    Args:
        names: of hook points.
    """
    layers = {i: int(found[1]) for i, name in enumerate(names) if (found := _BLOCK.match(name))}
    ordered = iter(sorted(layers, key=layers.__getitem__))
    return [next(ordered) if i in layers else i for i in range(len(names))]
