"""Count what a method costs: its passes, and its process time beside that of a plain pass.

1. A *row* is one prompt's pass through all blocks. Hooks on the blocks count rows forwards and, by
   the gradient of each block's output, backwards; rows that branch count as the blocks they run.
   Covectors that go back as one batch are seen as one: what runs such batches counts them itself.
2. F is a plain forward pass of the same prompts, all positions unembedded. `passes` counts a
   backward row as two forward ones; `time` is process time over that of F, noisy where the machine
   has other work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import torch
from torch import Tensor

import lens_lora as ll

_T = TypeVar("_T")
_REPEATS = 3


@dataclasses.dataclass
class Cost:
    """The passes and the time of one method, over all prompts of a set.

    Attributes:
        forward, backward: rows through all blocks.
        seconds: process time.
    """

    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.seconds + other.seconds,
        )

    def in_plain_passes(self, prompts: int, plain_seconds: float) -> dict[str, float]:
        """The cost per prompt, in units of F.

        Args:
            prompts: how many rows one pass of all of them is.
            plain_seconds: of a plain pass of all of them.
        """
        return {
            "forward": self.forward / prompts,
            "backward": self.backward / prompts,
            "passes": (self.forward + 2 * self.backward) / prompts,
            "time": self.seconds / plain_seconds,
        }


class Counter:
    """Counts what runs on a lens's model.

    Args:
        lens: whose model.
    """

    def __init__(self, lens: ll.LoraLens) -> None:
        self._blocks = list(lens.model.blocks)
        self._cost = Cost()

    def run(self, work: Callable[[], _T]) -> tuple[_T, Cost]:
        """Do the work, and return its result with its cost."""
        self._cost = Cost()
        with self._hooks():
            start = time.process_time()
            result = work()
            self._cost.seconds = time.process_time() - start
        return result, self._cost

    @contextlib.contextmanager
    def _hooks(self) -> Generator[None]:
        handles = [block.register_forward_hook(self._count) for block in self._blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, block: Any, args: Any, output: Any) -> None:
        """Count the rows of one block's output as a share of a pass, and of its gradient later."""
        del block, args
        out: Tensor = output[0] if isinstance(output, tuple) else output
        share = 1 / len(self._blocks)
        rows = len(out) * share
        self._cost.forward += rows
        if out.requires_grad:

            def on_gradient(gradient: Tensor) -> None:
                del gradient
                self._cost.backward += rows

            out.register_hook(on_gradient)


def plain_seconds(lens: ll.LoraLens, prompts: ll.results.Prompts) -> float:
    """Process time of a plain pass of the base on these prompts: the least of a few repeats."""
    seconds: list[float] = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.process_time()
            lens.run(prompts)
            seconds.append(time.process_time() - start)
    return min(seconds)
