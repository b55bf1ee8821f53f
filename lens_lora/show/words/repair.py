"""What a repair achieved, in words that claim no more than the numbers."""

from __future__ import annotations

from lens_lora.analyses.repair import Repair
from lens_lora.results import drawing
from lens_lora.show.text import percent

__all__ = ["repair_story"]


@drawing.story.register(Repair)
def repair_story(found: Repair) -> str:
    """Kept and left on the prompts that judge, and whether that is better than scaling.

    Args:
        found: to be told.
    """
    where = "On held-out prompts" if found.is_held_out else "On the prompts that it was made on"
    said = (
        f"{where} the repaired adapter keeps {percent(found.kept_share)} of what was to be kept "
        f"and leaves {percent(found.left_share)} of what was to be dropped."
    )
    if found.verdict == "nothing":
        return (
            f"{said} No smaller set of {found.of}s that was tried kept "
            f"{percent(found.keep_share)} and left less, so the adapter is whole: ask for a "
            "smaller keep_share, or more steps."
        )
    if found.exceeds:
        return (
            f"{said} No strength of the whole adapter up to 1 keeps as much. At 1 it leaves "
            f"{found.gain:.3g} times as much.{_optimism(found)}"
        )
    beside = {
        "helps": f"The whole adapter, scaled down to keep the same, leaves {found.gain:.3g} times "
        "as much.",
        "tie": "That is a tie with scaling the whole adapter down to keep the same.",
        "worse": "Scaling the whole adapter down to keep the same leaves less: the repair does not "
        "help here.",
    }[found.verdict]
    return f"{said} {beside}{_optimism(found)}"


def _optimism(found: Repair) -> str:
    return "" if found.is_held_out else " Give test_keep and test_drop to judge it fairly."
