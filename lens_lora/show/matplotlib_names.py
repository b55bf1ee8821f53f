"""Plotly's figure, with an answer to the names that a figure of Matplotlib has.

`lens_lora.show.go` imports this module at the first figure, as it imports Plotly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import plotly.graph_objects

from lens_lora.guesses import OF_FIGURE, missing_attribute

if TYPE_CHECKING:
    # A type checker would take every name for one of the figure.
    from plotly.graph_objects import Figure as Figure
else:

    class Figure(plotly.graph_objects.Figure):
        """A figure of Plotly; a name that it lacks is answered by Plotly's name for it."""

        def __getattr__(self, name: str) -> Any:
            """Refuse, with what may be meant."""
            return missing_attribute(self, name, OF_FIGURE)
