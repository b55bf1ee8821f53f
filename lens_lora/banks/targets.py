"""Make stand-ins: adapters that add nothing, at every module that an adapter may target.

The base's half of first order is recorded with stand-ins, whose sites include those of every
adapter that a bank may be asked about later.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Sequence

import torch

from lens_lora.core import Adapter, Host, LoRAFactors, ModuleUpdate, TrainedModule
from lens_lora.errors import LensLoraError, SiteError
from lens_lora.families import HEADS, NORM_KINDS, outside_layer

# The beginning of the names of modules in PEFT's files.
_PEFT_PREFIX = "base_model.model."


def stand_ins(host: Host, globs: Sequence[str] = ("*",)) -> list[Adapter]:
    """Make adapters that add nothing at gates 0: one of all modules, and one of all but the norms.

    If a norm may change too, the module after it is read at another place, so both are recorded.

    Args:
        host: the model.
        globs: the Hugging Face paths of the modules that an adapter may target.

    Raises:
        SiteError: no module of the model matches.
    """
    paths = _paths(host)
    updates: dict[str, ModuleUpdate] = {}
    for path in paths:
        if not any(_matches(path, glob) for glob in globs):
            continue
        # A module that cannot be an exact site is left out, since a lens refuses adapters of it.
        with contextlib.suppress(LensLoraError):
            updates.update(_stand_in(host, path))
    if not updates:
        raise SiteError(
            f"modules={globs}: no module of this model matches; it has {', '.join(paths[:3])}, …"
        )

    adapters = [Adapter(updates, name="bank")]
    linear = {path: update for path, update in updates.items() if isinstance(update, LoRAFactors)}
    if linear:
        adapters.append(Adapter(linear, name="bank"))
    return adapters


def _matches(path: str, glob: str) -> bool:
    """Whether a glob matches a module's path; it may begin like the names in PEFT's files."""
    return fnmatch.fnmatch(path, glob.removeprefix(_PEFT_PREFIX))


def _paths(host: Host) -> list[str]:
    """List the Hugging Face paths of all modules that the model's family knows, each once."""
    family = host.family
    paths: list[str] = []
    for path in family.every_path():
        if path in HEADS and path != host.head:
            continue
        paths += [path.format(l=layer) for layer in range(host.n_layers)]
    paths += family.linear_paths(host.n_layers)
    return list(dict.fromkeys(paths))


def _stand_in(host: Host, path: str) -> dict[str, ModuleUpdate]:
    """Make an update that adds nothing; {} if the model lacks the module or has it folded."""
    place = host.family.place(path)
    if place is None:
        return {}
    kind = place.kinds[0]
    layer = place.layer
    if layer is None:
        layer = outside_layer(kind, host.n_layers)

    if kind in NORM_KINDS:
        affine = host.norm_parameters(layer, kind)
        if affine is None or host.is_folded(layer, kind) or not host.norm_ports(layer, kind):
            return {}
        gamma = affine[0]
        return {path: TrainedModule(gamma + 1)}  # its Δγ is multiplied by a gate of 0

    shapes = [host.shape(layer, each) for each in place.kinds if host.ports(layer, each)]
    experts = host.experts(layer, kind)
    rank = max(experts, 1)
    width = shapes[0][1]
    height = sum(out for out, _ in shapes)
    A = torch.zeros(rank, width, device="cpu")
    B = torch.zeros(height, rank, device="cpu")
    return {path: LoRAFactors(A, B, experts=experts)}
