"""Path patching: one reader alone sees what switching a writer's sites makes of their branches.

Of the rows of a prompt the first is plain. In each other row the gates of one writer's sites are
switched, of those sites whose writes reach the reader.

1. What the switch makes of the branches of a block is the difference of this row and the plain one
   at the block's end. It is taken off the stream there, so that each block reads the plain stream.
2. These differences, summed over the writer's blocks, are added to what the one reader reads.
3. A reader in the block of a site may come before or after it. Rows of a batch differ by rounding
   anyway, so a difference of rows does not tell. A pass with tangents does, beforehand.

Cost: a forward pass a path, batched, and one with tangents if a path is within a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import Function, LoraLens, ScaleInject, attached
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.forward import bar_of, in_chunks, require_finite
from lens_lora.edge_attribution.by_reader import Pass, held_bytes
from lens_lora.edge_attribution.readers import (
    LOGITS,
    block_reader,
    head_hooks,
    reader_layer,
    readers_shown,
    unknown_heads,
)
from lens_lora.errors import ArgumentError


@dataclasses.dataclass(frozen=True)
class Path:
    """From sites that are switched together to one reader.

    Attributes:
        writer: what the sites are called together.
        sites: their indices.
        reader: the only reader that sees what the switch makes of their branches.
    """

    writer: str
    sites: tuple[int, ...]
    reader: str


def patched_edges(g: Function, paths: Sequence[Path], at: float) -> Float[Tensor, "batch path"]:
    """How g at this strength changes along each path. At most a forward pass a path, batched.

    Args:
        g: the function, with a readout.
        paths: of each the writer's gates are switched, to 1 − at.
        at: the gate value of every other site, 0 or 1.

    Raises:
        ArgumentError: a reader that nothing of its writer reaches.
    """
    heard = _heard(g, paths, at)
    groups = g.groups(copies=2)  # A plain row beside a patched one.
    values: list[Tensor] = []
    with bar_of(len(heard) * len(groups), g.progress, "path patches") as bar:
        for group in groups:
            step = max(1, memory.rows_at_once(group.lens, group.reading) - 1)
            starts = range(0, len(heard), step)
            runs = (_Run(group, heard[start : start + step], at) for start in starts)
            values.append(in_chunks(runs, _Run.effects, bar))
    return torch.cat(values)


def _heard(g: Function, paths: Sequence[Path], at: float) -> list[Path]:
    """The paths, each with those of its writer's sites whose writes reach the reader."""
    lens = g.lens
    within = _within_blocks(g, paths, at)

    def is_heard(site: int, reader: str) -> bool:
        if _is_in_own_block(lens, site, reader):
            return (site, block_reader(reader)) in within
        return lens.sites[site].layer <= reader_layer(lens, reader)

    heard: list[Path] = []
    for path in paths:
        sites = tuple(site for site in path.sites if is_heard(site, path.reader))
        if not sites:
            raise ArgumentError(
                f"{path.writer} → {path.reader}: nothing that the site writes reaches this reader",
                remedy="ll.edges(…).to_frame() has the readers of each site.",
            )
        heard.append(dataclasses.replace(path, sites=sites))
    return heard


def _within_blocks(g: Function, paths: Sequence[Path], at: float) -> set[tuple[int, str]]:
    """The (site, reader) of one block whose reader sees the site's write.

    A pass with tangents shows it, where a path is within a block; else nothing is run.
    """
    pairs = [(site, path.reader) for path in paths for site in path.sites]
    found: set[tuple[int, str]] = set()
    if any(_is_in_own_block(g.lens, site, reader) for site, reader in pairs):
        for group in g.groups(graph=True, beside=held_bytes(g)):
            found |= Pass(group).within_blocks(at)
    return found


def _is_in_own_block(lens: LoraLens, site: int, reader: str) -> bool:
    return reader != LOGITS and lens.sites[site].layer == reader_layer(lens, reader)


