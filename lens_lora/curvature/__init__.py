"""The curvature of g, and the coupling between groups of sites."""
