"""Edges: ∂g/∂ε_l by what reads δ_l of the residual stream, and runs in which one reader sees it.

    a_l = Σ_m ⟨δ_l, G_m⟩      m: attention and MLP of every block downstream, the final norm last

δ_l is the derivative, by ε_l, of what the site's own branch adds to the stream x, at fixed x; G_m
is the gradient of g by a zero that is added to x for reader m alone, before its norm.

1. Readers are shown by one function, (name, x) → what it reads instead (`readers_shown`). Where a
   norm feeds several modules, each gets a run of the norm of its own.
2. One pass forward gives every δ_l (`_Pass`). Each site has a tangent from its output on, beside
   the values (`core/function/duals.py`). A reader's x loses its tangents, so nothing moves but the
   site's branch, and so does the stream at each block's input, where they are complete.
3. The way back through the graph of the values gives every G_m, and every a_l. By head, what comes
   back to q, k or v first goes on to x head by head, through these maps and their norm alone.
4. Σ_m is compared with a_l. What a model does beyond x + branch(norm(x)), a norm in the stream
   itself, a reader of another form, or a hook in between leaves a gap, and is refused.
5. `patched_edges` has a difference in place of the derivative. Of the rows of a prompt the first is
   plain. In each other one the gates of a writer's sites differ, those whose writes reach the
   reader; what this makes of the branches of a block is taken off the stream at the block's end, so
   that each block reads the plain stream, and the sum is added to what one reader reads. By
   tangents it is known beforehand whether a reader of a site's own block comes after the site: rows
   of a batch differ by rounding anyway.

Cost: one forward and one backward pass, in which no more than the rest of each branch has tangents;
by head, one way back through q, k and v for each head. Every δ_l is held until the way back is
done. Patched: a forward pass a path, batched, and one with tangents if one is within a block.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lens_lora.compat import Temporary, temporary
from lens_lora.core import HookFn, LoraLens, Prompts, Reading, ScaleInject, attached
from lens_lora.core.function import forward as function
from lens_lora.core.function import memory
from lens_lora.core.function.duals import dual_level, moving, tangents_of, value_of
from lens_lora.core.function.forward import bar_of, in_chunks, require_finite
from lens_lora.core.function.interventions import head_points
from lens_lora.core.function.reverse import Slopes, joined, site_gradients
from lens_lora.core.model.hooks import add_pre_hook, add_to_module
from lens_lora.core.model.host import COPIED_INPUTS
from lens_lora.core.model.modules import is_linear, unwrapped
from lens_lora.errors import ArgumentError, ModelStateError

LOGITS = "logits"
_Pair = tuple[int, str]  # a site's index, and a reader
_QKV = "q", "k", "v"
# What ran last among the norms of a block: (output, norm, x). Two run before the first branch where
# each branch has its own, and one of them once more for a reader.
_Runs = collections.deque[tuple[Tensor, nn.Module, Tensor]]
_LAST_RUNS = 3


# --- Readers


@temporary
def readers_shown(span: Temporary, lens: LoraLens, read: Callable[[str, Tensor], Tensor]) -> None:
    """Until the span ends, every reader of the residual stream x reads `read(name, x)`.

    In the first pass a norm that feeds a reader runs once more, on what `read` returns, as it may
    feed others too. The host keeps which norm that was, and from then on what a norm reads for a
    single reader is changed instead.
    """
    model, host, begun = lens.model, lens.plan.host, set[str]()
    for flag in COPIED_INPUTS:
        if getattr(model.cfg, flag, False):
            raise ModelStateError(
                f"cfg.{flag} is on, and each head reads a copy of the residual stream. Turn it off "
                "before you make the lens; readers='head' needs no such flag."
            )

    def show(name: str, place: nn.Module, runs: _Runs) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            tensor = args[0] if args else kwargs.get("hidden_states")
            norm, x = next(((norm, x) for out, norm, x in runs if out is tensor), (None, tensor))
            # A linear map that reads no norm is a part of something else, and some models norm the
            # embedding by the same module as the end.
            is_part = norm is None and is_linear(unwrapped(module))
            if not isinstance(x, Tensor) or is_part or (name == LOGITS and not begun):
                return None
            begun.add(name)
            host.read_through.setdefault(name, norm)
            seen = read(name, x)
            seen = seen if norm is None else norm(seen)
            if args:
                return (seen, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": seen}

        add_pre_hook(span, place, hook, with_kwargs=True)

    feeds = collections.Counter(host.read_through.values())
    for layer in range(host.n_layers):
        readers, norms = host.stream_readers(layer)
        alone, runs = {norm for norm in norms if feeds[norm] == 1}, _Runs(maxlen=_LAST_RUNS)
        for norm in set(norms) - alone:
            add_to_module(span, norm, _Keep(norm, runs), is_first=False)
        for name, module in readers.items():
            norm = host.read_through.get(name)
            show(name, norm if norm is not None and norm in alone else module, runs)
    if host.final_norm is None:
        raise ModelStateError(
            "this model has no norm between its blocks and its head, before which edges to the "
            "logits end.",
            remedy="Use ll.first_order, by site and position.",
        )
    show(LOGITS, host.final_norm, _Runs())


@dataclasses.dataclass(eq=False, repr=False)
class _Keep:
    """A forward hook of a norm."""

    norm: nn.Module
    runs: _Runs

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> None:
        self.runs.append((output, self.norm, args[0]))


def block_reader(name: str) -> str:
    """'blocks.5.attn' of 'blocks.5.attn.3.q'; the name itself of any other reader."""
    return ".".join(name.split(".")[:3])


def reader_layer(lens: LoraLens, name: str) -> int:
    """The block that a reader is in; the number of blocks for the logits."""
    return lens.plan.host.n_layers if name == LOGITS else int(name.split(".")[1])


def head_readers(lens: LoraLens, name: str) -> list[str]:
    """The readers that one is split into by head: itself, if it is no attention."""
    if name.rpartition(".")[2] != "attn":
        return [name]
    return [f"{name}.{head}.{kind}" for kind in _QKV for head in range(lens.heads.of(kind))]


def _head_hooks(
    lens: LoraLens, change: Callable[[str, str, Float[Tensor, "row pos head d"]], Tensor]
) -> list[tuple[str, HookFn]]:
    """Hooks where q, k and v of every block are complete: (attention, kind, tensor) → tensor."""

    def hook_fn(name: str, kind: str, tensor: Tensor, hook: Any) -> Tensor:
        rows, heads = tensor.flatten(2), lens.heads.of(kind)
        if rows.shape[-1] != heads * lens.heads.d_head:
            raise _unknown_heads(name)
        return change(name, kind, rows.unflatten(2, (heads, -1))).reshape(tensor.shape)

    points = head_points(lens, _QKV)
    return [(at, functools.partial(hook_fn, block_reader(at), kind)) for at, kind in points.items()]


def _unknown_heads(name: str) -> ModelStateError:
    return ModelStateError(
        f"{name}: this attention has no q, k and v with the model's n_heads and d_head at their "
        "hook points, so it cannot be split by head. Use readers='block'."
    )


# --- Values


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
    groups = memory.edge_groups(lens, reading, sum(map(lens.heads.of, _QKV)) if by_head else 1)
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
    both_ways = _Pass(lens, reading.prompts, ("position",) if by_position else ())
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


class _Pass:
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
        hooks += _head_hooks(lens, self._of_head) if by_head else []
        inject = _TangentInject(lens, gates)
        lens.plan.check_backward(once=False)  # the tangents end where a block is run again
        with dual_level(), readers_shown(lens, self._read), attached(lens.model, hooks):
            return site_gradients(lens, reading, gates, self._visit, inject)

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
                    raise _unknown_heads(name)
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


# --- Path patching


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
            reached |= _Pass(lens, group.prompts, ()).within_blocks(group, lens.gates(scale))

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
            attached(lens.model, _head_hooks(lens, self._only_head) if by_head else []),
        ):
            values = function.read_value(lens, self._reading.repeat(len(self._gates)))
        require_finite(values, "the patched readout")
        for row, name in by_head.items():
            if row not in self._split:
                raise _unknown_heads(block_reader(name))
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
