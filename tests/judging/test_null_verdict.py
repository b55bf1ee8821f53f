"""The verdict on random directions: its kinds and their words."""

from __future__ import annotations

import re

import pytest

from lens_lora.judging.verdict import NullVerdict


@pytest.mark.parametrize(
    ("shift", "null", "p", "kind", "says"),
    [
        (8.0, 2.0, 0.1, "stands_out", "the adapter's shift is 4 times what random directions"),
        (8.0, 1e-9, 0.1, "stands_out", "the adapter's shift is at least 800 times what random"),
        (1.0, 2.0, 0.9, "as_random", r"no more than random directions: .*0.5 times.*\(p = 0.9\)"),
        (0.02, 2.0, 0.1, "no_shift", r"below the noise: the shift 0.02 .*\(0.03\)"),
    ],
)
def test_random_directions(shift: float, null: float, p: float, kind: str, says: str):
    found = NullVerdict.of(
        shift=shift, noise_floor=0.01, null=null, p=p, exceeds_all=0.5, draws=9, run=9
    )
    assert found.kind == kind
    assert re.match(says, str(found))
    counts_sites = "50% of sites exceed every one of 9 draws (10.0% would" in str(found)
    assert counts_sites == (kind != "no_shift")
