"""First-order shift of each site: a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (note, Prop. 1).

Reverse mode gives every site and part for one readout; forward mode gives the same numbers by the
other route, and is its check. At ε = 0 it predicts what adding one module to the base model does;
at ε = 1 what taking one away from the adapted model does. With `rules`, attention patterns or norm
denominators are constants at their values there (hooked/frozen.py), in both modes.

First order of several readouts of the same prompts (note, Prop. 1), out of one forward pass.

a_l(y) = ∂g_y/∂ε_l    for k readouts g_y: one forward pass, k backward passes as one batch
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.engine.batching import COVECTOR_TOKENS, rows_at_once
from lens_lora.engine.forward import Part, part_tangents, tangent_of
from lens_lora.engine.function import gated_logits, gated_readout, read_logits, require_finite
from lens_lora.engine.gate_graph import gate_graph
from lens_lora.engine.reverse import part_slots, require_finite_sites, site_slopes
from lens_lora.errors import ArgumentError
from lens_lora.hooked.frozen import FrozenRules, held_fixed, require_held
from lens_lora.hooked.sites import by_axes
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts, PromptsLike
from lens_lora.readouts.readout import Readout, bound
from lens_lora.readouts.rows import Reading
from lens_lora.results.attribution import Attribution, Quadrature

__all__ = [
    "first_order",
    "first_orders",
    "labelled",
]

Mode = Literal["auto", "reverse", "forward"]
_TRIED_TOKENS = 8


def first_order(
    lens: LoraLens,
    prompts: PromptsLike,
    readout: Readout,
    *,
    at: float = 0.0,
    mode: Mode = "auto",
    by: tuple[str, ...] | str = (),
    rules: FrozenRules | None = None,
    progress: bool = True,
) -> Attribution:
    """a_l = u_yᵀ J δz_l of every site, split by position, head and rank as asked.

    Cost: one forward and one backward in reverse mode (what 'auto' takes), and two forward passes
    for the exact shift beside it; forward mode takes one dual forward pass per site or part. Rules
    add two forward passes and one backward on eight tokens, that try the model's hook points.

    Args:
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        by: any of 'position', 'head', 'rank'.
        rules: attention patterns or norm denominators held fixed at their values at `at`: J is
            then that of the model with constants in their place. The shift beside it is g's own.

    Returns:
        Attribution with values [batch, site, *by] in the readout's units; its `method` names the
        rules, as in 'first_order/patterns'.

    Raises:
        ModelStateError: rules that this model's hooks cannot keep, naming the hook point.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    if mode not in ("auto", "reverse", "forward"):
        raise ArgumentError(f"mode {mode!r}: expected 'auto', 'reverse' or 'forward'.")
    axes, reading = by_axes(by), bound(readout, lens.model, lens.prompts(prompts))
    gates = lens.gates(float(at))
    with _under(rules, lens, reading.prompts):
        if mode == "forward":
            values = _forward(lens, reading, gates, axes, progress)
        else:
            values = site_slopes(lens, reading, gates, axes)
    require_finite_sites(lens, values)
    method = "first_order" if rules is None else f"first_order/{rules.key}"
    return labelled(lens, reading, readout, values, axes, method=method, at=float(at))


@contextlib.contextmanager
def _under(rules: FrozenRules | None, lens: LoraLens, prompts: Prompts) -> Generator[None]:
    if rules is None:
        yield
        return
    first = prompts.row(0)
    few = Prompts(first.tokens[:, :_TRIED_TOKENS], first.lengths.clamp(max=_TRIED_TOKENS))
    require_held(lens.plan.view, rules, lambda: lens.run(few))
    with held_fixed(lens.model, rules):
        yield


def labelled(
    lens: LoraLens,
    reading: Reading,
    readout: Readout,
    values: Float[Tensor, "batch site *by"],
    axes: tuple[str, ...],
    *,
    method: str,
    at: float,
    quadrature: Quadrature | None = None,
    ends: Float[Tensor, "end batch"] | None = None,
) -> Attribution:
    """The values with their labels, and the exact shift beside them.

    Args:
        ends: g(0) and g(1), if known. Two forward passes, if not.
    """
    if ends is None:
        both = torch.stack([lens.gates(0.0), lens.gates(1.0)])
        ends = gated_readout(lens, reading, both).T
    base, adapted = ends
    return Attribution(
        values=values,
        by=axes,
        sites=lens.sites,
        heads=tuple(lens.heads.of(s.kind) for s in lens.sites),
        base=base.contiguous(),
        adapted=adapted.contiguous(),
        str_tokens=reading.tokens_of(lens.str_tokens(reading.prompts)),
        readout=readout.label,
        units=readout.units,
        method=method,
        at=at,
        meta=lens.describe(),
        quadrature=quadrature,
    )


