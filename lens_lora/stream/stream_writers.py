"""The sites that write directly to the residual stream."""

from __future__ import annotations

from lens_lora.core import LoraLens
from lens_lora.errors import ModelStateError


def stream_writers(lens: LoraLens, remedy: str) -> list[int]:
    """The indices of sites whose δz is added to the residual stream, in the stream's basis.

    Args:
        lens: the adapter over the model.
        remedy: what to do if a norm or factor changes what a site writes, other than leaving such
            sites out.

    Raises:
        ModelStateError: a norm or factor is between one of these sites and the stream.
    """
    writers: list[int] = []
    for index, site in enumerate(lens.sites):
        if not site.writes_to_stream:
            continue
        norm = lens.host.family.norm_behind(site.kind)
        if norm is not None:
            raise ModelStateError(
                f"{site.name}: a norm or factor ({norm}) is between this site and the residual "
                "stream, so its output is not a direction of the stream.",
                remedy=f"{remedy}; or leave such modules out, "
                "lens.with_adapter(lens.adapter.without_modules(…)).",
            )
        writers.append(index)
    return writers
