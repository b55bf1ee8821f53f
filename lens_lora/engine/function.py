"""g(ε) = readout(f(ε)), the function of which all else is a derivative, a corner or an integral.

1. One forward pass under hooks gives f or g at each row's last token, or at all tokens of a
   response (`engine/read.py`).
2. Several gate vectors, the same for all prompts (`gated_readout`) or each prompt's own
   (`readout_at`), ride in rows of the batch, a bounded number at a time (`engine/batching.py`), and
   where all prompts together are too many, a group of these at a time.
3. Gate vectors that share their first layers branch there instead (`engine/branching.py`).

Cost: at most one forward pass a gate vector.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine import branching as tree
from lens_lora.engine.batching import branches_at_once, pass_groups, rows_at_once
from lens_lora.engine.read import read_logits, read_value
from lens_lora.errors import NumericsError
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = [
    "gated_logits",
    "gated_readout",
    "readout_at",
    "require_finite",
]

_SLOW, _SLOW_TOGETHER = 8, 64


def gated_logits(
    lens: LoraLens, prompts: Prompts, gates: Float[Tensor, "*row site"]
) -> Float[Tensor, "row *slot vocab"]:
    """f(ε) at the read position; gates [site], or [row, site]. One forward pass."""
    with lens.injected(ScaleInject(lens.plan, gates)):
        return read_logits(lens, prompts)


def gated_readout(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "point site"],
    *,
    progress: bool = True,
    what: str = "forward passes",
) -> Float[Tensor, "batch point"]:
    """g at several gate vectors. At most as many forward passes as points, batched.

    Points that share their gates in the first layers share the work there, where the model's
    blocks allow it: adding, or leaving out, every site in turn costs half.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: the same for every prompt.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a non-finite readout.
    """
    gates = gates.to(lens.device, lens.gate_dtype)
    with torch.no_grad():
        if tree.pays(lens, gates):
            values = _as_tree(lens, reading, gates, progress, what)
        else:
            some = pass_groups(lens, reading)
            values = torch.cat([_in_batches(lens, one, gates, progress, what) for one in some])
    require_finite(values, "the readout")
    return values


def _in_batches(
    lens: LoraLens, reading: Reading, gates: Tensor, progress: bool, what: str
) -> Float[Tensor, "batch point"]:
    columns, step = [], rows_at_once(lens, reading)
    with _bar(len(gates), _SLOW, progress, what) as bar:
        for some in gates.split(step):
            many = reading.repeat(len(some))
            by_row = some.repeat(len(reading.owner), 1)
            with lens.injected(ScaleInject(lens.plan, by_row)):
                values = read_value(lens, many)
            columns.append(values.view(reading.batch, -1))
            bar.update(len(some))
    return torch.cat(columns, 1)


def _as_tree(
    lens: LoraLens, reading: Reading, gates: Tensor, progress: bool, what: str
) -> Float[Tensor, "batch point"]:
    """One row of the reading at a time, as its own tree: aligned, without padding."""
    order = tree.neighbours_first(lens, gates)
    columns, step = [], branches_at_once(lens, reading)
    with _bar(len(gates), _SLOW, progress, what) as bar:
        for some in gates[order].split(step):
            columns.append(_branched(lens, reading, tree.Tree.of(lens, some)))
            bar.update(len(some))
    return torch.cat(columns, 1)[:, order.argsort()]


def _branched(
    lens: LoraLens, reading: Reading, branches: tree.Tree
) -> Float[Tensor, "batch point"]:
    alone = reading.each_row()
    if alone is not None:
        grown = [one.grown(branches.width) for one in alone]
        rows = [branches.run(lens, lambda one=one: read_value(lens, one)) for one in grown]
        return reading.by_prompt(torch.stack(rows))
    logits = [
        branches.run(lens, lambda one=one: read_logits(lens, one))
        for one in map(reading.prompts.row, range(len(reading.owner)))
    ]
    return reading.repeat(len(branches.leaf)).read(torch.cat(logits)).view(reading.batch, -1)


def readout_at(
    lens: LoraLens,
    reading: Reading,
    gates: Float[Tensor, "batch point site"],
    *,
    progress: bool,
    what: str,
) -> Float[Tensor, "batch point"]:
    """g at each prompt's own gate vectors. At most as many forward passes as points, batched.

    Args:
        lens: the adapter over the model.
        reading: what is run, and read.
        gates: of each prompt.
        progress: show a bar.
        what: the bar's name.

    Raises:
        NumericsError: a non-finite readout.
    """
    groups = pass_groups(lens, reading)
    each = gates.to(lens.device, lens.gate_dtype).split([one.batch for one in groups])
    with torch.no_grad(), _bar(gates.shape[1], _SLOW_TOGETHER, progress, what) as bar:
        pairs = zip(groups, each, strict=True)
        found = torch.cat([_at_own_gates(lens, *pair, bar) for pair in pairs])
    require_finite(found, "the readout")
    return found


def _at_own_gates(
    lens: LoraLens, reading: Reading, gates: Float[Tensor, "batch point site"], bar: tqdm
) -> Float[Tensor, "batch point"]:
    owner, columns = reading.owner.to(lens.device), []
    for some in gates.split(rows_at_once(lens, reading), 1):
        many = reading.repeat(some.shape[1])
        with lens.injected(ScaleInject(lens.plan, some[owner].flatten(0, 1))):
            values = read_value(lens, many)
        columns.append(values.view(reading.batch, -1))
        bar.update(some.shape[1])
    return torch.cat(columns, 1)


def _bar(points: int, slow: int, progress: bool, what: str) -> tqdm:
    """Shown where there are at least `slow` points."""
    return tqdm(total=points, desc=what, leave=False, disable=not progress or points < slow)


def require_finite(values: Tensor, what: str) -> None:
    """Refuse NaN and infinity.

    Args:
        values: numbers of any shape.
        what: what they are, for the error.

    Raises:
        NumericsError: some value is not finite.
    """
    if not torch.isfinite(values).all():
        raise NumericsError(
            f"{what} is not finite; lens.logits(prompts) names the first hook point at which the "
            "model's own activations stop being finite."
        )
