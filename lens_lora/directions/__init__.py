"""Directions in activations: find them by contrast or in weights, remove them, name them."""