def _forward(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "site"],
    axes: tuple[str, ...],
    progress: bool,
) -> Float[Tensor, "batch site *by"]:
    prompts = reading.prompts
    shape = (reading.batch, len(lens.sites), *part_slots(lens, prompts, axes))
    values = torch.zeros(shape, dtype=lens.gate_dtype, device=lens.device)
    wanted = _all_parts(lens, prompts, axes)

    def read(rows: Float[Tensor, "row part vocab"]) -> Float[Tensor, "batch part"]:
        many = reading.repeat(rows.shape[1])
        return tangent_of(many.read(rows.flatten(0, 1))).view(reading.batch, -1)

    tangents = part_tangents(lens, prompts, gates, wanted, read, progress=progress)
    slots = [[_last_if_none(getattr(part, axis)) for part in wanted] for axis in axes]
    values[(slice(None), [part.site for part in wanted], *slots)] = tangents
    return values


def _last_if_none(slot: int | None) -> int:
    return -1 if slot is None else slot


def _all_parts(lens: LoraLens, prompts: Prompts, axes: tuple[str, ...]) -> list[Part]:
    found = []
    for index, site in enumerate(lens.sites):
        heads = lens.heads.of(site.kind)
        ranges = {
            "position": range(prompts.tokens.shape[1]),
            "head": range(_head_slots(lens, index)) if heads else [None],
            "rank": range(site.rank),
        }
        options = [
            ranges[axis] if axis in axes else [None] for axis in ("position", "head", "rank")
        ]
        found += [Part(index, p, h, r) for p in options[0] for h in options[1] for r in options[2]]
    return found


def _head_slots(lens: LoraLens, index: int) -> int:
    """The site's heads, and one slot more where a bias belongs to none of them."""
    by_head = lens.maps[index].a0_by_head
    heads = lens.heads.of(lens.sites[index].kind)
    return heads if by_head is None else len(by_head)


def first_orders(
    lens: LoraLens,
    prompts: PromptsLike,
    readouts: Sequence[Readout],
    *,
    at: float = 0.0,
    max_memory: float | None = None,
    progress: bool = True,
) -> tuple[Attribution, ...]:
    """`first_order` of each of several readouts, by site.

    Cost: one forward pass and a backward pass per readout, as one batch, and two forward passes for
    all their exact shifts. An answer of several tokens has rows of its own, and is run by itself.

    Args:
        at: the gate value at which the derivative is taken: 0 base, 1 adapted.
        max_memory: bytes for the readouts that go at once, beside the graph of the forward pass.

    Raises:
        ArgumentError: no readouts, or something that is none.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: non-finite derivatives, naming the site.
    """
    if not readouts:
        raise ArgumentError("readouts=[] asks for nothing; give at least one.")
    ready = lens.prompts(prompts)
    readings = [bound(readout, lens.model, ready) for readout in readouts]
    together = [i for i, reading in enumerate(readings) if reading.prompts is ready]
    found: dict[int, Attribution] = {}
    if together:
        some = [readings[i] for i in together]
        ends = _ends(lens, ready, some)
        slopes = _slopes(lens, ready, some, at, max_memory, progress)
        for j, i in enumerate(together):
            found[i] = labelled(
                lens,
                readings[i],
                readouts[i],
                slopes[j],
                (),
                method="first_order",
                at=float(at),
                ends=ends[j],
            )
    for i, readout in enumerate(readouts):
        if i not in found:
            found[i] = first_order(lens, ready, readout, at=at, progress=progress)
    return tuple(found[i] for i in range(len(readouts)))


def _slopes(
    lens: LoraLens,
    prompts: Prompts,
    readings: Sequence[Reading],
    at: float,
    max_memory: float | None,
    progress: bool,
) -> Float[Tensor, "readout batch site"]:
    def read() -> Float[Tensor, "readout batch"]:
        logits = read_logits(lens, prompts)
        return torch.stack([reading.read(logits) for reading in readings])

    graph = gate_graph(lens, prompts, lens.gates(float(at)), read)
    step = rows_at_once(lens, prompts, COVECTOR_TOKENS, max_memory)
    slopes = graph.slopes_of_each(step, progress=progress)
    for of_one in slopes:
        require_finite_sites(lens, of_one)
    return slopes


def _ends(
    lens: LoraLens, prompts: Prompts, readings: Sequence[Reading]
) -> Float[Tensor, "readout end batch"]:
    with torch.no_grad():
        logits = [gated_logits(lens, prompts, lens.gates(end)) for end in (0.0, 1.0)]
        ends = torch.stack(
            [torch.stack([reading.read(end) for end in logits]) for reading in readings]
        )
    require_finite(ends, "a readout")
    return ends
