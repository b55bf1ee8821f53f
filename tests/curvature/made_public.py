"""What `curvature` makes public, for the tests of every call."""

from __future__ import annotations

from shared_questions import LONG, MARGIN, MARGIN_OF_WORDS, QUIET

import lens_lora as ll

# --- Calls, and the numbers that come back

CALLS = {
    "second_order": lambda lens, t: ll.second_order(lens, t, MARGIN, **QUIET),
    "coupling": lambda lens, t: ll.coupling(lens, t, MARGIN, group="layer", **QUIET),
}


# --- Calls that show a bar

WITH_BAR = {
    "coupling": lambda t, folder, **o: ll.coupling(t.lens, [LONG] * 10, MARGIN_OF_WORDS, **o),
    "second_order": lambda t, folder, **o: ll.second_order(
        t.lens, [LONG] * 10, MARGIN_OF_WORDS, self_curvature=True, **o
    ),
}
