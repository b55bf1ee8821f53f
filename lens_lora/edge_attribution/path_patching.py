"""Path patching: runs in which one reader alone sees what a switch of a writer's gates makes.

Of the rows of a prompt the first is plain. In each other one the gates of a writer's sites differ,
those whose writes reach the reader; what this makes of the branches of a block is taken off the
stream at the block's end, so that each block reads the plain stream, and the sum is added to what
one reader reads. By tangents it is known beforehand whether a reader of a site's own block comes
after the site: rows of a batch differ by rounding anyway.

Cost: a forward pass a path, batched, and one with tangents if one is within a block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import LoraLens, Reading, ScaleInject, attached
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.forward import bar_of, in_chunks, require_finite
from lens_lora.edge_attribution.by_reader import Pass
from lens_lora.edge_attribution.readers import (
    LOGITS,
    block_reader,
    head_hooks,
    reader_layer,
    readers_shown,
    unknown_heads,
)
from lens_lora.errors import ArgumentError

_Pair = tuple[int, str]  # a site's index, and a reader


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


def patched_edges(
    lens: LoraLens, reading: Reading, paths: Sequence[Path], *, scale: float, progress: bool = True
) -> Float[Tensor, "batch path"]:
    """How g at this scale changes where one reader alone sees what a switch of the writer's gates
    makes of its branches, for each path. At most a forward pass a path, batched.
    """
    groups = memory.pass_groups(lens, reading, copies=2)  # a plain row beside a patched one
    values: list[Tensor] = []
    heard = _heard(lens, reading, paths, scale)
    with bar_of(len(heard) * len(groups), progress, "path patches") as bar:
        for group in groups:
            step = max(1, memory.rows_at_once(lens, group) - 1)
            chunks = (heard[start : start + step] for start in range(0, len(heard), step))
            runs = (_Paths(lens, group, chunk, scale) for chunk in chunks)
            values.append(in_chunks(runs, _Paths.effects, bar))
    return torch.cat(values)


def _heard(lens: LoraLens, reading: Reading, paths: Sequence[Path], scale: float) -> list[Path]:
    """The paths, of each writer those sites whose writes reach the reader.

    Of a site in the reader's own block it is seen in a pass with tangents, if there is any.

    Raises:
        ArgumentError: a reader that nothing of its writer reaches.
    """

    def is_in_own_block(site: int, reader: str) -> bool:
        return reader != LOGITS and lens.sites[site].layer == reader_layer(lens, reader)

    reached = set[_Pair]()
    if any(is_in_own_block(site, path.reader) for path in paths for site in path.sites):
        for group in memory.edge_groups(lens, reading, 1):
            reached |= Pass(lens, group.prompts, ()).within_blocks(group, lens.gates(scale))

    def is_heard(site: int, reader: str) -> bool:
        if is_in_own_block(site, reader):
            return (site, block_reader(reader)) in reached
        return lens.sites[site].layer <= reader_layer(lens, reader)

    heard: list[Path] = []
    for path in paths:
        sites = tuple(site for site in path.sites if is_heard(site, path.reader))
        if not sites:
            raise ArgumentError(
                f"{path.writer} → {path.reader}: nothing that the site writes reaches this "
                "reader; ll.edges(…).to_frame() has the readers of each site."
            )
        heard.append(dataclasses.replace(path, sites=sites))
    return heard


class _Paths:
    """One run: of n rows of each prompt the first is plain, each other one has a path.

    What a switch makes of the branches of one block is seen at its end, taken off the stream there,
    and kept. The reader gets the sum over blocks.
    """

    def __init__(
        self, lens: LoraLens, reading: Reading, paths: Sequence[Path], scale: float
    ) -> None:
        self._lens, self._reading = lens, reading
        self._gates = lens.gates(scale).repeat(1 + len(paths), 1)
        self._readers: dict[int, str] = {}  # of each row but the plain one
        self._blocks: dict[int, set[int]] = {}  # in which the row's sites are
        for row, path in enumerate(paths, 1):
            self._gates[row, list(path.sites)] = 1 - scale
            self._readers[row] = path.reader
            self._blocks[row] = {lens.sites[site].layer for site in path.sites}
        self._deltas: dict[tuple[int, int], Tensor] = {}  # of a row and a block
        self._split: set[int] = set()  # rows whose reader, a head, was run

    def effects(self) -> Float[Tensor, "batch path"]:
        """g of each path's row less that of the plain one. One forward pass of each row."""
        lens, host, layers = self._lens, self._lens.plan.host, range(self._lens.plan.host.n_layers)
        gates = self._gates.repeat(len(self._reading.owner), 1)
        begin = [(host.block_input(i), functools.partial(self._end, i)) for i in layers]
        by_head = {row: name for row, name in self._readers.items() if block_reader(name) != name}
        with (
            torch.no_grad(),
            lens.injected(ScaleInject(lens.plan, gates), before=begin),
            readers_shown(lens, self._read),
            attached(lens.model, head_hooks(lens, self._only_head) if by_head else []),
        ):
            values = function.read_value(lens, self._reading.repeat(len(self._gates)))
        require_finite(values, "the patched readout")
        for row, name in by_head.items():
            if row not in self._split:
                raise unknown_heads(block_reader(name))
        values = values.unflatten(0, (self._reading.batch, -1))
        return values[:, 1:] - values[:, :1]

    def _by_row(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, len(self._gates))).clone()

    def _end(self, layer: int, stream: Tensor, hook: Any) -> Tensor:
        """At a block's input: what the switch made of the block before is taken off the stream."""
        return self._taken_off(layer, self._by_row(stream)).flatten(0, 1)

    def _taken_off(self, layer: int, x: Tensor) -> Tensor:
        before = layer - 1
        for row, blocks in self._blocks.items():
            if before in blocks:
                # It is known where a reader of the same block has seen it.
                delta = self._deltas.setdefault((row, before), x[:, row] - x[:, 0])
                x[:, row] -= delta
        return x

    def _read(self, name: str, stream: Tensor) -> Tensor:
        layer, x = reader_layer(self._lens, name), self._by_row(stream)
        x = self._taken_off(layer, x) if name == LOGITS else x
        for row, reader in self._readers.items():
            is_it = block_reader(reader) == name
            is_within = name != LOGITS and layer in self._blocks[row]
            if is_within and is_it:
                self._deltas[row, layer] = x[:, row] - x[:, 0]
            elif is_within:
                x[:, row] = x[:, 0]
            if is_it:
                for block in self._blocks[row]:
                    if block < layer:
                        x[:, row] += self._deltas[row, block]
        return x.flatten(0, 1)

    def _only_head(self, name: str, kind: str, out: Tensor) -> Tensor:
        """Of q, k and v of a reader that is one head, the plain ones but for that head."""
        by_row = self._by_row(out)
        for row, reader in self._readers.items():
            if reader != name and block_reader(reader) == name:
                head, of_kind = reader.split(".")[3:]
                own = by_row[:, row].clone()
                by_row[:, row] = by_row[:, 0]
                if kind == of_kind:
                    by_row[:, row, :, int(head)] = own[:, :, int(head)]
                    self._split.add(row)
        return by_row.flatten(0, 1)
