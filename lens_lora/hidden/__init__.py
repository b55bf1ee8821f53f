"""Inside the model: rank activations, shifts of activations, features, and readouts of them."""
