"""The words for a comparison, for flags, a null test and the curves of rankings."""

from __future__ import annotations

from lens_lora.core import SIGMAS, drawing
from lens_lora.errors import many
from lens_lora.judging.compare import Comparison
from lens_lora.judging.faithfulness import Faithfulness
from lens_lora.judging.null_test import NullTest
from lens_lora.judging.reliability import Reliability
from lens_lora.judging.verdict import NullVerdict
from lens_lora.show.text import below_text, key_text


@drawing.text.register(NullVerdict)
def null_text(v: NullVerdict) -> str:
    """How far the shift stands out from random directions."""
    if v.kind == "no_shift":
        return below_text("shift", v.shift, v.floor)
    ratio = f"{v.ratio:.0f}" if v.ratio >= 10 else f"{v.ratio:.2g}"
    least = "at least " if v.is_least else ""
    times = f"{least}{ratio} times what random directions of the same size give"
    if v.kind == "as_random":
        of_shift = f"no more than random directions: the shift is {times} (p = {v.p:.2g})"
    else:
        of_shift = f"the adapter's shift is {times}"
    of_sites = (
        f"{v.exceeds_all:.0%} of sites exceed every one of {v.draws} draws "
        f"({v.chance:.1%} would by chance)"
    )
    return f"{of_shift}; {of_sites}"


@drawing.body.register(NullTest)
def _null_test(test: NullTest) -> str:
    return "\n".join(f"  prompt {i}: {verdict}" for i, verdict in enumerate(test.verdict))


@drawing.body.register(Faithfulness)
def _faithfulness(curves: Faithfulness) -> str:
    table = curves.summary().rename(index=key_text).to_string()
    noisy = int((curves.shift.abs() <= SIGMAS * curves.noise_floor).sum())
    if not noisy:
        return table
    verb = "has" if noisy == 1 else "have"
    return f"{table}\n{many(noisy, 'prompt')} {verb} no shift above the noise: left out."


@drawing.body.register(Reliability)
def _reliability(flags: Reliability) -> str:
    counts = ", ".join(map(str, flags.flagged.sum(1).tolist()))
    return f"{counts} of {many(flags.flagged.shape[1], 'site')} flagged"


@drawing.body.register(Comparison)
def _comparison(comparison: Comparison) -> str:
    attribution = key_text(comparison.attribution_name)
    effects = key_text(comparison.effects_name)
    head = f"{attribution} against {effects}"
    if comparison.made_on:
        head += f"; made on {many(len(comparison.made_on), 'other prompt')}"
    summary = comparison.summary()
    if len(comparison.attribution) == 1:
        table = f"{summary['mean'].to_string()}\none prompt: no interval."
    else:
        table = summary.to_string()
    every = comparison.effects.numel()
    # Effects that state no floor count as clear.
    clear_share = float(comparison.beyond_noise.nan_to_num(1.0).mean())
    small = every - round(clear_share * every)
    if not small:
        return f"{head}\n{table}"
    note = (
        f"{small} of {every} effects are within three noise floors: their sign, and their order in "
        "a rank correlation, may be rounding."
    )
    return f"{head}\n{table}\n{note}"
