"""The rule of phase changes on planted series."""

from __future__ import annotations

import math

import pytest

from lens_lora.two_adapters.checkpoints import phase_changes

STEPS = list(range(0, 110, 10))


def logistic(at: float, width: float) -> list[float]:
    return [8 / (1 + math.exp(-(s - at) / width)) - 4 for s in STEPS]


@pytest.mark.parametrize(
    "values",
    [
        [0.3 * s for s in STEPS],
        [1.0] * len(STEPS),
        logistic(50, 60),
        [math.sin(7 * s) * 1e-3 for s in STEPS],
    ],
    ids=["a line", "a constant", "a slow rise", "noise"],
)
def test_what_changes_evenly_has_none(values):
    assert phase_changes(STEPS, values, floors=[1e-3] * len(STEPS)) == ()


def test_a_jump_is_found_where_it_is():
    assert phase_changes(STEPS, logistic(45, 0.5)) == ((40, 50),)
    down = [-v for v in logistic(65, 0.5)]
    assert phase_changes(STEPS, down) == ((60, 70),)


def test_a_jump_over_two_intervals_is_one_span():
    values = [0, 0.1, 0.2, 0.3, 3, 6, 6.1, 6.2, 6.3, 6.4, 6.5]
    assert phase_changes(STEPS, values) == ((30, 50),)


def test_two_jumps_are_two():
    values = [0, 0, 0, 5, 5, 5, 5, 0, 0, 0, 0]
    assert phase_changes(STEPS, values) == ((20, 30), (60, 70))


def test_a_jump_within_rounding_is_none():
    values = [0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5]
    assert phase_changes(STEPS, values, floors=[2.0] * len(STEPS)) == ()


def test_a_change_has_the_rounding_of_both_its_values():
    """5 is more than three σ of one value, and less than three of a difference."""
    values = [0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 5]
    assert phase_changes(STEPS, values, floors=[1.3] * len(STEPS)) == ()
    assert phase_changes(STEPS, values, floors=[1.1] * len(STEPS)) == ((20, 30),)
    one_end = [9.0 if at == 3 else 0.0 for at in range(len(STEPS))]
    assert phase_changes(STEPS, values, floors=one_end) == ()
    elsewhere = [9.0 if at == 8 else 0.0 for at in range(len(STEPS))]
    assert phase_changes(STEPS, values, floors=elsewhere) == ((20, 30),)


def test_a_small_step_on_a_long_way_is_none():
    """Three times as fast as usual, and not a quarter of the range."""
    steps = range(0, 210, 10)
    for jump, expected in ((6, ((40, 50),)), (2.5, ())):
        values = [s / 10 + (jump if s >= 50 else 0) for s in steps]
        assert phase_changes(steps, values) == expected


def test_uneven_steps_are_paces():
    """Twice the change in a tenth of the steps."""
    steps = [0, 100, 200, 300, 310, 400, 500]
    assert phase_changes(steps, [0, 1, 2, 3, 5, 6, 7]) == ((300, 310),)
    assert phase_changes([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 5, 6, 7]) == ()


def test_a_few_checkpoints_have_no_usual_pace():
    """What is not judged is not said to have none."""
    assert phase_changes([0, 1, 2, 3], [0, 0, 9, 9]) is None
    assert phase_changes([0, 1, 2, 3, 4], [0, 0, 9, 9, 9]) == ((1, 2),)
