"""g(ε) and how it is differentiated. Returns tensors; knows no result."""
