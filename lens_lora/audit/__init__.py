"""What was it taught: asked without a prompt."""
