"""How the outputs change: shifts of logits and of tokens, KL, and derivatives at hook points."""
