"""Judging a number: agreement with interventions, rankings, controls; all of it for one prompt."""
