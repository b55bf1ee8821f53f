"""Several adapters at once, which may do more together than each of them does alone."""
