"""What a fine-tune added to each module. Knows no model."""
