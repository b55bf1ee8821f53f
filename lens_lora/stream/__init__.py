"""Activations at hook points and of sites, and how vectors there are read as tokens."""
