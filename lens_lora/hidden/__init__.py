"""Inside the model: rank activations, shifts of hook points, features, and readouts of them."""
