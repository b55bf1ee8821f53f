"""The sites whose δz is a part of the residual stream."""

from __future__ import annotations

from lens_lora.core import LoraLens
from lens_lora.errors import ModelStateError


def stream_writers(lens: LoraLens, remedy: str) -> list[int]:
    """The sites whose δz is a part of the residual stream, in its basis.

    Args:
        lens: the adapter over the model.
        remedy: what to do where a norm or factor changes what a site writes, beside leaving such
            sites out.

    Raises:
        ModelStateError: a norm or factor stands between one of them and the stream.
    """
    writers: list[int] = []
    for index, site in enumerate(lens.sites):
        if not site.writes_to_stream:
            continue
        norm = lens.host.family.norm_behind(site.kind)
        if norm is not None:
            raise ModelStateError(
                f"{site.name}: a norm or factor ({norm}) stands between this site and the residual "
                "stream, so what it writes is no direction of the stream.",
                remedy=f"{remedy}; or leave such modules out, "
                "lens.with_adapter(lens.adapter.without_modules(…)).",
            )
        writers.append(index)
    return writers
