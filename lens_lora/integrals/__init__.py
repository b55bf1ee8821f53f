"""Integrals of what is expensive to evaluate: nested rules, and the path from base to adapted."""
