"""The page of edges: the graph of the largest edges, a heatmap and a table, prompt by prompt.

Hovering over a line or a cell shows its number, and the contents lead from prompt to prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from lens_lora.core import drawing
from lens_lora.edge_attribution.edges import Edges
from lens_lora.edge_attribution.figures import edges_heatmap
from lens_lora.edge_attribution.graph_figure import edges_graph, short_name
from lens_lora.show import text
from lens_lora.show.page import (
    Block,
    Part,
    Section,
    folded,
    made_by,
    page_html,
    parts_shown,
    warned,
    without_part,
)
from lens_lora.show.tables import table_of
from lens_lora.show.text import percent, short_prompt, signed

# The number of edges in a graph, in a table and in the headline.
_IN_GRAPH = 30
_IN_TABLE = 100
_IN_HEADLINE = 3
# Which columns the table of edges has, and their headings.
_HEADINGS = {
    "writer": "writer",
    "reader": "reader",
    "value": "value",
    "share": "share",
}


@drawing.report.register(Edges)
def edges_report(edges: Edges, *, title: str | None = None) -> str:
    """Write edges as a page, with a part for each of the first prompts."""
    prompts = len(edges.base)
    count = parts_shown(prompts)
    name = f"{edges.readout}: {text.key_text(edges.key)}"
    overview: list[Block] = []
    if count > 1:
        overview = [edges_graph(edges, _IN_GRAPH), edges_heatmap(edges), *without_part(prompts)]
    parts = [_part(edges, prompt) for prompt in range(count)]
    return page_html(title or name, parts, overview, made_by(edges.meta))


def _part(edges: Edges, prompt: int) -> Part:
    """One prompt's part of the page."""
    units = edges.units
    shift = float(edges.shift[prompt])
    total = float(edges.per_edge[prompt].double().sum())
    strongest = edges.top(_IN_TABLE, prompt)
    sentences = _headline(edges, shift, total, strongest.head(_IN_HEADLINE))
    sections = [
        Section(
            "Every writer and reader",
            [edges_heatmap(edges, prompt)],
            "In the order of a forward pass; grey where the reader is not downstream.",
        ),
        Section(
            f"The {len(strongest)} largest edges",
            [table_of(strongest, _HEADINGS, texts=(0, 1))],
            f"In {units}, by size, with the share of the shift.",
        ),
    ]
    prompt_text = text.shortened(text.prompt_text(edges.str_tokens[prompt]))
    subtitles = (text.key_text(edges.key), f"“{prompt_text}”", made_by(edges.meta))
    return Part(
        name=short_prompt(edges.str_tokens[prompt]),
        subtitle=" · ".join(filter(None, subtitles)),
        headline=sentences,
        numbers=(
            (signed(float(edges.base[prompt])), f"{units}, the base model"),
            (signed(float(edges.adapted[prompt])), f"{units}, the adapted model"),
            (signed(total), f"{units}, the sum of all edges"),
            (signed(shift - total), f"{units}, what the sum misses of the shift"),
        ),
        top=[edges_graph(edges, _IN_GRAPH, prompt)],
        sections=folded("\n".join(sentences), sections, "edges", edges.meta),
        warnings=warned(edges.meta),
    )


def _headline(edges: Edges, shift: float, total: float, largest: pd.DataFrame) -> Sequence[str]:
    """Say how far the adapter moves the readout, what all edges sum to, and which are largest."""
    key = text.key_text(edges.key)
    of_all = f"The {key} sum to {signed(total)} {edges.units}"
    if shift:
        of_all += f", {percent(total / shift)} of the shift"
    sentences = [
        f"The adapter moves {edges.readout} by {signed(shift)} {edges.units}.",
        f"{of_all}.",
    ]
    named: list[str] = []
    for row in largest.to_dict("records"):
        ends = f"{short_name(row['writer'])} → {short_name(row['reader'])}"
        named.append(f"{ends} {signed(row['value'])}")
    if named:
        sentences.append(f"The largest are {', '.join(named)}.")
    return sentences
