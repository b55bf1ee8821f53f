"""How far the outputs move: shifts of logits and of tokens, KL, and derivatives at hook points."""
