"""What happened in a training, in words that claim no more than the numbers."""

from __future__ import annotations

import math

from lens_lora.results import drawing
from lens_lora.results.checkpoints import Checkpoints
from lens_lora.show.text import short_prompt

__all__ = ["checkpoints_story"]


@drawing.story.register(Checkpoints)
def checkpoints_story(found: Checkpoints) -> str:
    """Where each prompt flips, in steps and in strength, and where anything changes at once.

    Args:
        found: to be told.
    """
    lines = []
    for p, tokens in enumerate(found.str_tokens):
        step, end = float(found.flip_step[p]), float(found.flip_scale[-1, p])
        said = f"“{short_prompt(tokens)}”: {found.readout} "
        if math.isnan(step) and bool(found.hidden[:, p].any()):
            said += (
                "changes sign at no checkpoint beyond rounding, which hides its sign at the base "
                "or later."
            )
        elif math.isnan(step):
            said += f"keeps its sign through all {len(found.steps)} checkpoints."
        else:
            said += f"changes sign at about step {step:.3g}"
            said += f"; of the last checkpoint at ε = {end:.2g}." if end == end else "."
        lines.append(said + _phases(found, f"prompt {p}", "It"))
    turns = _phases(found, "angle", "The direction of ΔW")
    return "\n".join([*lines, *([turns.strip()] if turns else [])])


def _phases(found: Checkpoints, series: str, subject: str) -> str:
    spans = [f"{a:g} and {b:g}" for a, b in found.phases.get(series, ())]
    return f" {subject} changes at once between steps {', and '.join(spans)}." if spans else ""
