"""What each analysis costs, in plain forward passes of the same hooked model on the same tokens.

    python benchmarks/cost.py [--class TransformerBridge] [--tokens 8 64 256] [--batch 1 8]

Interleaved in one run on the embedded model and its adapter (210 sites, rank 8); medians. F is one
forward pass, FB one forward and one backward down to the embeddings, FA one forward pass of the
adapted model without the unembedding. Times are CPU seconds: run it on one thread.

With transformer-lens 4.3 its own attribution patching is timed beside. `--growth` times models,
adapters and ranks of several sizes instead, `--stream 200000` a stream of so many tokens through
activations, `--texts 100` audits over so many texts, `--allocator` a few calls with freed memory
given back and kept, `--responses` whole responses, all cells or some groups of them, `--bank 1000`
a scan of so many adapters. With `--write`, what is printed goes into benchmarks/RESULTS.md and
docs/performance.md.

What is printed says whether glibc kept freed memory (benchmarks/cost_allocator.py).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import io
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import cost_page
import torch
from cost_allocator import allocator_table, keeps_memory
from cost_bank import bank_lines
from cost_growth import growth_tables
from cost_responses import GROUPS, response_table
from cost_stream import stream_lines
from cost_texts import text_table
from cost_works import (
    MARGIN,
    QUICK,
    SLOW,
    Work,
    adapted_forward,
    loop_of_jvps,
    plain_backward,
    plain_forward,
)

import lens_lora as ll
from lens_lora.core.function.reverse import site_slopes
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model, transformer_lens_version

TURNS, ONCE, LONG = 5, 256, 512


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of the process, which other work on the machine disturbs least."""
    start = time.process_time()
    work()
    return time.process_time() - start


