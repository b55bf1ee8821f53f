"""Whether the updates that are no low-rank factors fit into memory, before any is made.

DoRA's ΔW and that of a module trained whole have full rank: ΔW [out, in] and an identity on its
smaller side are held, in float32 at least,

    4 · (out · in + min(out, in)²) bytes a module,

several times the adapter. Two copies are counted, as each is turned into the model's basis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import psutil
import torch

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.errors import OutOfMemoryError
from lens_lora.families import NORM_KINDS
from lens_lora.hooked.base_at_hand import BaseAtHand
from lens_lora.hooked.host import Host
from lens_lora.hooked.site_factors import SiteFactors

__all__ = ["free_bytes", "require_dense_fit"]

_COPIES = 2


def require_dense_fit(host: Host, sites: Sequence[SiteFactors], base: BaseAtHand) -> None:
    """Check that the dense updates fit into what is free on each device. No forward pass.

    Args:
        host: the hooked model.
        sites: as the adapter holds them.
        base: the base's own parameters.

    Raises:
        OutOfMemoryError: they do not; says how much they take.
    """
    needed: Counter[torch.device] = Counter()
    dense = [site for site in sites if _is_dense(site)]
    for site in dense:
        out, width = base.shape(site)
        entries = out * width + min(out, width) ** 2
        weight = host.weight(site.layer, site.kind)
        needed[weight.device] += _COPIES * max(4, weight.dtype.itemsize) * entries
    for device, size in needed.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise OutOfMemoryError(
                f"DoRA and modules that were trained whole have a dense ΔW: for these {len(dense)} "
                f"modules about {size:.3g} bytes on {device}, where {free:.3g} are free. Take some "
                "of the modules, adapter.only('*.layers.1?.*'), or fine-tune by a plain LoRA."
            )


def free_bytes(device: torch.device) -> float | None:
    """What is free on a device; None where it does not tell.

    Args:
        device: of a tensor.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().available) if device.type == "cpu" else None


def _is_dense(site: SiteFactors) -> bool:
    factors = site.factors
    if site.kind in NORM_KINDS:
        return False
    if isinstance(factors, LoRAFactors):
        return factors.needs_base_weight
    return factors.weight is not None and factors.tokens is None
