"""`python -m lens_lora`, as `accelerate launch -m lens_lora` and torchrun need it."""

from lens_lora.cli import app

app(prog_name="lens-lora")
