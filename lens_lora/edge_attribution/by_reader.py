"""First order of each site, split by what reads its write: one pass forward and one back.

    a_l = Σ_m ⟨δ_l, G_m⟩      m: attention and MLP of every block downstream, the final norm last

Let x be the residual stream. δ_l is the derivative, by ε_l, of what the site's own branch
(attention or MLP) adds to x, with x held fixed. G_m is the gradient of g by a zero that is added to
x for reader m alone, before its norm.

1. Each reader is shown x by one function, (name, x) → what it reads instead (`readers.py`).
2. One pass forward gives every δ_l. Each site has a tangent beside the values from its output on
   (`site_tangents.py`). What a reader sees has no tangents any more, so that δ_l is the site's own
   branch and nothing that reads it. At the end of a block the tangents are complete, and end there.
3. The way back through the graph of the values gives every G_m, and every a_l. By head, the
   gradient at q, k or v goes on to x one head at a time, through these maps and their norm alone.
4. Σ_m ⟨δ_l, G_m⟩ is compared with a_l. A model that does more than x + branch(norm(x)), such as a
   norm in the stream itself, or a hook in between leaves a gap, and is refused.

Cost: one forward and one backward pass, in which each site has a tangent through the rest of its
branch. By head there is one more way back through q, k and v for each head. Every δ_l is held until
the way back is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import Function, HookFn, Injection, LoraLens, ScaleInject, attached
from lens_lora.core.function.duals import dual_level
from lens_lora.core.function.forward import bar_of
from lens_lora.core.function.reverse import Slopes, joined
from lens_lora.edge_attribution.readers import (
    QKV,
    block_reader,
    head_hooks,
    head_readers,
    readers_shown,
    unknown_heads,
)
from lens_lora.edge_attribution.site_tangents import moving, tangents_of, value_of
from lens_lora.errors import ModelStateError

# Of a site whose numbers are less than this share of the largest, rounding may be all.
_SMALL = 1e-3

_Stream = Float[Tensor, "row pos d"]


@dataclasses.dataclass(frozen=True)
class EdgeValues:
    """All edges of some prompts.

    Attributes:
        readers: their names, in the order of a forward pass.
        values: ⟨δ_l, G_m⟩, zero where the reader is not downstream.
        exists: whether the reader is downstream of the site.
        value: g at the gates.
    """

    readers: tuple[str, ...]
    values: Float[Tensor, "batch site reader *position"]
    exists: Bool[Tensor, "site reader"]
    value: Float[Tensor, " batch"]


def edge_values(
    g: Function, at: float, *, by_head: bool = False, by_position: bool = False
) -> EdgeValues:
    """⟨δ_l, G_m⟩ of every site and reader. A forward pass with tangents, and a backward pass.

    Args:
        g: the function, with a readout.
        at: the gate value of every site.
        by_head: whether attention is split into what each head's q, k and v reads.
        by_position: whether each edge is split over the tokens at which it is read.

    Raises:
        ModelStateError: edges that do not sum to first order, or heads that are not known.
    """
    groups = g.groups(graph=True, beside=held_bytes(g, by_head))
    with bar_of(len(groups), g.progress, "edges") as bar:
        parts: list[EdgeValues] = []
        for group in groups:
            parts.append(_of_group(group, at, by_head, by_position))
            bar.update(1)
    return EdgeValues(
        readers=parts[0].readers,
        values=joined([part.values for part in parts]),
        exists=parts[0].exists,
        value=torch.cat([part.value for part in parts]),
    )


def held_bytes(g: Function, by_head: bool = False) -> int:
    """What is held of a row beside its graph: each site's δ, and the gradient of each reader."""
    lens = g.lens
    of_attention = sum(lens.heads.of(kind) for kind in QKV) if by_head else 1
    streams = len(lens.sites) + lens.plan.host.n_layers * (1 + of_attention)
    longest = g.rows.tokens.shape[1]
    return streams * longest * int(lens.model.cfg.d_model) * lens.gate_dtype.itemsize


def _of_group(g: Function, at: float, by_head: bool, by_position: bool) -> EdgeValues:
    """Those of prompts that go through the model together."""
    lens = g.lens
    both_ways = Pass(g, ("position",) if by_position else ())
    value = both_ways.run(at, by_head)
    gradients = both_ways.gradients(by_head)
    by_row, exists = both_ways.edges(gradients, by_position)
    values = g.reading.by_prompt(by_row)
    first_order = both_ways.slopes.by_prompt(g.reading)
    # Sites behind the blocks (final norm and unembedding) write to the logits alone.
    behind = [i for i, site in enumerate(lens.sites) if site.layer >= lens.plan.host.n_layers]
    values[:, behind, -1] = first_order[:, behind]
    exists[behind, -1] = True
    if by_position:
        _require_sum(lens, values.sum(3), first_order.sum(2))
    else:
        _require_sum(lens, values, first_order)
    return EdgeValues(tuple(gradients), values, exists, value)


