"""`patch_edges` measures edges exactly: path patching (`edge_attribution/path_patching.py`).

Switching a writer's sites on, or off, changes the outputs of their branches. Only one reader sees
this change, and the model runs on from there. In this file pairs of names become paths: a writer is
a site, a glob, or a group, and a reader must be downstream of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import get_args

from lens_lora.arguments import word
from lens_lora.core import Effects, Function, Group, Groups, How, LoraLens, analysis
from lens_lora.edge_attribution.by_reader import point_of
from lens_lora.edge_attribution.edges import ARROW, require_stream
from lens_lora.edge_attribution.path_patching import EdgePath, patched_edges
from lens_lora.edge_attribution.readers import (
    LOGITS,
    head_readers,
    is_end,
    reader_layer,
    stream_readers,
)
from lens_lora.errors import ArgumentError, ModelStateError, SiteError


@analysis
def patch_edges(
    g: Function,
    pairs: Iterable[Sequence[str]],
    how: How = "add_one",
    *,
    group: Group = "site",
) -> Effects:
    """The exact effect of one site, or group of sites, through only one reader (path patching).

    With 'add_one' the base model runs. Switching the site on changes the output of its branch, and
    this change is added to the input of the reader, before its norm; no other reader sees it. With
    'leave_one_out' the adapted model runs, and only that reader misses what switching the site off
    takes away.

    The sites of a group are switched together. Each block's branches read the stream as it is
    without the switch, so that sites of one group do not read each other across blocks, and the
    reader gets the sum. Sites of a group that come after the reader do not count.

    Cost: two forward passes, four for the noise floor, and one per pair, batched; if a pair is
    within one block, one more with tangents.

    Args:
        lens: the adapter over the model.
        prompts: strings, conversations, ids, or `Prompts`.
        readout: u_y, what is read from the logits; or a `Projection` at a point of the residual
            stream, whose last reader is that point in place of 'logits'.
        pairs: (writer, reader) by name, such as ('blocks.3.attn.o', 'blocks.5.mlp'), a reader
            'blocks.5.attn.3.q', or 'logits'. The writer is a site, a glob for all sites that it
            matches, or the name of a group; `edges(…).top(20)[["writer", "reader"]].values` gives
            the strongest.
        how: 'add_one', on the base model, or 'leave_one_out', in the adapted model.
        group: the writers that may be named: 'layer', 'kind' or {name: site names or globs}, as for
            `edges`.
        progress: show a bar.

    Returns:
        Effects of edges with values [batch, pair], in the readout's units, positive if the edge
        raises the readout.

    Raises:
        SiteError: a site, group or reader that does not exist, with the nearest names.
        ArgumentError: a reader that is not downstream of any of the writer's sites, no pairs,
            another `how` or group.
        ModelStateError: heads that are not known; for a pair within one block, a hook of yours
            after it, or an operation without a forward-mode derivative.
        TokenError, PromptError: a readout or prompt that does not fit the model.
        NumericsError: a readout is not finite.
    """
    require_stream(g)
    word("how", how, get_args(How))
    paths = _paths(g.lens, pairs, g.lens.sites.grouped(group), point_of(g))
    if how == "add_one":
        at = 0.0
        values = patched_edges(g, paths, at)
    else:
        # An edge that raises the readout lowers it when it is taken out.
        at = 1.0
        values = -patched_edges(g, paths, at)
    return Effects(
        values=values,
        groups={f"{path.writer}{ARROW}{path.reader}": path.sites for path in paths},
        how=how,
        of="edge",
        noise_floor=g.noise((1.0, -1.0), at=at),
        **g.header(),
    )


def _paths(
    lens: LoraLens, pairs: Iterable[Sequence[str]], groups: Groups, point: str | None
) -> list[EdgePath]:
    """The distinct pairs as paths, whose names and directions are checked.

    Args:
        lens: the adapter over the model.
        pairs: writers and readers by name.
        groups: the writers that may be named beside sites and globs.
        point: the hook point that a readout inside the model reads; None for one of the logits.
    """
    try:
        names = [(writer, reader) for writer, reader in pairs]
    except (TypeError, ValueError):
        # Anything but pairs is refused below.
        names = []
    if not names:
        raise ArgumentError(
            f"pairs={pairs!r}: expected pairs of names, such as [('blocks.0.attn.o', 'logits')]."
        )
    readers = _reader_names(lens, point)
    paths: list[EdgePath] = []
    for writer, reader in dict.fromkeys(names):
        if reader not in readers:
            near = difflib.get_close_matches(str(reader), readers, n=3, cutoff=0.3)
            near = near or readers[:3]
            raise SiteError(f"{reader!r} reads nothing in this model; the nearest are {near}.")
        path = EdgePath(writer, _writer_sites(lens, writer, groups), reader)
        _require_downstream(lens, path)
        _require_no_hook_behind(lens, path)
        paths.append(path)
    return paths


def _reader_names(lens: LoraLens, point: str | None) -> list[str]:
    """Every reader of the model, or every one up to a point: blocks first, then heads."""
    host = lens.host
    last = LOGITS if point is None else point
    blocks: list[str] = []
    for layer in range(reader_layer(lens, last)):
        blocks += stream_readers(host, layer).modules
    heads: list[str] = []
    for name in blocks:
        heads += [head for head in head_readers(lens, name) if head != name]
    return [*blocks, last, *heads]


def _writer_sites(lens: LoraLens, writer: str, groups: Groups) -> tuple[int, ...]:
    """The sites of a group of this name, or those that a name or glob matches."""
    if writer in groups:
        return tuple(groups[writer])
    try:
        return lens.sites.chosen([writer])
    except SiteError as error:
        names = list(groups)
        if names == [site.name for site in lens.sites]:
            raise
        raise SiteError(
            f"{writer!r} is none of the groups {names[:6]}, and it matches no site."
        ) from error


def _require_downstream(lens: LoraLens, path: EdgePath) -> None:
    """Refuse a reader that comes before all of the writer's sites."""
    layer = reader_layer(lens, path.reader)
    blocks = {lens.sites[site].layer for site in path.sites}
    if layer < min(blocks):
        raise ArgumentError(
            f"{path.writer}{ARROW}{path.reader}: the reader comes before the site, and what a "
            "site writes is read downstream."
        )


def _require_no_hook_behind(lens: LoraLens, path: EdgePath) -> None:
    """Refuse a path within a block if the caller has a hook after it.

    What a reader in the site's own block saw is subtracted from the stream after that block, so
    nothing may change it before.
    """
    host = lens.host
    layer = reader_layer(lens, path.reader)
    blocks = {lens.sites[site].layer for site in path.sites}
    if is_end(path.reader) or layer not in blocks:
        return
    behind = [f"blocks.{layer}.hook_resid_post"]
    if layer + 1 < host.n_layers:
        behind.append(host.block_input(layer + 1))
    points = [lens.model.hook_dict[name] for name in behind]
    if lens.is_hooked(lens.model.blocks[layer], *points):
        raise ModelStateError(
            f"{path.writer}{ARROW}{path.reader}: a hook of yours on block {layer}, or at "
            f"{' or '.join(behind)}, may change what this reader saw before it is taken off the "
            "stream again. Remove that hook, or ask for a later reader."
        )
