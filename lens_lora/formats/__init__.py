"""Adapters of other formats than plain PEFT LoRA, and how adapters are added up and written."""
