"""The content of a bank and of its file: only values, without the readouts and the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lens_lora.banks.record import Half
from lens_lora.core import Function, LoraLens, Prompts, storage

storage.stored(Half)
storage.stored(Prompts)


@storage.stored
@dataclasses.dataclass(frozen=True, eq=False)
class HeldReadout:
    """The base's half of first order for one readout of a bank.

    Attributes:
        halves: the halves of all groups of prompts, one group after another.
        response: the tokens of each prompt's response, in a bank by token; otherwise empty.
        labels: base, str_tokens, readout and units, as in `Attribution`.
        behind: the paths of the modules that write after the point that is read inside the model,
            and so cannot move it; empty for a readout of the logits.
    """

    halves: tuple[Half, ...]
    response: tuple[tuple[str, ...], ...]
    labels: dict[str, Any]
    behind: tuple[str, ...] = ()


@storage.stored
@dataclasses.dataclass(frozen=True, eq=False)
class HeldBank:
    """The content of a bank's file.

    Attributes:
        stacks: z and G, in one stack per shape.
        readouts: the base's half for each readout.
        several: whether the readouts were given as a list.
        modules: the globs of the modules that adapters may target.
        prepend_bos: the rule by which strings get a BOS.
        prompts: a description of how the prompts were read.
        about: the model's fingerprint as JSON, once the bank is saved.
    """

    stacks: dict[str, Tensor]
    readouts: tuple[HeldReadout, ...]
    several: bool
    modules: tuple[str, ...]
    prepend_bos: bool | None = None
    prompts: str = ""
    about: str = ""


def slopes_by_readout(
    readouts: Sequence[HeldReadout], lens: LoraLens, by_half: Sequence[Tensor]
) -> list[Float[Tensor, "batch site *by"]]:
    """Join the slopes of each readout from those of its groups of prompts.

    Args:
        readouts: the readouts, in the order of their slopes.
        lens: the lens with the sites of the slopes.
        by_half: the slopes of each half of each readout.

    Raises:
        NumericsError: a derivative is not finite; the message names the site.
    """
    halves = iter(by_half)
    values: list[Tensor] = []
    for readout in readouts:
        groups = list(itertools.islice(halves, len(readout.halves)))
        slopes = Function.joined(groups)
        lens.sites.require_finite(slopes)
        values.append(slopes)
    return values
