"""The content of a bank and of its file: values alone, and no readout or model."""

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
        response: the tokens of each prompt's response, in a bank by token; else empty.
        labels: base, str_tokens, readout and units, as in `Attribution`.
        behind: the paths of the modules that write behind the point that is read inside the model,
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
        stacks: z and G, those of one shape together.
        readouts: the half of each readout.
        several: whether the readouts came as a list.
        modules: the globs of the modules that adapters may target.
        prepend_bos: the rule by which strings were read.
        prompts: how the prompts were read, in words.
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
    """The slopes of each readout, from those of its groups of prompts.

    Args:
        readouts: the readouts of the bank, in order.
        lens: the lens whose sites the slopes are of.
        by_half: the slopes of each half of each readout.

    Raises:
        NumericsError: a derivative that is not finite, naming the site.
    """
    halves = iter(by_half)
    values: list[Tensor] = []
    for readout in readouts:
        groups = list(itertools.islice(halves, len(readout.halves)))
        slopes = Function.joined(groups)
        lens.sites.require_finite(slopes)
        values.append(slopes)
    return values
