"""Where the adapter meets the hooked model: names, bases, gates and hooks."""
