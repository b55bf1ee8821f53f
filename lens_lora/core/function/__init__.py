"""The function g(ε), its derivatives and corners: tensors alone, no result."""
