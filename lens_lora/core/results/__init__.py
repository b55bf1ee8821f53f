"""Frozen results that several analyses share: labels, tables, files."""

from lens_lora.core.results import drawing as drawing
