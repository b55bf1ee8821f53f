"""Long runs that can be resumed: several processes, files in parts, and what they depend on."""