def _require_sum(
    lens: LoraLens,
    values: Float[Tensor, "batch site reader"],
    first_order: Float[Tensor, "batch site"],
) -> None:
    """Check that Σ_m ⟨δ_l, G_m⟩ = a_l."""
    sums = values.sum(2)
    size = values.abs().sum(2) + first_order.abs()
    size = torch.maximum(size, _SMALL * size.amax(1, keepdim=True))
    is_equal = (sums - first_order).abs() <= lens.eps**0.5 * size
    apart = (~is_equal).nonzero().tolist()
    if not apart:
        return
    row, site = apart[0]
    raise ModelStateError(
        f"{lens.sites[site].name}: its edges sum to {float(sums[row, site]):.6g}, and its "
        f"first order is {float(first_order[row, site]):.6g}: something reads or changes the "
        f"residual stream beside attention, MLP and final norm, in this model's "
        f"{type(lens.model.blocks[0]).__name__} or in a hook of yours",
        remedy="Take such hooks off, or use ll.first_order.",
    )


class _Written(NamedTuple):
    """What sites had written to the stream at one place of the pass.

    Attributes:
        deltas: δ_l by site.
        reader: the index of the first reader that sees it.
        is_within_block: whether that reader is in the sites' own block, in the middle of which the
            place is; later blocks get what stands at this block's end.
    """

    deltas: dict[int, _Stream]
    reader: int
    is_within_block: bool


