"""Results as pictures, tables, words and pages. Reads results only, never a model.

`figures` plotly figures, `tables` text, notebook and terminal tables, `words` a fact margin's
story, `report` one self-contained HTML page.
"""
