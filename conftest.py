"""Notebooks and pages are tests too, wherever they lie."""

pytest_plugins = ("executed",)
