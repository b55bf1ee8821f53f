"""What `lens-lora` can be told to do, one command a file."""
