"""An attribution in words: a caution, the error of its quadrature, and its largest sites."""

from __future__ import annotations

from typing import NamedTuple

from lens_lora.core import Attribution, Quadrature
from lens_lora.errors import worded
from lens_lora.show.text import percent, signed


def caution_text(attribution: Attribution) -> str:
    """A warning that first order misleads on a violent adapter, with a remedy; '' on others."""
    if not attribution.is_violent:
        return ""
    remedy = worded("run ll.patch_sites", "run explain without --fast")
    return (
        f"This adapter is violent: ‖ΔW‖ is {percent(attribution.relative_norm)} of ‖W‖. Above "
        f"{percent(Attribution.VIOLENT)} first order often misleads, at either end: {remedy}."
    )


def quadrature_text(quadrature: Quadrature) -> str:
    """The nodes, the error reached, whether it meets the tolerance, and if not, why not."""
    verdict = "within" if quadrature.met else "not within"
    if quadrature.error <= quadrature.tol and not quadrature.met:
        verdict = "rounding hides whether within"
    reached = (
        f"{quadrature.nodes} nodes: complete to {percent(quadrature.error)} of the shift "
        f"({verdict} {percent(quadrature.tol)}), sites moved "
        f"by {percent(quadrature.site_change)} of it at the last rule"
    )
    return f"{reached}; {quadrature.note}" if quadrature.note else reached


class TopSite(NamedTuple):
    """A site of large |value|, with its numbers as they are written.

    Attributes:
        site: its name.
        value: its value, with the sign.
        share: its share of the shift.
    """

    site: str
    value: str
    share: str


def top_sites(attribution: Attribution, k: int, prompt: int | None = None) -> list[TopSite]:
    """The k sites of largest |value|, the largest first."""
    top = attribution.top(k, prompt)
    sites: list[TopSite] = []
    for site, value, share in zip(top["site"], top["value"], top["share"], strict=True):
        sites.append(TopSite(site, signed(value), percent(share)))
    return sites
