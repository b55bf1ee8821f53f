"""Edges: ∂g/∂ε_l by what reads δ_l of the residual stream.

    a_l = Σ_m ⟨δ_l, G_m⟩      m: attention and MLP of every block downstream, the final norm last

δ_l is the derivative, by ε_l, of what the site's own branch adds to the stream x, at fixed x; G_m
is the gradient of g by a zero that is added to x for reader m alone, before its norm.

1. Readers are shown by one function, (name, x) → what it reads instead (`readers.py`).
2. One pass forward gives every δ_l (`Pass`). Each site has a tangent from its output on, beside
   the values (`site_tangents.py`). A reader's x loses its tangents, so nothing moves but the
   site's branch, and so does the stream at each block's input, where they are complete.
3. The way back through the graph of the values gives every G_m, and every a_l. By head, what comes
   back to q, k or v first goes on to x head by head, through these maps and their norm alone.
4. Σ_m is compared with a_l. What a model does beyond x + branch(norm(x)), a norm in the stream
   itself, a reader of another form, or a hook in between leaves a gap, and is refused.

Cost: one forward and one backward pass, in which no more than the rest of each branch has tangents;
by head, one way back through q, k and v for each head. Every δ_l is held until the way back is
done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import LoraLens, Prompts, Reading, ScaleInject, attached
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.duals import dual_level
from lens_lora.core.function.forward import bar_of
from lens_lora.core.function.reverse import Slopes, joined, site_gradients
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

_Pair = tuple[int, str]  # a site's index, and a reader


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
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, " site"],
    *,
    by_head: bool = False,
    by_position: bool = False,
    progress: bool = True,
) -> EdgeValues:
    """⟨δ_l, G_m⟩ of every site and reader. A forward pass with tangents, and a backward pass."""
    groups = memory.edge_groups(lens, reading, sum(map(lens.heads.of, QKV)) if by_head else 1)
    with bar_of(len(groups), progress, "edges") as bar:
        parts: list[EdgeValues] = []
        for group in groups:
            parts.append(_of_group(lens, group, gates, by_head, by_position))
            bar.update(1)
    values, value = joined([part.values for part in parts]), [part.value for part in parts]
    return dataclasses.replace(parts[0], values=values, value=torch.cat(value))


def _of_group(
    lens: LoraLens, reading: Reading, gates: Tensor, by_head: bool, by_position: bool
) -> EdgeValues:
    both_ways = Pass(lens, reading.prompts, ("position",) if by_position else ())
    value = both_ways.run(reading, gates, by_head)
    gradients = both_ways.gradients(by_head)
    by_row, exists = both_ways.edges(gradients, by_position)
    values, first = reading.by_prompt(by_row), both_ways.slopes.by_prompt(reading)
    # The final norm and the unembedding write to the logits.
    after = [i for i, site in enumerate(lens.sites) if site.layer >= lens.plan.host.n_layers]
    values[:, after, -1] = first[:, after]
    exists[after, -1] = True
    _require_sum(lens, *((values.sum(3), first.sum(2)) if by_position else (values, first)))
    return EdgeValues(tuple(gradients), values, exists, value)


# Of a site whose numbers are less than this share of the largest, rounding may be all.
_SMALL = 1e-3


def _require_sum(
    lens: LoraLens, values: Float[Tensor, "batch site reader"], first: Float[Tensor, "batch site"]
) -> None:
    """Check that Σ_m ⟨δ_l, G_m⟩ = a_l."""
    sums, size = values.sum(2), values.abs().sum(2) + first.abs()
    size = torch.maximum(size, _SMALL * size.amax(1, keepdim=True))
    apart = (~((sums - first).abs() <= lens.eps**0.5 * size)).nonzero().tolist()
    if apart:
        row, site = apart[0]
        raise ModelStateError(
            f"{lens.sites[site].name}: its edges sum to {float(sums[row, site]):.6g}, and its "
            f"first order is {float(first[row, site]):.6g}: something reads or changes the "
            f"residual stream beside attention, MLP and final norm, in this model's "
            f"{type(lens.model.blocks[0]).__name__} or in a hook of yours. Take such hooks off, "
            "or use ll.first_order."
        )


class Pass:
    """A pass forward, in which each site has a tangent up to the end of its block, and back.

    Attributes:
        readers: G_m of every reader, in the order of a forward pass.
        heads: G_m of each head's q, k and v.
        slopes: a_l.
    """

    def __init__(self, lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> None:
        self._lens, self._shape, host = lens, prompts.tokens.shape, lens.plan.host
        self._ends = [(host.block_input(layer), self._end) for layer in range(host.n_layers)]
        self.readers: dict[str, Tensor] = {}
        self.heads: dict[str, Tensor] = {}
        self.slopes = Slopes(lens, prompts, axes)
        # δ by site, the first of the readers that see it, and whether that is the only one.
        self._written: list[tuple[dict[int, Tensor], int, bool]] = []
        self._seen: dict[str, list[Tensor]] = {}
        # Whether the way back has begun, and whether it is that of one head.
        self._is_back = self._is_split = False

    def run(self, reading: Reading, gates: Tensor, by_head: bool) -> Float[Tensor, " batch"]:
        """One forward and one backward pass; returns g."""
        lens, hooks = self._lens, [*self._ends]
        hooks += head_hooks(lens, self._of_head) if by_head else []
        inject = _TangentInject(lens, gates)
        lens.plan.check_backward(once=False)  # the tangents end where a block is run again
        with dual_level(), readers_shown(lens, self._read), attached(lens.model, hooks):
            return site_gradients(lens, reading, gates, self._visit, inject, value_of)

    @torch.no_grad()
    def within_blocks(self, reading: Reading, gates: Tensor) -> set[_Pair]:
        """The readers that see what a site of their own block writes. One forward pass."""
        lens, ends = self._lens, attached(self._lens.model, self._ends)
        injected = lens.injected(_TangentInject(lens, gates))
        with dual_level(), readers_shown(lens, self._read), ends, injected:
            function.read_value(lens, reading)
        names = list(self.readers)
        alone = [(names[first], held) for held, first, is_alone in self._written if is_alone]
        return {(site, name) for name, tangents in alone for site in tangents}

    def _visit(self, *shown: Any) -> None:
        if not self._is_split:
            self.slopes.visit(*shown)

    def _end(self, stream: Tensor, hook: Any) -> Tensor:
        """At a block's input: the tangents are complete, and end here."""
        self._write(stream, is_alone=False)
        return value_of(stream)

    def _read(self, name: str, x: Tensor) -> Tensor:
        """A reader within the block sees what was written so far, and passes none of it on."""
        if self._is_back:
            return value_of(x)
        if name not in self.readers:
            self._write(x, is_alone=True)
            self.readers[name] = x.new_zeros(()).expand(*self._shape, x.shape[-1])
        x = value_of(x)
        seen = x.view_as(x)
        self._seen.setdefault(name, []).append(seen)
        if seen.requires_grad:  # else nothing that is adapted lies before it
            seen.register_hook(functools.partial(self._add, name))
        return seen

    def _write(self, x: Tensor, is_alone: bool) -> None:
        if tangents := tangents_of(x):
            self._written.append((tangents, len(self.readers), is_alone))

    def _add(self, name: str, gradient: Tensor) -> None:
        self._is_back = True
        if not self._is_split:
            self.readers[name] = self.readers[name] + gradient.view(*self._shape, -1)

    def _of_head(self, name: str, kind: str, out: Float[Tensor, "row pos head d"]) -> Tensor:
        split, heads = out.view_as(out), [f"{name}.{head}.{kind}" for head in range(out.shape[2])]
        if not self._is_back:
            self.heads |= dict.fromkeys(heads, self.readers[name])  # so far zero
            if split.requires_grad:
                split.register_hook(functools.partial(self._split, name, heads, value_of(out)))
        return split

    def _split(self, name: str, heads: Sequence[str], out: Tensor, covectors: Tensor) -> None:
        """What each head's share goes back to, through the map and the norm alone."""
        self._is_split = True
        for head, known_as in enumerate(heads):
            only = torch.zeros_like(out)
            only[:, :, head] = covectors[:, :, head]
            # A HookedTransformer reads x three times, once for each of q, k and v.
            parts = torch.autograd.grad(
                out, self._seen[name], only, retain_graph=True, materialize_grads=True
            )
            self.heads[known_as] = torch.stack(parts).sum(0).view(*self._shape, -1)
        self._is_split = False

    def gradients(self, by_head: bool) -> dict[str, Tensor]:
        """G_m of the readers that are asked for."""
        known, chosen = self.readers | self.heads, dict[str, Tensor]()
        for name in self.readers:
            for reader in head_readers(self._lens, name) if by_head else [name]:
                if reader not in known:
                    raise unknown_heads(name)
                chosen[reader] = known[reader]
        return chosen

    def edges(
        self, gradients: Mapping[str, Tensor], by_position: bool
    ) -> tuple[Float[Tensor, "row site reader *position"], Bool[Tensor, "site reader"]]:
        """⟨δ_l, G_m⟩, and whether the reader is downstream of the site. No pass."""
        lens, blocks, names = self._lens, list(map(block_reader, gradients)), list(self.readers)
        held = [gradient.to(lens.device, lens.gate_dtype) for gradient in gradients.values()]
        stacked, (batch, longest) = torch.stack(held, 1), self._shape
        shape = (batch, len(lens.sites), len(blocks), *[longest] * by_position)
        values = stacked.new_zeros(shape)
        exists = torch.zeros(shape[1:3], dtype=torch.bool)
        for tangents, reader, is_alone in self._written:
            first = blocks.index(names[reader])
            end = first + blocks.count(names[reader]) if is_alone else len(blocks)
            deltas = torch.stack([t.reshape(batch, longest, -1) for t in tangents.values()], 1)
            deltas, seen, sites = deltas.to(stacked), stacked[:, first:end], list(tangents)
            if by_position:
                split = torch.einsum("bspd,bmpd->bsmp", deltas, seen)
            else:
                split = deltas.flatten(2) @ seen.flatten(2).mT
            values[:, sites, first:end] = split
            exists[sites, first:end] = True
        return values, exists


class _TangentInject:
    """out + ε_l ΔW_l z_l, where the sites of the blocks have a tangent from here on."""

    def __init__(self, lens: LoraLens, gates: Float[Tensor, " site"]) -> None:
        self._scaled, self._lens, self._at = ScaleInject(lens.plan, gates), lens, gates.tolist()

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        """The same as in a scaled run, with δ in the site's tangent."""
        moved = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._at[injection.partner]
        is_late = self._lens.sites[injection.site].layer >= self._lens.plan.host.n_layers
        if is_late or not weight:
            return moved
        moved = out if moved is None else moved
        with torch.no_grad():
            delta = injection.map.write(injection.map.coordinates(value_of(z)))
            delta, tangents = (weight * delta).to(out.dtype).view(out.shape), tangents_of(moved)
            if injection.site in tangents:
                delta = tangents[injection.site] + delta
        return moving(value_of(moved), {**tangents, injection.site: delta})
