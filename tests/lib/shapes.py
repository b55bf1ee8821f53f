"""Annotations of the package, shapes included, checked at run time in every call.

jaxtyping's import hook puts beartype before every function of `lens_lora`. It is on where the
variable LENS_LORA_SHAPES is "checked", in this process and not in those that a test starts. A test
of bad input is marked `bad_input` and runs without it, so as to meet the package's own errors.

An annotation that cannot be resolved where it stands is taken for Any: a class's own name inside
it, and what a file imports for type checkers alone, other packages' classes that are slow to import
(plotly's Figure, PEFT's configurations, transformers' models). No shape is among them.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator

import jaxtyping

# An int passes for a float, as PEP 484 says.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CHECKED = os.environ.get("LENS_LORA_SHAPES") == "checked"


def check() -> None:
    """Install the hook; to be called before `lens_lora` is first imported.

    Torch calls `OneProduct` for every operation, those of a check of arguments among them: it is
    left unchecked, and its rules are checked.
    """
    if CHECKED:
        jaxtyping.install_import_hook("lens_lora", CHECKER)
        from lens_lora.engine.duals import OneProduct

        OneProduct.__torch_function__ = inspect.unwrap(OneProduct.__torch_function__)


def share(cases: int) -> int:
    """How many of so many random cases are run: all, or a fifth under the check.

    A call then takes three to four times as long, and the plain run has had all of them.
    """
    return max(2, cases // 5) if CHECKED else cases


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the check inside, for bad input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
