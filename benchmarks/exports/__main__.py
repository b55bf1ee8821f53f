"""Run `python -m benchmarks.exports`: see `table.py`."""

from benchmarks.exports.table import main

main()
