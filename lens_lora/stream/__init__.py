"""Activations at hook points and of sites, and vectors at hook points read as tokens."""
