"""All of it for one prompt, on one page."""
