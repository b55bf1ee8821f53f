"""Integrals of expensive functions: nested rules, and the path from base to adapted model."""
