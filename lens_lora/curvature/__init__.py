"""Curvature of g, and which groups of sites are coupled."""
