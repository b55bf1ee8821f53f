"""Long runs that can be resumed: several processes, files in parts, and a run's fingerprint."""
