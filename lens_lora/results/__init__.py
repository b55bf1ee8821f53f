"""Nouns that several analyses share: labelled, frozen, saved and loaded."""
