"""Notebooks and pages are tests too, wherever they lie."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # also for kernels: two workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ("executed",)
