"""How much each site itself writes to a feature: d·δz_l, without the effects of later modules.

One forward pass at the gates `at` gives δz_l. Which sites count depends on the hook point where the
feature is read:

- At a point of the residual stream they are o, down and embeddings before it. A site after the
  point cannot move it.
- Between the two branches of a block (resid_mid) a site of the same block counts if the activation
  depends on its gate, which a backward pass of one prompt shows.
- At any other point it is the site whose own output this is.
"""

from __future__ import annotations

from typing import Annotated, final

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_lora.core import (
    Function,
    LoraLens,
    OfSites,
    Positions,
    Prompts,
    ScaleInject,
    Sites,
    drawing,
    tables,
)
from lens_lora.errors import SiteError, require_finite
from lens_lora.formats.directions import STREAM, Directions, is_residual, is_stream
from lens_lora.hidden.projection import FeatureProjection, in_groups, positions_label
from lens_lora.hidden.readout import Projection, modules_before
from lens_lora.stream.stream_writers import stream_writers

# What to do about a norm between a site and the stream.
_BY_SHIFT = "Use feature_shift(…, scale={site: 1.0}), which is exact"
# The kinds of sites whose outputs, and nothing else, are added to the stream at such points.
_ADDED_BY = {
    "hook_attn_out": ("o",),
    "hook_mlp_out": ("down", "fc_out"),
    "hook_embed": ("embed",),
}


