"""Edges: first order, split by the reader of the residual stream through which a site acts."""
