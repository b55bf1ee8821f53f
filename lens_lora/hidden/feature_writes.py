"""Which of the adapter's sites write a feature: d·δz_l, before any later module has seen it.

One forward pass at the gates `at`. To a point of the residual stream write o, down and embeddings
before it; what stands behind it cannot move it, and is left out. Between the two branches of a
block (resid_mid) a site counts if the activation depends on its gate, which a backward pass of one
prompt shows. To any other point writes a site whose own output is held there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import (
    OfSites,
    Prompts,
    ScaleInject,
    chosen_sites,
    prompt_rows,
)
from lens_lora.core.function.asked import Asked
from lens_lora.core.function.forward import require_finite, run_without_logits
from lens_lora.core.function.memory import rows_of_pass
from lens_lora.core.model.lens import stream_writers
from lens_lora.core.model.sites import known_point
from lens_lora.core.results import base as results_base
from lens_lora.core.results import drawing
from lens_lora.errors import SiteError
from lens_lora.formats.directions import STREAM, Directions, is_residual, is_stream
from lens_lora.hidden.projection import Projection, activation_at, labels_of


@final
class FeatureWrites(OfSites):
    """What each site writes to each feature: d·δz_l, before any later module has seen it.

    Attributes:
        values: [batch, site, feature], at one position.
        positions: the index within each prompt.
        at: the gates at which z was read.
        name: the hook point where the features are read, to which all of `sites` write; '' for the
            residual stream as a whole.
        str_tokens, features, units, meta: see `FeatureShift`.
    """

    values: Float[Tensor, "batch site feature"]
    positions: int
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "batch"]
    features: str
    units: str
    at: float
    name: str = ""

    def top(self, site: str | None = None, k: int = 10, prompt: int | None = None) -> pd.DataFrame:
        """The k pairs of site and feature of largest |d·δz|, of one site or of all.

        Args:
            site: its name; without it, all sites.
            k: how many.
            prompt: an index; without it, the mean over prompts.

        Raises:
            SiteError: no site that writes has this name.
            ArgumentError: no such prompt.
        """
        chosen = list(chosen_sites(self.sites, site))
        values = self.of_prompt(prompt)[chosen]
        order, width = results_base.largest(values, k), values.shape[1]
        columns: dict[str, Any] = {"site": [self.sites[chosen[i // width]].name for i in order]}
        columns["feature"] = [i % width for i in order]
        return pd.DataFrame(columns | {"write": values.flatten()[order].tolist()})

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and feature."""
        batch, _, features = self.values.shape
        sites = results_base.site_labels(self.sites)
        axes = {"prompt": range(batch)}, sites, {"feature": range(features)}
        return results_base.long_table({"write": self.values}, *axes).drop(columns="module")

    def plot(self, k: int = 20, prompt: int | None = None) -> drawing.Figure:
        """Site × feature, of the k features that are written most.

        Args:
            k: how many features.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return drawing.figure(self, k, prompt)

    def of_prompt(self, prompt: int | None) -> Float[Tensor, "site feature"]:
        """One prompt's values in float64, or the mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.values[prompt_rows(prompt, len(self.values))].cpu().double().mean(0)


def by_site(
    asked: Asked,
    features: Directions,
    name: str | None,
    at: float,
    positions: int | Literal["each"],
) -> FeatureWrites:
    """d·δz_l at the gates `at`. One forward pass."""
    lens = asked.lens
    if name is not None:
        lens.plan.require_update([known_point(lens, name)])
    writers = _writers_to(asked, name)
    if not writers:
        where = "the residual stream" if name is None else name
        raise SiteError(
            f"no site of this adapter writes to {where}: to the stream write o, down and "
            "embeddings before a point, to another point the site whose output it holds. Leave "
            "out by='site': the shift includes what the other sites do."
        )
    d_model = int(lens.model.cfg.d_model)
    gates, rows = lens.gates(at), asked.prompts.batch
    scaled = ScaleInject(lens.plan, gates)
    if name is None or is_residual(name):
        features = features.at(name or STREAM, d_model)

    def writes(prompts: Prompts) -> Tensor:
        project = Projection(prompts, features, positions)
        written: dict[int, Tensor] = {}

        def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
            injection = lens.plan.injections[index]
            if injection.site in writers:
                weight = 1.0 if injection.partner is None else float(gates[injection.partner])
                delta = injection.map(z)
                features.at(name or STREAM, delta[0, 0].numel())
                write = weight * project(delta)
                written[injection.site] = written.get(injection.site, 0.0) + write
            return scaled(index, out, z)

        with torch.no_grad(), lens.injected(inject):
            run_without_logits(lens, prompts)
        return torch.stack([written[i].to(lens.device) for i in writers], 1)

    fitting = rows_of_pass(lens, asked.prompts) or rows
    groups = (asked.prompts.cut(i, min(i + fitting, rows)) for i in range(0, rows, fitting))
    values = torch.cat([writes(group) for group in groups])
    require_finite(values, "a site's δz")
    return FeatureWrites(
        values=values,
        sites=tuple(lens.sites[i] for i in writers),
        positions=int(positions),
        at=at,
        name=name or "",
        **labels_of(asked, features),
    )


_BY_SHIFT = "Use feature_shift(…, scale={site: 1.0}), which is exact"
# The kinds of sites whose outputs, and nothing else, are added to the stream at such points.
_ADDED_BY = {
    "hook_attn_out": ("o",),
    "hook_mlp_out": ("down", "fc_out"),
    "hook_embed": ("embed",),
}


def _writers_to(asked: Asked, name: str | None) -> list[int]:
    """The sites whose δz is a part of what this point holds; of the stream without a point."""
    lens = asked.lens
    if name is None:
        return stream_writers(lens, _BY_SHIFT)
    if is_stream(name):
        return _writers_before(asked, name)
    points = lens.model.hook_dict
    own = [i for i, site in enumerate(lens.sites) if points.get(site.write) is points[name]]
    if own or not is_residual(name):
        return own
    block, _, point = name.rpartition(".")
    return [
        site
        for site in stream_writers(lens, _BY_SHIFT)
        if lens.sites[site].kind in _ADDED_BY[point]
        and (not block or block == f"blocks.{lens.sites[site].layer}")
    ]


def _writers_before(asked: Asked, name: str) -> list[int]:
    """The sites that write to the residual stream before one of its points."""
    writers = stream_writers(asked.lens, _BY_SHIFT)
    block, point = name.rsplit(".", 1)
    if block == "ln_final":
        return writers
    own = int(block.removeprefix("blocks."))
    of_own_block = {site for site in writers if asked.lens.sites[site].layer == own}
    if point == "hook_resid_mid":
        of_own_block &= _moving(asked, name)
    elif point not in ("hook_resid_post", "hook_out"):
        of_own_block = set()
    return [s for s in writers if asked.lens.sites[s].layer < own or s in of_own_block]


def _moving(asked: Asked, name: str) -> set[int]:
    """The sites on whose gates the activation at a point depends, on the first prompt.

    One forward and one backward pass.
    """
    lens, row = asked.lens, asked.prompts.row(0)
    lens.plan.check_backward(once=False)  # hooks are off by then, and a block would run without
    gates = lens.gates(0.5).requires_grad_()
    with torch.enable_grad():
        h = activation_at(lens, row, name, ScaleInject(lens.plan, gates))
        if not h.requires_grad:
            return set()
        covector = torch.randn(h.shape, generator=torch.Generator().manual_seed(0)).to(h)
        (slopes,) = torch.autograd.grad((h * covector).sum(), gates)
    return set(slopes.nonzero().flatten().tolist())
