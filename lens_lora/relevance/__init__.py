"""First order with parts of the model held fixed, as in relevance patching."""
