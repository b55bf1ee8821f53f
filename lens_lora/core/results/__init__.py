"""Frozen results that several analyses share: labels, tables, files."""
