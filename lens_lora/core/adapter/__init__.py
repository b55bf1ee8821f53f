"""What a fine-tune added to each module: plain LoRA as PEFT writes it. Knows no model."""
