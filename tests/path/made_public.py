"""What `path` makes public, for the tests of every call."""

from __future__ import annotations

from shared_questions import MARGIN, MARGIN_OF_WORDS, PROMPT, QUIET, RESPONSE

import lens_lora as ll

# --- Calls, and the numbers that come back

CALLS = {
    "path_attribution": lambda lens, t: ll.path_attribution(lens, t, MARGIN, tol=0.5, **QUIET),
    "path of a KL": lambda lens, t: ll.path_attribution(
        lens, t, ll.KL(RESPONSE, "adapted_to_base"), tol=0.5, **QUIET
    ),
}


# --- Calls that show a bar

WITH_BAR = {
    "path_attribution": lambda t, folder, **o: ll.path_attribution(
        t.lens, PROMPT, MARGIN_OF_WORDS, **o
    ),
}
