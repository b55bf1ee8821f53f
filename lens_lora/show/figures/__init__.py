"""Results as plotly figures, one file a result."""
