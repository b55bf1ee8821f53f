"""The first analyses of g: its slopes, the remainder, the fact margin, and interventions."""
