"""What is asked of g first: its slopes, what they leave, the margin, and interventions."""
