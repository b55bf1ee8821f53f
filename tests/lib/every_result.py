"""One of every final class of results, made by hand: of chosen numbers, and no model.

Each question's stand in its own folder of tests (`by_folder.py`); those that an explanation holds
are in `results_by_hand.py`.
"""

from __future__ import annotations

import by_folder
from results_by_hand import explanation, two_prompts

from lens_lora.core import Result


def every_result() -> list[Result]:
    """One of each class."""
    explained = explanation()
    found: list[Result] = [
        two_prompts(),
        explained,
        explained.margin,
        explained.margin.curve,
        explained.shift,
        explained.second_order,
        explained.reliability["leave_one_out"],
        explained.coupling,
        explained.add_one,
        explained.faithfulness,
        explained.null,
        explained.comparisons[0],
        *by_folder.results(),
    ]
    assert all(isinstance(result, Result) for result in found)
    return found
