"""The option `--only NAME …` of commands that do the same for many names."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence


def refuse_unknown(
    parser: argparse.ArgumentParser, names: Sequence[str] | None, known: Collection[str]
) -> None:
    """End with an error of the command line if `--only` has a name that is not known.

    `choices` of argparse does not serve here, as the known names depend on other options.

    Args:
        parser: whose error it is.
        names: those of `--only`; None if it was not given.
        known: the names that there are.
    """
    unknown = [name for name in names or () if name not in known]
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; known are {', '.join(known)}")
