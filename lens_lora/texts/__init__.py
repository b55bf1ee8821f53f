"""Sums over many tokens of ordinary text."""
