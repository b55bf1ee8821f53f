"""Measure how many bytes of tensors an analysis holds at its peak, beside what is resident.

Resident memory also has what torch has freed and the C library has kept, which depends on the order
in which tensors of many sizes come and go. The bytes of tensors are what the analysis itself needs.
Torch's profiler records each tensor that is allocated and freed, so they are the same in every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

import lens_lora as ll
from benchmarks.measuring import MARGIN, peak_memory, plain_backward, text_prompts

__all__ = ["held_table"]

TOKENS = 256
# How many sizes of tensors are listed for an analysis.
SIZES = 6
MIB = 2**20


class Peak(NamedTuple):
    """What a run holds at the moment when its tensors take most.

    Attributes:
        mib: MiB of all tensors that the run has made and not yet freed.
        sizes: how many tensors there are of each number of bytes.
    """

    mib: float
    sizes: Counter[int]


def held_table(lens: ll.LoraLens) -> None:
    """Print a row for each analysis on one prompt, and the tensors that it holds at its peak."""
    prompts = text_prompts(lens, 1, TOKENS)
    runs: dict[str, Callable[[], object]] = {
        "FB": lambda: plain_backward(lens, prompts),
        "first_order": lambda: ll.first_order(lens, prompts, MARGIN),
        "a bank": lambda: ll.bank(lens.model, prompts, MARGIN, progress=False),
        "edges of 61 readers": lambda: ll.edges(lens, prompts, MARGIN, progress=False),
    }
    targets = {"a bank": "≤ 1.2 FB", "edges of 61 readers": "≤ 1.3 FB"}
    print(f"One prompt of {TOKENS} tokens.\n")
    print("| work | target | tensors at the peak | resident at the peak | most of the tensors |")
    print(f"|{' --- |' * 5}")
    bare = 0.0
    bare_resident = 0.0
    for name, run in runs.items():
        # Resident memory first: its first run loads what is loaded once.
        resident = peak_memory(run)
        peak = peak_of_tensors(run)
        bare = bare or peak.mib
        bare_resident = bare_resident or resident
        cells = (
            name,
            targets.get(name, ""),
            f"{peak.mib:.0f} MiB, {peak.mib / bare:.2f} FB",
            f"{resident:.0f} MiB, {resident / bare_resident:.2f} FB",
            sizes_in_words(peak.sizes),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def peak_of_tensors(run: Callable[[], object]) -> Peak:
    """Run once, and return what its tensors take at their peak, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    held = 0
    most = 0
    sizes: Counter[int] = Counter()
    sizes_at_peak: Counter[int] = Counter()
    for change in changes:
        size = change.nbytes()
        held += size
        sizes[abs(size)] += 1 if size > 0 else -1
        if held > most:
            most = held
            sizes_at_peak = sizes.copy()
    return Peak(most / MIB, sizes_at_peak)


def sizes_in_words(sizes: Counter[int]) -> str:
    """The sizes that take most together, each with the number of its tensors."""
    largest = sorted(sizes.items(), key=lambda item: item[0] * item[1], reverse=True)
    listed = [f"{count} of {size / MIB:.2f} MiB" for size, count in largest[:SIZES]]
    return ", ".join(listed)
