"""g of the base where each head's z is moved to the adapted model's: z + m_h (z(1) − z).

The adapted model runs once, and its z are kept. In the base each row of a batch has a mask m of its
own.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Function, HookFn, ScaleInject
from lens_lora.core.function import forward, memory
from lens_lora.core.function.interventions import Recording, head_parts, head_points, record


class HeadMasks:
    """The gates of heads, as a function of which g has values and slopes.

    Attributes:
        names: 'blocks.3.attn.hook_z[5]', in the order of a mask.
    """

    def __init__(self, g: Function) -> None:
        self._lens = g.lens
        points = head_points(g.lens, "o")
        # The prompts in groups, with the adapted model's z of each.
        self._runs = [
            (group, record(g.lens, group.rows, 1.0, points)) for group in g.groups(graph=True)
        ]
        _, donor = self._runs[0]
        parts = head_parts(g.lens, donor, donor.firings)
        # Of each hook point of z, how many heads it holds; a mask has them one after another.
        self._heads = {name: len(of_heads) for name, of_heads in parts.items()}
        names: list[str] = []
        for name, count in self._heads.items():
            names += [f"{name}[{head}]" for head in range(count)]
        self.names: tuple[str, ...] = tuple(names)

    def values(self, masks: Float[Tensor, "point head"]) -> Float[Tensor, "batch point"]:
        """g under each mask. At most a forward pass a mask, batched."""
        values: list[Tensor] = []
        for group, donor in self._runs:
            reading = group.reading
            chunks: list[Tensor] = []
            for some in masks.split(memory.rows_at_once(self._lens, reading)):
                by_row = some.repeat(len(reading.owner), 1)
                with torch.no_grad(), self._moved(donor, by_row):
                    of_rows = forward.read_value(self._lens, reading.repeat(len(some)))
                chunks.append(of_rows.unflatten(0, (reading.batch, -1)))
            values.append(torch.cat(chunks, 1))
        joined = torch.cat(values)
        forward.require_finite(joined, "the patched readout")
        return joined

    def slopes(self, mask: Float[Tensor, " head"]) -> Float[Tensor, "batch head"]:
        """∂g/∂m. One forward and one backward pass."""
        slopes: list[Tensor] = []
        for group, donor in self._runs:
            reading = group.reading
            by_row = mask.repeat(len(reading.owner), 1).requires_grad_()
            runs_again = memory.must_rerun(self._lens, reading)
            rerun = memory.blocks_rerun(self._lens) if runs_again else contextlib.nullcontext()
            with torch.enable_grad(), rerun, self._moved(donor, by_row):
                value = forward.read_for_slopes(self._lens, reading)
                (gradient,) = torch.autograd.grad(value.sum(), by_row)
            slopes.append(reading.by_prompt(gradient))
        joined = torch.cat(slopes)
        forward.require_finite(joined, "the slope of a head")
        return joined

    def _moved(
        self, donor: Recording, masks: Float[Tensor, "row head"]
    ) -> AbstractContextManager[None]:
        """The base model, with rows r0 r0 … r1 r1 …, each under a mask of its own."""
        width = self._lens.heads.d_head

        def move(of_donor: Tensor, mask: Tensor, tensor: Tensor, hook: Any) -> Tensor:
            del hook
            weights = mask.to(tensor).repeat_interleave(width, 1)
            weights = weights.view(-1, 1, *tensor.shape[2:]).expand_as(tensor)
            copies = len(tensor) // len(of_donor)
            return tensor.lerp(of_donor.repeat_interleave(copies, 0), weights)

        hooks: list[tuple[str, HookFn]] = []
        by_point = masks.split(list(self._heads.values()), 1)
        for name, mask in zip(self._heads, by_point, strict=True):
            last_firing = donor.firings[name][-1]
            hooks.append((name, functools.partial(move, last_firing, mask)))
        base = ScaleInject(self._lens.plan, self._lens.gates(0.0))
        return self._lens.injected(base, before=hooks)
