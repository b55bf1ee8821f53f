"""Edges split first order by the reader of the residual stream through which a site acts."""
