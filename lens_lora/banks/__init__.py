"""Banks keep the base's half of first order, computed once for many adapters."""
