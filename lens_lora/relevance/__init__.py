"""First order with parts of the model held fixed, as relevance patching has them."""
