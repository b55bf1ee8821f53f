"""What all results share."""

from __future__ import annotations

from typing import Any

from lens_lora.engine.asked import Asked

__all__ = ["header"]


def header(asked: Asked) -> dict[str, Any]:
    """The fields that every measured result has: of what, over which sites, with which ends.

    Args:
        asked: with a readout; its ends are computed where they are not known yet.
    """
    base, adapted = asked.ends
    return {
        "sites": asked.lens.sites,
        "base": base,
        "adapted": adapted,
        "str_tokens": asked.str_tokens,
        "readout": asked.readout.label,
        "units": asked.readout.units,
        "meta": asked.lens.describe(),
    }
