"""The integral of the slopes along the path from the base to the adapted model."""
