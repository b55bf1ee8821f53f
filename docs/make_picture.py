"""The README's picture, docs/images/demo.png, from the demo's own numbers.

    python docs/make_picture.py

Needs plotly's image export (pip install kaleido, and a Chromium that it can find).
"""

from __future__ import annotations

from pathlib import Path

from plotly.subplots import make_subplots

import lens_lora as ll
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.loading import hooked_model

HERE = Path(__file__).parent


def main() -> None:
    model, _ = hooked_model(*load_embedded(quiet=True))
    adapter = ll.load_adapter(Path(ll.__file__).parent / "demonstration" / "lyon_adapter")
    lens = ll.LoraLens(model, adapter)
    margin = ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris", progress=False)
    left, right = margin.plot(), margin.attribution.plot()
    both = make_subplots(
        cols=2,
        column_widths=[0.45, 0.55],
        horizontal_spacing=0.12,
        subplot_titles=(
            "margin Lyon − Paris as the adapter is turned up",
            "first-order shift of each of the 210 modules",
        ),
    )
    for trace in left.data:
        both.add_trace(trace, col=1, row=1)
    for trace in right.data:
        both.add_trace(trace.update(showscale=True), col=2, row=1)
    both.update_layout(coloraxis=right.layout.coloraxis, template="plotly_white")
    both.update_layout(legend={"x": 0.02, "y": 0.98, "bgcolor": "rgba(255,255,255,0.7)"})
    both.update_layout(margin={"l": 60, "r": 20, "t": 50, "b": 60}, font={"size": 15})
    both.update_xaxes(title="ε, strength of the adapter", col=1)
    both.update_yaxes(title="logits", col=1)
    both.add_hline(y=0, line_width=1, line_color="#999999", col=1, row=1)
    both.update_yaxes(title="layer", col=2)
    both.write_image(HERE / "images" / "demo.png", width=1300, height=560, scale=1.5)


if __name__ == "__main__":
    main()