class _Run:
    """One run: of n rows of each prompt the first is plain, and each other one has a path."""

    def __init__(self, g: Function, paths: Sequence[Path], at: float) -> None:
        self._lens = g.lens
        self._reading = g.reading
        self._gates = g.lens.gates(at).repeat(1 + len(paths), 1)
        # Of each row but the plain one: its reader, and the blocks in which its sites are.
        self._readers: dict[int, str] = {}
        self._blocks: dict[int, set[int]] = {}
        for row, path in enumerate(paths, start=1):
            self._gates[row, list(path.sites)] = 1 - at
            self._readers[row] = path.reader
            self._blocks[row] = {g.lens.sites[site].layer for site in path.sites}
        # What the switch makes of a block's branches, by row and block.
        self._deltas: dict[tuple[int, int], Tensor] = {}
        # Rows whose reader is a head that was run.
        self._split: set[int] = set()

    def effects(self) -> Float[Tensor, "batch path"]:
        """g of each path's row less that of the plain one. One forward pass of each row."""
        lens = self._lens
        host = lens.plan.host
        block_inputs = [
            (host.block_input(layer), functools.partial(self._begin_block, layer))
            for layer in range(host.n_layers)
        ]
        of_heads = [row for row, name in self._readers.items() if block_reader(name) != name]
        scaled = ScaleInject(lens.plan, self._gates.repeat(len(self._reading.owner), 1))
        with (
            torch.no_grad(),
            lens.injected(scaled, before=block_inputs),
            readers_shown(lens, self._read),
            attached(lens.model, head_hooks(lens, self._only_head) if of_heads else []),
        ):
            values = function.read_value(lens, self._reading.repeat(len(self._gates)))
        require_finite(values, "the patched readout")
        for row in of_heads:
            if row not in self._split:
                raise unknown_heads(block_reader(self._readers[row]))
        by_row = values.unflatten(0, (self._reading.batch, -1))
        return by_row[:, 1:] - by_row[:, :1]

    def _by_row(self, tensor: Tensor) -> Float[Tensor, "prompt_row row *rest"]:
        """A copy, with the rows of each prompt's row on an axis of their own."""
        return tensor.unflatten(0, (-1, len(self._gates))).clone()

    def _begin_block(self, layer: int, stream: Tensor, hook: Any) -> Tensor:
        """What the switch made of the block before is taken off the stream."""
        del hook
        x = self._by_row(stream)
        self._take_off(layer - 1, x)
        return x.flatten(0, 1)

    def _take_off(self, block: int, x: Tensor) -> None:
        """Set each row whose sites are in this block back to the plain stream, and keep the rest.

        Where a reader of the same block has seen it, it is known already.
        """
        for row, blocks in self._blocks.items():
            if block in blocks:
                delta = self._deltas.setdefault((row, block), x[:, row] - x[:, 0])
                x[:, row] -= delta

    def _read(self, name: str, stream: Tensor) -> Tensor:
        """What a reader sees: in the rows whose reader it is, what the switch made as well."""
        layer = reader_layer(self._lens, name)
        x = self._by_row(stream)
        if name == LOGITS:
            self._take_off(layer - 1, x)
        for row, reader in self._readers.items():
            is_its_own = block_reader(reader) == name
            is_within_block = name != LOGITS and layer in self._blocks[row]
            if is_within_block and is_its_own:
                self._deltas[row, layer] = x[:, row] - x[:, 0]
            elif is_within_block:
                x[:, row] = x[:, 0]
            if is_its_own:
                for block in self._blocks[row]:
                    if block < layer:
                        x[:, row] += self._deltas[row, block]
        return x.flatten(0, 1)

    def _only_head(self, name: str, kind: str, out: Float[Tensor, "row pos head d"]) -> Tensor:
        """Where a row's reader is one head: q, k and v of the plain row but for that head."""
        by_row = self._by_row(out)
        for row, reader in self._readers.items():
            if reader == name or block_reader(reader) != name:
                continue
            _, _, _, head, kind_of_reader = reader.split(".")
            own = by_row[:, row].clone()
            by_row[:, row] = by_row[:, 0]
            if kind == kind_of_reader:
                by_row[:, row, :, int(head)] = own[:, :, int(head)]
                self._split.add(row)
        return by_row.flatten(0, 1)
