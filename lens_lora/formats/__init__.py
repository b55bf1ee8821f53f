"""All that is read as an adapter beside plain PEFT LoRA, and how adapters are added and written."""
