"""What each analysis costs in plain forward passes: benchmarks/RESULTS.md."""
