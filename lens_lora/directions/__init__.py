"""Directions in the residual stream: read off weights, contrasted, removed, said."""