class Pass:
    """A pass forward, in which each site has a tangent up to the end of its block, and back.

    Attributes:
        readers: G_m of every reader, in the order of a forward pass.
        heads: G_m of each head's q, k and v.
        slopes: a_l.
    """

    def __init__(self, g: Function, axes: tuple[str, ...] = ()) -> None:
        self._g = g
        self._lens = g.lens
        self._shape = g.rows.tokens.shape
        self.readers: dict[str, _Stream] = {}
        self.heads: dict[str, _Stream] = {}
        self.slopes: Slopes = Slopes(g.lens, g.rows, axes)
        self._written: list[_Written] = []
        # What each reader saw, once for each time that it ran.
        self._seen: dict[str, list[Tensor]] = {}
        # Whether the way back has begun, and whether it is that of one head.
        self._is_back = False
        self._is_of_head = False

    @contextlib.contextmanager
    def _hooks(self, by_head: bool = False) -> Generator[None]:
        """Within the block readers are shown what they read, and tangents end with their block."""
        lens = self._lens
        host = lens.plan.host
        hooks: list[tuple[str, HookFn]] = [
            (host.block_input(layer), self._end_block) for layer in range(host.n_layers)
        ]
        if by_head:
            hooks += head_hooks(lens, self._read_heads)
        with dual_level(), readers_shown(lens, self._read), attached(lens.model, hooks):
            yield

    def run(self, at: float, by_head: bool) -> Float[Tensor, " batch"]:
        """One forward and one backward pass; returns g."""
        lens = self._lens
        gates = lens.gates(at)
        write = _WriteWithTangent(lens, gates)
        lens.plan.check_backward(once=False)  # The tangents end where a block is run again.
        return self._g.visit(
            self._visit, gates, write=write, primal=value_of, under=self._hooks(by_head)
        )

    def within_blocks(self, at: float) -> set[tuple[int, str]]:
        """The (site, reader) in one block whose reader sees the site's write. One forward pass."""
        write = _WriteWithTangent(self._lens, self._lens.gates(at))
        self._g.observe(write, under=self._hooks())
        names = list(self.readers)
        found: set[tuple[int, str]] = set()
        for written in self._written:
            if written.is_within_block:
                found.update((site, names[written.reader]) for site in written.deltas)
        return found

    # --- On the way forward

    def _end_block(self, stream: Tensor, hook: Any) -> Tensor:
        """At the next block's input the tangents of a block are complete, and end."""
        del hook
        self._keep_written(stream, is_within_block=False)
        return value_of(stream)

    def _read(self, name: str, x: Tensor) -> Tensor:
        """What a reader sees: x without its tangents, whose gradient is kept on the way back."""
        if self._is_back:
            return value_of(x)
        if name not in self.readers:
            self._keep_written(x, is_within_block=True)
            self.readers[name] = x.new_zeros(()).expand(*self._shape, x.shape[-1])
        value = value_of(x)
        seen = value.view_as(value)
        self._seen.setdefault(name, []).append(seen)
        if seen.requires_grad:  # Else nothing that is adapted lies before it.
            seen.register_hook(functools.partial(self._add_gradient, name))
        return seen

    def _keep_written(self, x: Tensor, is_within_block: bool) -> None:
        deltas = tangents_of(x)
        if deltas:
            self._written.append(_Written(deltas, len(self.readers), is_within_block))

    def _read_heads(self, name: str, kind: str, out: Float[Tensor, "row pos head d"]) -> Tensor:
        """At a complete q, k or v: on the way back its gradient goes on head by head."""
        split = out.view_as(out)
        if self._is_back:
            return split
        heads = [f"{name}.{head}.{kind}" for head in range(out.shape[2])]
        self.heads |= dict.fromkeys(heads, self.readers[name])  # So far zero.
        if split.requires_grad:
            split.register_hook(functools.partial(self._split, name, heads, value_of(out)))
        return split

    # --- On the way back

    def _visit(
        self, injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor
    ) -> None:
        if not self._is_of_head:
            self.slopes.visit(injection, weight, gradient, z)

    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        self._is_back = True
        if not self._is_of_head:
            self.readers[name] = self.readers[name] + gradient.view(*self._shape, -1)

    def _split(
        self,
        name: str,
        heads: Sequence[str],
        out: Float[Tensor, "row pos head d"],
        gradient: Float[Tensor, "row pos head d"],
    ) -> None:
        """What each head's share of the gradient goes back to, through the map and the norm."""
        self._is_of_head = True
        for index, head in enumerate(heads):
            of_head = torch.zeros_like(out)
            of_head[:, :, index] = gradient[:, :, index]
            # A HookedTransformer shows x three times, once for each of q, k and v.
            by_showing = torch.autograd.grad(
                out, self._seen[name], of_head, retain_graph=True, materialize_grads=True
            )
            self.heads[head] = torch.stack(by_showing).sum(0).view(*self._shape, -1)
        self._is_of_head = False

    # --- After it

    def gradients(self, by_head: bool) -> dict[str, _Stream]:
        """G_m of the readers that are asked for, in the order of a forward pass.

        Raises:
            ModelStateError: an attention whose heads are not known.
        """
        if not by_head:
            return dict(self.readers)
        known = self.readers | self.heads
        chosen: dict[str, Tensor] = {}
        for name in self.readers:
            for reader in head_readers(self._lens, name):
                if reader not in known:
                    raise unknown_heads(name)
                chosen[reader] = known[reader]
        return chosen

    def edges(
        self, gradients: Mapping[str, _Stream], by_position: bool
    ) -> tuple[Float[Tensor, "row site reader *position"], Bool[Tensor, "site reader"]]:
        """⟨δ_l, G_m⟩, and whether the reader is downstream of the site. No pass."""
        lens = self._lens
        rows, longest = self._shape
        names = list(self.readers)
        # Of each reader asked for, the one that it is or is a head of.
        owners = [block_reader(name) for name in gradients]
        held = [gradient.to(lens.device, lens.gate_dtype) for gradient in gradients.values()]
        stacked = torch.stack(held, 1)
        shape = (rows, len(lens.sites), len(owners))
        values = stacked.new_zeros((*shape, longest) if by_position else shape)
        exists = torch.zeros(shape[1:], dtype=torch.bool)
        for deltas, reader, is_within_block in self._written:
            owner = names[reader]
            first = owners.index(owner)
            end = first + owners.count(owner) if is_within_block else len(owners)
            sites = list(deltas)
            written = torch.stack([d.reshape(rows, longest, -1) for d in deltas.values()], 1)
            written = written.to(stacked)
            seen = stacked[:, first:end]
            if by_position:
                products = torch.einsum("bspd,bmpd->bsmp", written, seen)
            else:
                products = written.flatten(2) @ seen.flatten(2).mT
            values[:, sites, first:end] = products
            exists[sites, first:end] = True
        return values, exists


class _WriteWithTangent:
    """out + ε_l ΔW_l z_l, where the sites of the blocks have the tangent ΔW_l z_l from here on."""

    def __init__(self, lens: LoraLens, gates: Float[Tensor, " site"]) -> None:
        self._lens = lens
        self._scaled = ScaleInject(lens.plan, gates)
        self._gates: list[float] = gates.tolist()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """The same as in a scaled run, with δ in the site's tangent."""
        scaled = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._gates[injection.partner]
        layer = self._lens.sites[injection.site].layer
        if layer >= self._lens.plan.host.n_layers or not weight:
            return scaled
        moved = out if scaled is None else scaled
        tangents = tangents_of(moved)
        with torch.no_grad():
            delta = injection.map.write(injection.map.coordinates(value_of(z)))
            delta = (weight * delta).to(out.dtype).view(out.shape)
            if injection.site in tangents:
                delta = tangents[injection.site] + delta
        return moving(value_of(moved), {**tangents, injection.site: delta})
