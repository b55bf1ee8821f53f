"""What is read as an adapter other than plain PEFT LoRA, and how adapters are added and written."""
