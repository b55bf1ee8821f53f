"""Results as tables, for a terminal and a page."""