def random_prompts(lens: ll.LoraLens, batch: int, tokens: int) -> ll.results.Prompts:
    ids = torch.randint(1000, 40000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return lens.prompts(ids)


def interleaved(
    lens: ll.LoraLens, prompts: ll.results.Prompts, works: Iterable[Work], turns: int
) -> dict[str, float]:
    """Median seconds of each, after one turn that is not counted where there are several."""
    every = [Work("F", plain_forward), Work("FB", plain_backward)]
    every += [Work("FA", adapted_forward), *works]
    times: dict[str, list[float]] = {work.name: [] for work in every}
    for turn in range(turns + (turns > 1)):
        for work in every:
            taken = seconds(lambda work=work: work.run(lens, prompts))
            if turn or turns == 1:
                times[work.name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


def column(lens: ll.LoraLens, batch: int, tokens: int) -> dict[str, str]:
    """The cells of one size of prompts: ratios, and F in milliseconds.

    More than `ONCE` tokens are timed once, and the whole sweeps of more than `LONG` not at all.
    """
    prompts = random_prompts(lens, batch, tokens)
    turns = 1 if batch * tokens > ONCE else TURNS
    quick = interleaved(lens, prompts, QUICK, turns)
    cells = {"F": f"{1e3 * quick['F']:.0f} ms"}
    cells |= {name: f"{quick[name] / quick['F']:.2f} F" for name in ("FB", "FA")}
    cells |= {w.name: _ratio(quick[w.name] * w.share / quick[w.unit], w.unit) for w in QUICK}
    if batch * tokens > LONG:
        return cells | dict.fromkeys((w.name for w in SLOW), "not run")
    loop = statistics.median(seconds(lambda: loop_of_jvps(lens, prompts)) for _ in range(turns)) * (
        len(lens.sites) / 2
    )
    for work in SLOW:
        if work.unit == "FB" and batch * tokens > 64:
            cells[work.name] = "not run"
            continue
        slow = interleaved(lens, prompts, [work], 1)
        base = statistics.median([quick[work.unit], slow[work.unit]])
        cells[work.name] = _ratio(slow[work.name] * work.share / base, work.unit)
        if work is SLOW[0]:
            cells["… times faster than a loop of jvps"] = f"{loop / slow[work.name]:.0f}"
            cells["… share of the matmul peak"] = f"{_share_of_peak(lens, prompts, slow, work):.0%}"
    return cells


def _ratio(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}" if value >= 10 else f"{value:.2f} {unit}"


def _share_of_peak(
    lens: ll.LoraLens, prompts: ll.results.Prompts, times: dict, work: Work
) -> float:
    """Products of the tangents with the weights, per second, over the best of one big product."""
    blocks = sum(p.numel() for n, p in lens.model.blocks.named_parameters() if p.ndim > 1)
    layers = lens.plan.host.n_layers
    passes = sum(layers - max(site.layer, 0) for site in lens.sites) / layers
    unembedded = len(lens.sites) * prompts.batch * lens.model.cfg.d_model * lens.model.cfg.d_vocab
    done = 2 * (passes * blocks * prompts.tokens.numel() + unembedded)
    return done / times[work.name] / matmul_peak()


def matmul_peak() -> float:
    """Floating-point operations a second of the best of ten products of this model's shapes."""
    x, w = torch.randn(2048, 576), torch.randn(576, 1536)
    return 2 * x.shape[0] * w.numel() / min(seconds(lambda: x @ w) for _ in range(10))


def peak_memory(run: Callable[[], object]) -> float:
    """MiB of resident memory that a run adds at its peak (Linux)."""
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def memory_lines(lens: ll.LoraLens) -> None:
    """The reverse pass's memory beside that of a bare backward, on 256 tokens."""
    prompts = random_prompts(lens, 1, 256)
    reading = MARGIN.over(lens.model, prompts)
    bare = peak_memory(lambda: plain_backward(lens, prompts))
    ours = peak_memory(lambda: site_slopes(lens, reading, lens.gates(0.0)))
    print(
        f"\nPeak memory of one readout, all sites, on 256 tokens: {ours:.0f} MiB beside "
        f"{bare:.0f} MiB of the bare FB ({ours / bare:.2f}; target ≤ 1.05)."
    )
    edges = peak_memory(lambda: ll.edges(lens, prompts, MARGIN, progress=False))
    bank = peak_memory(lambda: ll.bank(lens.model, prompts, MARGIN))
    print(
        f"\nOn the same tokens `ll.edges` takes {edges:.0f} MiB ({edges / bare:.2f} of the bare "
        f"FB) and `ll.bank` {bank:.0f} MiB ({bank / bare:.2f}), its z and gradients included."
    )
    prompts = random_prompts(lens, 1, 64)
    last = lens.with_adapter(lens.adapter.only("*.layers.2[0-9].*"))
    took = {
        bound: peak_memory(
            lambda bound=bound: ll.logit_shift(
                last, prompts, max_memory=bound * 2**20, progress=False
            )
        )
        for bound in (250, 400, 800)
    }
    print(
        "\nPeak memory of the shift of 70 sites on 64 tokens, with its result of 13 MiB, within "
        f"max_memory: {', '.join(f'{t:.0f} of {b} MiB' for b, t in took.items())}."
    )


def attach_line(lens: ll.LoraLens, folder: Path) -> None:
    """A lens over a booted model, and reading the adapter's file."""
    forward = statistics.median(
        seconds(lambda: plain_forward(lens, random_prompts(lens, 1, 8))) for _ in range(TURNS)
    )
    attach = statistics.median(
        seconds(lambda: ll.LoraLens(lens.model, lens.adapter)) for _ in range(TURNS)
    )
    read = statistics.median(seconds(lambda: ll.load_adapter(folder)) for _ in range(TURNS))
    held = sum(m.A.nbytes + m.B.nbytes for m in lens.maps) / 2**20
    print(
        f"\nAttaching a lens: {attach / forward:.2f} F of 8 tokens (target ≤ 0.5), and "
        f"{1e3 * read:.0f} ms to read the file; it holds {held:.1f} MiB, the factors."
    )


def peer_table(lens: ll.LoraLens, sizes: Sequence[tuple[int, int]]) -> None:
    """transformer-lens 4's node sweep on the same model and prompts, where there is one."""
    try:
        from transformer_lens.tools.analysis import attribution_patching
    except ImportError:
        return
    print(
        "\n| beside `attribution_patch` | its time | the slopes alone, share of it | "
        "`ll.first_order`, the public call with its exact shift, share of it |"
    )
    print("| --- | --- | --- | --- |")
    for batch, tokens in sizes:
        prompts = random_prompts(lens, batch, tokens)
        other = prompts.tokens.roll(1, 1)
        read = MARGIN.bind(lens.model, 1)

        def peer(prompts=prompts, other=other, read=read):
            attribution_patching.attribution_patch(
                lens.model, prompts.tokens, other, lambda logits: read(logits[:, -1]).sum()
            )

        reading = MARGIN.over(lens.model, prompts)

        def slopes(reading=reading):
            site_slopes(lens, reading, lens.gates(0.0))

        def call(prompts=prompts):
            ll.first_order(lens, prompts, MARGIN, progress=False)

        times = [(seconds(peer), seconds(slopes), seconds(call)) for _ in range(TURNS + 1)][1:]
        theirs, slopes_alone, whole_call = (statistics.median(t) for t in zip(*times, strict=True))
        shares = f"{slopes_alone / theirs:.2f} | {whole_call / theirs:.2f}"
        print(f"| {batch} × {tokens} tokens | {1e3 * theirs:.0f} ms | {shares} |")


def table(lens: ll.LoraLens, sizes: Sequence[tuple[int, int]]) -> None:
    columns = {size: column(lens, *size) for size in sizes}
    targets = {work.name: work.target for work in (*QUICK, *SLOW)}
    targets["… times faster than a loop of jvps"] = "≥ 9"
    head = " | ".join(f"{batch} × {tokens}" for batch, tokens in sizes)
    print("Columns: prompts × tokens.\n")
    print(f"| work | target | {head} |\n| --- | --- |{' --- |' * len(sizes)}")
    names = list(dict.fromkeys(name for cells in columns.values() for name in cells))
    for name in names:
        cells = " | ".join(columns[size].get(name, "not run") for size in sizes)
        print(f"| {name} | {targets.get(name, '')} | {cells} |", flush=True)


class Kept(io.StringIO):
    """Standard output, of which a copy is kept."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        sys.__stdout__.flush()
        return super().write(text)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--class", dest="kinds", nargs="+", default=None)
    options.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 256])
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    options.add_argument("--stream", type=int, metavar="TOKENS", help="of activations, alone")
    options.add_argument("--texts", type=int, help="audits over so many texts, alone")
    options.add_argument("--bank", type=int, metavar="ADAPTERS", help="a scan of so many, alone")
    options.add_argument("--growth", action="store_true")
    options.add_argument("--allocator", action="store_true", help="glibc's, of two kinds, alone")
    options.add_argument("--responses", nargs="*", choices=list(GROUPS), default=None)
    options.add_argument("--write", action="store_true", help="into RESULTS.md and performance.md")
    asked = options.parse_args()
    with contextlib.redirect_stdout(Kept()) as kept:
        measured(asked)
    if asked.write:
        arguments = " ".join(a for a in sys.argv[1:] if a != "--write")
        printed = cost_page.Printed(day=str(datetime.date.today()), body=kept.getvalue())
        cost_page.add(cost_page.key_of(transformer_lens_version(), arguments), printed)


def measured(asked: argparse.Namespace) -> None:
    kept = "" if asked.allocator else f"freed memory {('given back', 'kept')[keeps_memory()]}, "
    print(
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}, {platform.machine()}, "
        f"{kept}matmul peak {matmul_peak() / 1e9:.0f} GFLOP/s in float32.\n"
    )
    if asked.growth or asked.allocator:
        allocator_table() if asked.allocator else growth_tables()
        return
    folder = Path(ll.__file__).parent / "demonstration" / "lyon_adapter"
    adapter = ll.load_adapter(folder)
    sizes = [(batch, tokens) for batch in asked.batch for tokens in asked.tokens]
    for kind in asked.kinds or ("HookedTransformer", "TransformerBridge"):
        try:
            model, _ = hooked_model(*load_embedded(quiet=True), kind=kind)
        except ll.errors.ModelStateError as error:
            print(f"{kind}: {error}\n")
            continue
        lens = ll.LoraLens(model, adapter, prepend_bos=True)
        print(f"{kind}\n")
        if asked.stream:
            stream_lines(lens, asked.stream)
            continue
        if asked.bank:
            bank_lines(lens, asked.bank)
            continue
        if asked.texts:
            text_table(lens, asked.texts, turns=3 if asked.texts <= 16 else 1)
            continue
        if asked.responses is not None:
            response_table(lens, asked.responses, peak_memory)
            continue
        table(lens, sizes)
        memory_lines(lens)
        attach_line(lens, folder)
        if kind == "TransformerBridge":
            peer_table(lens, [size for size in sizes if math.prod(size) <= LONG])
        print()


if __name__ == "__main__":
    main()
