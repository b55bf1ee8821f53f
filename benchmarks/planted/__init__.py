"""Adapters whose cause was put there, and whether attributions find it."""
