"""The core's results as figures, tables, words and pages. Reads results only, never a model.

    maps, curves, labelled                  figures
    words, attribution_words                stories, verdicts and single sentences
    tables                                  the tables of an attribution and of a fact margin
    reprs                                   what a result says of itself, in a terminal or notebook
    reports                                 pages

The core draws nothing and each question draws its own results, so these stand between the two.
"""
