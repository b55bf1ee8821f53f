"""Results as pictures, tables, words and pages. Reads results only, never a model.

`figures` plotly figures, `words` stories and verdicts, `tables` text, notebook and terminal tables,
`page` self-contained HTML pages. `registered` imports all that `core/results/drawing.py`
dispatches to, and says what a result says of itself.
"""
