"""What `relevance` makes public, for the tests of every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shared_questions import MARGIN, QUIET
from torch import Tensor

import lens_lora as ll

# --- Calls, and the numbers that come back


def _frozen(mode: Any) -> Callable[[ll.LoraLens, Tensor], Any]:
    rules = ll.results.FrozenRules(norm_scales=True)
    return lambda lens, t: ll.first_order(lens, t, MARGIN, mode=mode, rules=rules, **QUIET)


CALLS = {
    "frozen": _frozen("reverse"),
    "frozen, forward": _frozen("forward"),
    "relp": lambda lens, t: ll.first_order(lens, t, MARGIN, rules=ll.results.FrozenRules.relp()),
}
