"""Measure what it costs that glibc gives freed memory back to the system.

By default glibc gives back the memory of a tensor of more than 32 MiB when the tensor is freed, and
takes memory for the next one anew, page by page. The variables in `KEEP` make it keep the memory.
Each column of the table is a process of its own over the embedded model as a TransformerBridge, on
one thread. Times are medians of three turns, after one that is not counted; the split by token and
layer runs once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch

import lens_lora as ll
from benchmarks.measuring import median_seconds, plain_forward, text_ids

__all__ = ["KEEP", "allocator_table", "keeps_memory"]

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
TURNS = 3
RUN_ONCE = "by token and layer"
# Tokens of the prompt, and of the responses.
PROMPT = 44
LENGTHS = (60, 512)


def keeps_memory() -> bool:
    """Whether this process was started with `KEEP`."""
    return all(os.environ.get(name) == value for name, value in KEEP.items())


def allocator_table() -> None:
    """Run both processes; print their times, and what keeping leaves of them."""
    given_back = times_in_process({})
    kept = times_in_process(KEEP)
    print("| work | freed memory given back | kept | share |\n| --- | --- | --- | --- |")
    for name, seconds in given_back.items():
        share = kept[name] / seconds
        print(f"| {name} | {seconds:.2f} s | {kept[name]:.2f} s | {share:.2f} |")


def times_in_process(variables: dict[str, str]) -> dict[str, float]:
    """The times of a process that is started with these variables of glibc."""
    inherited = os.environ.items()
    environment = {name: value for name, value in inherited if not name.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cost.allocator"],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def times() -> dict[str, float]:
    """Median seconds of each work in this process."""
    lens = ll.demo()
    found: dict[str, float] = {}
    for tokens in LENGTHS:
        for name, work in works_of_response(lens, tokens).items():
            seconds = median_seconds({name: work}, turns=1 if name == RUN_ONCE else TURNS)
            found[f"{name}, {PROMPT} + {tokens} tokens"] = seconds[name]
    return found


def works_of_response(lens: ll.LoraLens, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed, over a prompt and a response of so many tokens, both of ordinary text."""
    tokenizer = lens.model.tokenizer
    prompt = text_ids(tokenizer, 1, PROMPT, seed=0)
    response = text_ids(tokenizer, 1, tokens, seed=1)[0]
    readout = ll.AnswerLogProb(response)
    # The last token of the response is only predicted, so it is not read.
    both = lens.prompts(torch.cat([prompt[0], response[:-1]])[None])
    return {
        "F": lambda: plain_forward(lens, both),
        "one readout, all sites": lambda: lens.function(prompt, readout, progress=False).slopes(),
        "activations, all sites": lambda: ll.lora_activations(lens, both),
        RUN_ONCE: lambda: ll.first_order(
            lens, prompt, readout, by="token", group="layer", progress=False
        ),
    }


if __name__ == "__main__":
    print(json.dumps(times()))
