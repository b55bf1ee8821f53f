"""Ten studies of the field in small, each beside a second way: docs/ten_studies.md."""
