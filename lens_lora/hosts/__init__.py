"""Models beside the two classes of TransformerLens: how they are built, placed and checked."""
