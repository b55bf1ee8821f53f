"""Several adapters at once: what they do together beyond what each of them does alone."""
