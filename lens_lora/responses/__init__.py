"""Responses of several tokens: log-probabilities, KL, shifts of logits and tokens, generation."""
