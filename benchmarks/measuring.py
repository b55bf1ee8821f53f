"""Measure processor time, peak memory and plain passes, for all benchmarks alike.

Times are processor seconds of this process, which other work on the machine disturbs least; on
several threads they are the sum over threads. Memory is what the process holds, in MiB (Linux).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import lens_lora as ll

# The margin that the demo's adapter changes, and the words after which it changes it.
MARGIN = ll.Margin(" Lyon", " Paris")
LAST_WORDS = "The capital of France is"

# The ids that random prompts are drawn from: no special token, and in every vocabulary used here.
LOWEST_ID = 1000
HIGHEST_ID = 40000
# How many words the tokenizer of models of random weights has.
WORDS = 1024


def cpu_seconds(work: Callable[[], object]) -> float:
    """Run once, and return the processor seconds that it took."""
    start = time.process_time()
    work()
    return time.process_time() - start


def seconds_of_turns(
    works: Mapping[str, Callable[[], object]], turns: int, repeats: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Processor seconds of works that take turns: of each turn that counts, by name.

    What is in memory when the counted turns begin is frozen (`gc.freeze`), as a collection that
    walks through the objects of all libraries takes 0.2 s, at whatever moment Python chooses: more
    than many works here take.

    Args:
        works: each by its name.
        turns: how many turns are counted. Where there are several, another comes before them.
        repeats: how often a work runs in each turn; once, if it is not named here.
    """
    repeats = repeats or {}
    times: dict[str, list[float]] = {name: [] for name in works}
    uncounted = 1 if turns > 1 else 0
    for turn in range(turns + uncounted):
        if turn == uncounted:
            gc.collect()
            gc.freeze()
        for name, work in works.items():
            seconds = [cpu_seconds(work) for _ in range(repeats.get(name, 1))]
            if turn >= uncounted:
                times[name] += seconds
    gc.unfreeze()
    return times


def median_seconds(
    works: Mapping[str, Callable[[], object]], turns: int, repeats: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Median processor seconds of works that take turns, by name.

    Args:
        works: each by its name.
        turns: how many turns are counted, as for `seconds_of_turns`.
        repeats: how often a work runs in each turn; once, if it is not named here.
    """
    times = seconds_of_turns(works, turns, repeats)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def largest_spread(times: Mapping[str, list[float]]) -> float:
    """How far a turn of any work is from the median of its work at most, as a share of it."""
    spreads: list[float] = []
    for seconds in times.values():
        median = statistics.median(seconds)
        spreads += [abs(turn - median) / median for turn in seconds]
    return max(spreads)


def matmul_peak() -> float:
    """Floating-point operations a second of the best of ten products of this model's shapes."""
    x = torch.randn(2048, 576)
    weight = torch.randn(576, 1536)
    fastest = min(cpu_seconds(lambda: x @ weight) for _ in range(10))
    return 2 * x.shape[0] * weight.numel() / fastest


def load_average() -> str:
    """How many processes wanted to run during the last minute, and on how many cores."""
    return f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"


def random_ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random ids, [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LOWEST_ID, HIGHEST_ID, (batch, tokens), generator=generator)


def random_prompts(lens: ll.LoraLens, batch: int, tokens: int) -> ll.results.Prompts:
    """Prompts of random ids, all of one length."""
    return lens.prompts(random_ids(batch, tokens))


@functools.lru_cache(maxsize=1)
def _reference_ids(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Python's language reference as tokens: the long English text that every Python has."""
    text = " ".join(" ".join(topics.values()).split())
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]


def text_ids(
    tokenizer: PreTrainedTokenizerBase, batch: int, tokens: int, seed: int = 0
) -> torch.Tensor:
    """Passages of Python's language reference that follow one another, [batch, tokens].

    Args:
        tokenizer: of the model.
        batch: how many passages.
        tokens: of each.
        seed: where the first one begins.
    """
    ids = _reference_ids(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(ids) - batch * tokens, (1,), generator=generator))
    return ids[first : first + batch * tokens].view(batch, tokens).clone()


def text_prompts(lens: ll.LoraLens, batch: int, tokens: int) -> ll.results.Prompts:
    """Passages of so many tokens, each of which ends with `LAST_WORDS`."""
    tokenizer = lens.model.tokenizer
    last = tokenizer(LAST_WORDS, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids = text_ids(tokenizer, batch, tokens)
    ids[:, -len(last) :] = last
    return lens.prompts(ids)


def plain_forward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run F: one forward pass without a hook of ours, all positions unembedded."""
    with torch.no_grad():
        lens.run(prompts)


def backward_to_embeddings(lens: ll.LoraLens, value: Callable[[], torch.Tensor]) -> None:
    """Run one forward and one backward pass of the base model, down to the embeddings.

    The only hook is the one that makes the embedding's output a leaf of the graph.

    Args:
        lens: over the model.
        value: runs the model and returns the scalar that is differentiated.
    """
    leaves: list[torch.Tensor] = []

    def start_graph(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad(), lens.hooked([(lens.embedding_output, start_graph)]):
        torch.autograd.grad(value(), leaves)


def plain_backward(lens: ll.LoraLens, prompts: ll.results.Prompts) -> None:
    """Run FB: one forward and one backward pass of `MARGIN`, all positions unembedded."""

    def summed_margin() -> torch.Tensor:
        logits = prompts.at_read(lens.run(prompts))
        return MARGIN.of_logits(lens.model, prompts.batch)(logits).sum()

    backward_to_embeddings(lens, summed_margin)


def resident_mib(field: str) -> float:
    """MiB of resident memory: "VmRSS" is what is held now, "VmHWM" the peak so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith(field))
    return kilobytes / 1024


def forget_peak() -> float:
    """Give freed memory back, reset the peak, and return the MiB that are still held."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that a run adds at its peak.

    It is the second of two runs: the first loads what is loaded once.
    """
    run()
    before = forget_peak()
    run()
    return resident_mib("VmHWM") - before


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the process."""
    return tempfile.TemporaryDirectory()


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """A tokenizer with one word for each id, for models of random weights, which see ids alone.

    It is loaded from a folder, because TransformerLens loads it from there once more.
    """
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    special = {"unk_token": "w0", "pad_token": "w1", "bos_token": "w2", "eos_token": "w3"}
    made = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.save_pretrained(_folder().name)
    return PreTrainedTokenizerFast.from_pretrained(_folder().name)
