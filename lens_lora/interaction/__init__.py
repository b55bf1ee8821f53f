"""Several adapters at once: what they do together beyond what each does alone."""
