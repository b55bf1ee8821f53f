"""Every analysis of one prompt or several, on one page."""
