"""Inside the model: activations of ranks, and how hook points shift."""
