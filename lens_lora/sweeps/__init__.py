"""Many prompts through chosen analyses, into Parquet; resumable, on one process or several."""
