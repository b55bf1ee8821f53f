"""Tangents kept apart by site, position, head or rank: each part in a row of its own.

    row of part p:  output_l ← output_l + d·(p's part of δ_l(z)),  d dual with derivative 1

Before its block a part has no tangent, and its row would only repeat the base. So a pass starts
with one row, which carries none; at each block's input the batch grows by that block's parts,
copies of the first row (as `calculus/tree.py` grows it). Every site of a model in turn costs about
half of the rows that it would cost to carry each from the embeddings.

Where a model's batch cannot grow, and for parts of the embeddings, every row starts at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.calculus.contract import part_delta
from lens_lora.calculus.forward import dual_forward, tangent_of
from lens_lora.calculus.function import chunk_rows, read_logits
from lens_lora.hooked.gates import HookFn, ScaleInject, attached
from lens_lora.hooked.plan import Injection
from lens_lora.lens import LoraLens
from lens_lora.prompts import Prompts

__all__ = ["Part", "part_tangents"]

Through = Callable[[Float[Tensor, "rows vocab"]], Float[Tensor, "rows *out"]]
_Logits = Float[Tensor, "batch part vocab"]
_TOKENS_AT_ONCE, _LOGITS_AT_ONCE = 8192, 2**26


@dataclasses.dataclass(frozen=True)
class Part:
    """A direction in gate space: one site, perhaps only one of its positions, heads or ranks."""

    site: int
    position: int | None = None
    head: int | None = None
    rank: int | None = None


def part_tangents(
    lens: LoraLens,
    prompts: Prompts,
    at: Float[Tensor, "site"],
    parts: Sequence[Part],
    through: Through,
    *,
    keep: Callable[[Tensor], Tensor] = lambda tangent: tangent,
    progress: bool = True,
) -> Float[Tensor, "batch part *out"]:
    """The tangent of each part, pushed through `through` (vocabulary columns, or a readout).

    `keep` then says what of each tangent is kept ([batch, …] → [batch, …]).

    As many dual forward passes as parts, batched in rows; about half where the batch can grow.
    """
    order = sorted(range(len(parts)), key=lambda j: lens.sites[parts[j].site].layer)
    branching, whole = [], []
    for j in order:
        starts_in_block = lens.plan.view.grows and lens.sites[parts[j].site].layer >= 0
        (branching if starts_in_block else whole).append(j)
    found: dict[int, Tensor] = {}
    ways = ((whole, _in_rows, chunk_rows(prompts)), (branching, _branching, _rows(lens, prompts)))
    with tqdm(total=len(parts), desc="tangents", leave=False, disable=not progress) as bar:
        for some, run, step in ways:
            for start in range(0, len(some), step):
                chunk = some[start : start + step]
                with dual_forward():
                    rows = run(lens, prompts, at, [parts[j] for j in chunk])
                    for column, j in enumerate(chunk):
                        found[j] = keep(tangent_of(through(rows[:, column])))
                bar.update(len(chunk))
    return torch.stack([found[j] for j in range(len(parts))], 1)


def _rows(lens: LoraLens, prompts: Prompts) -> int:
    """How many parts at once: bounded in tokens of one prompt, and in logits of all prompts."""
    batch, longest = prompts.tokens.shape
    logits = batch * int(lens.model.cfg.d_vocab_out)
    return max(1, min(_TOKENS_AT_ONCE // longest, _LOGITS_AT_ONCE // logits))


def _in_rows(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, "site"], parts: Sequence[Part]
) -> _Logits:
    """Every part of every prompt in a row of one batch, from the embeddings on."""
    rows = [(b * len(parts) + j, p) for b in range(prompts.batch) for j, p in enumerate(parts)]
    many = prompts.repeat(len(parts))
    with lens.injected(_PartsInject(lens, at, rows, many.lengths)):
        return read_logits(lens, many).view(prompts.batch, len(parts), -1)


def _branching(
    lens: LoraLens, prompts: Prompts, at: Float[Tensor, "site"], parts: Sequence[Part]
) -> _Logits:
    """One prompt at a time, without its padding; each part's row begins at its block."""
    found = []
    rows = list(enumerate(parts, start=1))
    for one in map(prompts.row, range(prompts.batch)):
        lengths = one.lengths.expand(len(parts) + 1)
        with _growing(lens, parts), lens.injected(_PartsInject(lens, at, rows, lengths)):
            found.append(read_logits(lens, one)[1:])
    return torch.stack(found)


@contextlib.contextmanager
def _growing(lens: LoraLens, parts: Sequence[Part]) -> Generator[None]:
    """Rows for each block's parts, which must come in the order of blocks, behind those so far."""
    view = lens.plan.view
    last = view.n_layers - 1
    blocks = [min(lens.sites[part.site].layer, last) for part in parts]
    hooks = [
        (view.block_input(layer), _grown(blocks.count(layer))) for layer in sorted(set(blocks))
    ]
    with attached(lens.model, hooks):
        yield


def _grown(count: int) -> HookFn:
    def grow(tensor: Tensor, hook: Any) -> Tensor:
        del hook
        first = fwad.unpack_dual(tensor[:1]).primal.expand(count, *tensor.shape[1:])
        return torch.cat([tensor, first])

    return grow


class _PartsInject:
    """Some rows of the batch move along a part each; every row runs at the gates `at`."""

    def __init__(
        self,
        lens: LoraLens,
        at: Float[Tensor, "site"],
        rows: Sequence[tuple[int, Part]],
        lengths: Int[Tensor, "row"],
    ) -> None:
        self._scaled, self._at = ScaleInject(lens.plan, at), at.tolist()
        self._lens, self._lengths = lens, lengths
        self._rows: dict[int, list[tuple[int, Part]]] = {}
        for row, part in rows:
            self._rows.setdefault(part.site, []).append((row, part))

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        moved = self._scaled(index, out, z)
        injection = self._lens.plan.injections[index]
        weight = 1.0 if injection.partner is None else self._at[injection.partner]
        rows = self._rows.get(injection.site)
        if rows is None or not weight:
            return moved
        primal = fwad.unpack_dual(z).primal
        delta = out.new_zeros(*z.shape[:2], out.flatten(2).shape[-1])
        for row, part in rows:
            delta[row] = weight * self._part(injection, part, primal[row], row).to(out.dtype)
        moved = out if moved is None else moved
        return moved + fwad.make_dual(torch.zeros_like(out), delta.view(out.shape))

    def _part(
        self, injection: Injection, part: Part, z: Tensor, row: int
    ) -> Float[Tensor, "pos out"]:
        site, position = self._lens.sites[injection.site], part.position
        if position is not None and site.kind == "unembed":
            position -= int(self._lengths[row]) - 1
        return part_delta(
            injection.map,
            site.kind,
            self._lens.heads.of(site.kind),
            z,
            position=position,
            head=part.head,
            rank=part.rank,
        )
