"""Directions in activations: found by contrast, read off weights, removed, put into words."""
