"""One public verb a file, with the noun that is its alone."""
