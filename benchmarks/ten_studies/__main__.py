"""Run `python -m benchmarks.ten_studies`: see `studies.py`."""

from benchmarks.ten_studies.studies import main

main()
