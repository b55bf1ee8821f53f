"""Plotly's figure, which answers the names of Matplotlib's figures with Plotly's.

`lens_lora.show.go` imports this module at the first figure, as it imports Plotly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects

from lens_lora.guesses import OF_FIGURE, missing_attribute

if TYPE_CHECKING:
    # With `__getattr__` a type checker would accept every name as the figure's.
    from plotly.graph_objects import Figure as Figure
else:

    class Figure(plotly.graph_objects.Figure):
        """A figure of Plotly; a name that it lacks is answered by Plotly's name for it."""

        def __getattr__(self, name: str) -> Any:
            """Refuse a name that the figure lacks, and say which one may be meant."""
            return missing_attribute(self, name, OF_FIGURE)
