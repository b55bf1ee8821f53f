"""What is asked of the logits, and of which prompts."""
