"""What the model says: responses of several tokens, KL, token shifts, generation."""
