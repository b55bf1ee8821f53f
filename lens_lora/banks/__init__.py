"""The base's half of first order, kept once for many adapters."""
