"""The commands of `lens-lora`, one per file."""