@final
class FeatureWrites(OfSites):
    """How much each site writes to each feature, d·δz_l, without the effects of later modules.

    Attributes:
        values: [batch, site, feature], at one position.
        positions: the index within each prompt, or the tokens that values are means over, in words,
            such as 'response'.
        at: the gates at which z was read.
        name: the hook point where the features are read, to which all of `sites` write; '' for the
            residual stream as a whole.
        str_tokens, features, units, meta: see `FeatureShift`.
    """

    values: Float[Tensor, "batch site feature"]
    positions: int | str
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
        chosen = list(Sites(self.sites).chosen(site))
        values = self.of_prompt(prompt)[chosen]
        order = tables.largest(values, k)
        width = values.shape[1]
        columns = Sites(self.sites[chosen[index // width]] for index in order).columns()
        columns["feature"] = [index % width for index in order]
        columns["value"] = values.flatten()[order].tolist()
        return pd.DataFrame(columns)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt, site and feature."""
        batch, _, features = self.values.shape
        return tables.long_table(
            {"value": self.values},
            {"prompt": range(batch)},
            Sites(self.sites).columns(),
            {"feature": range(features)},
        )

    def plot(self, k: int = 20, prompt: int | None = None) -> drawing.Figure:
        """Site × feature, of the k features that are written most.

        Args:
            k: how many features.
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt, or a k that is no whole number, or below 1.
        """
        return drawing.figure(self, k, prompt)

    def of_prompt(self, prompt: int | None) -> Float[Tensor, "site feature"]:
        """One prompt's values in float64, or the mean over prompts.

        Args:
            prompt: an index; without it, the mean over prompts.

        Raises:
            ArgumentError: no such prompt.
        """
        return self.values[self.prompt_rows(prompt)].cpu().double().mean(0)


def feature_writes(
    f: Function,
    features: Directions,
    name: str | None,
    at: float,
    positions: Positions,
) -> FeatureWrites:
    """How much each site writes to each feature, d·δz_l, at the gates `at`.

    Cost: one forward pass, and for a point between the two branches of a block a backward pass.

    Args:
        f: the function, whose rows are run.
        features: the directions.
        name: the hook point where they are read; None for the residual stream as a whole.
        at: the gates at which z is read.
        positions: the tokens of each prompt, over which a mean is taken.

    Raises:
        SiteError: no site of the adapter writes there.
        ModelStateError: a norm changes what a site writes before it is added to the stream.
        ArgumentError: directions of another width.
        PromptError: a prompt lacks one of these positions.
        NumericsError: a write is not finite.
    """
    lens = f.lens
    if name is not None:
        lens.require_update([lens.known_point(name)])
    writers = _writers_to(lens, f.rows, name)
    _require_writers(writers, name)
    if name is None or is_residual(name):
        features = features.at(name or STREAM, int(lens.model.cfg.d_model))

    def of_group(group: Function) -> Float[Tensor, "group_batch site feature"]:
        project = FeatureProjection(group.rows, features, positions)
        return _writes(group, writers, features, name or STREAM, project, at)

    values = in_groups(f, f.passes.rows_at_once(logits=False), of_group)
    require_finite(values, "a site's δz")
    return FeatureWrites(
        values=values,
        sites=tuple(lens.sites[index] for index in writers),
        positions=positions_label(positions),
        at=at,
        name=name or "",
        features=features.kind,
        units=features.units,
        str_tokens=f.str_tokens,
        meta=lens.describe(f.rows),
    )


def _require_writers(writers: list[int], name: str | None) -> None:
    """Refuse a point to which no site writes."""
    if writers:
        return
    where = "the residual stream" if name is None else name
    raise SiteError(
        f"no site of this adapter writes to {where}: a point of the stream is written by o, "
        "down and embeddings before it, and any other point by the site whose output it is. "
        "Leave out by='site': the shift includes what the other sites do."
    )


def _writes(
    f: Function,
    writers: list[int],
    features: Directions,
    name: str,
    project: FeatureProjection,
    at: float,
) -> Float[Tensor, "batch site feature"]:
    """The writers' d·δz_l, from one forward pass without the unembedding."""
    lens = f.lens
    gates = lens.gates(at)
    scaled = ScaleInject(lens.plan, gates)
    written: dict[int, Tensor] = {}

    def inject(index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = lens.injections[index]
        if injection.site in writers:
            delta = injection.map(z)
            # This refuses features of another width than the site's output.
            features.at(name, delta[0, 0].numel())
            write = project(delta)
            if injection.partner is not None:
                # This is a product of two updates, which also grows with its partner's gate.
                write = float(gates[injection.partner]) * write
            # A site with several injections writes their sum.
            written[injection.site] = written.get(injection.site, 0.0) + write
        return scaled(index, out, z)

    f.passes.observe(inject, logits=False)
    return torch.stack([written[index].to(lens.device) for index in writers], 1)


# --- Which sites write to a point


def _writers_to(lens: LoraLens, prompts: Prompts, name: str | None) -> list[int]:
    """The sites whose δz is a part of the activation at this point, or of the residual stream."""
    if name is None:
        return stream_writers(lens, _BY_SHIFT)
    if is_stream(name):
        return _writers_before(lens, prompts, name)
    points = lens.model.hook_dict
    own = [i for i, site in enumerate(lens.sites) if points.get(site.write) is points[name]]
    if own or not is_residual(name):
        return own
    return _writers_of_branch(lens, name)


def _writers_of_branch(lens: LoraLens, name: str) -> list[int]:
    """The sites whose output is added to the stream at the end of a branch of a block."""
    block, _, point = name.rpartition(".")
    writers: list[int] = []
    for index in stream_writers(lens, _BY_SHIFT):
        site = lens.sites[index]
        is_of_block = not block or block == f"blocks.{site.layer}"
        if is_of_block and site.kind in _ADDED_BY[point]:
            writers.append(index)
    return writers


def _writers_before(lens: LoraLens, prompts: Prompts, name: str) -> list[int]:
    """The sites that write to the residual stream before one of its points."""
    writers = stream_writers(lens, _BY_SHIFT)
    block, point = name.rsplit(".", 1)
    if block == "ln_final":
        return writers
    layer = int(block.removeprefix("blocks."))
    before = [index for index in writers if lens.sites[index].layer < layer]
    of_block = [index for index in writers if lens.sites[index].layer == layer]
    if point == "hook_resid_mid":
        moving = _sites_that_move(lens, prompts, name)
        of_block = [index for index in of_block if index in moving]
    elif point not in ("hook_resid_post", "hook_out"):
        of_block = []
    return sorted([*before, *of_block])


def _sites_that_move(lens: LoraLens, prompts: Prompts, name: str) -> set[int]:
    """The sites on whose gates the activation at a point depends, on the first prompt.

    Cost: a pass of a few tokens, and one forward and one backward pass.
    """
    first = prompts.row(0)
    if not modules_before(lens, first, name):
        return set()
    # A random direction is almost surely orthogonal to no derivative.
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(int(lens.model.cfg.d_model), generator=generator)
    g = lens.function(first, Projection(direction, name, positions=slice(None)))
    slopes = g.slopes(at=0.5)[0]
    moving = {g.lens.sites[index].name for index in slopes.nonzero().flatten().tolist()}
    return {index for index, site in enumerate(lens.sites) if site.name in moving}
