"""Derivatives, corners and integrals of g(ε) = readout(f(ε)); no plotting, no files."""
