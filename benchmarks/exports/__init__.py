"""Exports that other libraries make, and what `lens-lora verify` says of them."""
