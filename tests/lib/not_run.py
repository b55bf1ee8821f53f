"""What a run does not run, by reason, in a few lines at its end.

1. Left out, as other runs have it: what the quick suite leaves to `.ci/run`, what the other class
   of hooked model stands for, and tests of other lines of transformer-lens, which nothing on this
   machine could run (`models.of_some_lines`).
2. Skipped: a test that could run here, if something was installed or another processor was there.

With several workers each of them leaves out the same tests, and tells the main process.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import Any

import pytest

_TOLD = "left_out"
_COUNTS = pytest.StashKey[collections.Counter[str]]()


def counted(config: pytest.Config, items: set[pytest.Item], reason: str) -> set[pytest.Item]:
    """The same tests, counted as left out for this reason."""
    _counts(config)[reason] += len(items)
    return items


def of_other_lines(config: pytest.Config, items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The tests that this line of transformer-lens cannot run; each mark has its own reason."""
    left_out: set[pytest.Item] = set()
    for item in items:
        for mark in item.iter_markers("of_some_lines"):
            if not mark.args[0] and item not in left_out:
                left_out |= counted(config, {item}, mark.kwargs["reason"])
    return left_out


def _counts(config: pytest.Config) -> collections.Counter[str]:
    return config.stash.setdefault(_COUNTS, collections.Counter())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells the main process."""
    told = getattr(session.config, "workeroutput", None)
    if told is not None:
        told[_TOLD] = dict(_counts(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The main process listens; every worker tells the same."""
    told = getattr(node, "workeroutput", {}).get(_TOLD)
    if told:
        node.config.stash[_COUNTS] = collections.Counter(told)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """A table: how many, and why."""
    skipped = collections.Counter(map(reason_of, terminalreporter.stats.get("skipped", [])))
    lines = [*lines_of("left out", _counts(config)), *lines_of("skipped", skipped)]
    if lines:
        terminalreporter.section("not run, by reason")
        for line in lines:
            terminalreporter.write_line(line)


def reason_of(report: Any) -> str:
    """The reason of a skip, as the test gives it."""
    *_, text = report.longrepr
    return text.removeprefix("Skipped: ")


def lines_of(what: str, counts: collections.Counter[str]) -> list[str]:
    """The commonest reason first."""
    return [f"{count:5} {what}: {reason}" for reason, count in counts.most_common() if count]
