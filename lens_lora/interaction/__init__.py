"""What several adapters do together beyond what each of them does alone."""
