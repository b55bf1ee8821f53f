"""Results as pictures, tables, words and pages. Reads results only, never a model.

`figures` plotly figures, `words` stories and verdicts, `tables` text, notebook and terminal tables,
`page` self-contained HTML pages, `reprs` what a result says of itself. Which module draws which
result is written in `lens_lora/registered.py`.
"""
