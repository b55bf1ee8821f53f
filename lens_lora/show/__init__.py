"""The parts that figures, tables and pages are made of; no result is known here by its name.

    figures, go, spread     plotly: heatmaps, bars, curves, and how all of them look
    tables                  tables of text, for a terminal, a notebook and a page
    text                    numbers, tokens and prompts as they are written
    page                    self-contained HTML pages
    compose                 several results in one table or one figure

The core's results are drawn in `lens_lora/views/`, those of a question in its own folder. Which
module draws which result is written in `lens_lora/registered.py`.
"""
