"""What a bank costs: a scan of many adapters beside `ll.first_order`, nulls, a callback, memory.

1. A folder of adapters: `FEW` with random factors are written once, the others are links to them.
2. The whole scan on `PROMPTS` prompts of `LENGTH` tokens, by the clock and in CPU seconds; then an
   adapter of eight beside the same folder read, laid over the model and run by `ll.first_order`.
3. A draw of `ll.null_test` and a step of `ll.checkpoints`, each as the difference of two runs.
4. `ShiftCallback.measure` beside a training step of the same model under PEFT.
5. Memory: 8 d + 2 d_q + 2 d_kv + 3 d_ff numbers per token and layer, beside what a bank holds.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cost_works import MARGIN
from peft import LoraConfig, get_peft_model

import lens_lora as ll
from lens_lora.core.adapter.peft_files import CONFIG
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded

__all__ = ["bank_lines", "bytes_of"]

FEW, PROMPTS, LENGTH, TOKENS = 24, 16, 32, 2048
LENGTHS = (8, 32)
# layers, d, d_q, d_kv, d_ff
SHAPES = {
    "SmolLM2-135M": (30, 576, 576, 192, 1536),
    "Qwen2.5-0.5B": (24, 896, 896, 128, 4864),
    "Qwen2.5-1.5B": (28, 1536, 1536, 256, 8960),
    "Llama-3.2-3B": (28, 3072, 3072, 1024, 8192),
    "Qwen2.5-7B": (28, 3584, 3584, 512, 18944),
}
QUIET = {"progress": False}


def bytes_of(shape: tuple[int, ...], tokens: int, size: int) -> int:
    """Of a bank of one readout over so many tokens, in numbers of so many bytes."""
    layers, d, d_q, d_kv, d_ff = shape
    return size * tokens * layers * (8 * d + 2 * d_q + 2 * d_kv + 3 * d_ff)


def random_prompts(lens: ll.LoraLens, batch: int, tokens: int) -> ll.results.Prompts:
    ids = torch.randint(1000, 40000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return lens.prompts(ids)


def random_adapter(adapter: ll.Adapter, seed: int) -> ll.Adapter:
    """Of the same modules, ranks and sizes."""
    random = torch.Generator().manual_seed(seed)

    def like(factor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(factor.shape, generator=random)
        return (drawn * factor.norm() / drawn.norm()).to(factor)

    return ll.Adapter.from_factors(
        {
            path: ll.LoRAFactors(like(update.A), like(update.B), update.scale)
            for path, update in adapter.modules.items()
        },
        name=f"random {seed}",
    )


def folder_of(adapter: ll.Adapter, place: Path, count: int) -> list[Path]:
    """So many folders beside one another; the files of all but the first `FEW` are links.

    Each has the demo adapter's config, as PEFT wrote it: `save` would list every module's path.
    """
    written = [
        random_adapter(adapter, seed).save(place / f"a{seed:04}") for seed in range(min(FEW, count))
    ]
    for folder in written:
        shutil.copy(shipped_adapter() / CONFIG, folder)
    for index in range(len(written), count):
        (folder := place / f"a{index:04}").mkdir()
        for file in written[index % FEW].iterdir():
            (folder / file.name).symlink_to(file)
    return written


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def bank_lines(lens: ll.LoraLens, count: int) -> None:
    """Prints all of it."""
    with tempfile.TemporaryDirectory() as held:
        written = folder_of(lens.adapter, Path(held), count)
        whole_scan(lens, Path(held), count)
        beside_first_order(lens, written[:8])
    marginal_costs(lens)
    callback_line(lens)
    memory_table(lens)


def whole_scan(lens: ll.LoraLens, folder: Path, count: int) -> None:
    prompts = random_prompts(lens, PROMPTS, LENGTH)
    bank = ll.bank(lens.model, prompts, MARGIN, **QUIET)
    start, cpu = time.monotonic(), time.process_time()
    frame = bank.scan(folder, out=folder / "scan.parquet", **QUIET)
    taken, cpu = time.monotonic() - start, time.process_time() - cpu
    rows = frame.drop_duplicates(["adapter", "prompt"])
    if len(rows) != count * PROMPTS or frame["error"].notna().any():
        raise RuntimeError(f"{len(rows)} rows of {count} × {PROMPTS}, or an adapter was refused")
    print(
        f"A scan of {count:,} adapters × {PROMPTS} prompts of {LENGTH} tokens, written to Parquet: "
        f"{taken:.0f} s by the clock, {cpu:.0f} s of CPU on one thread (target ≤ 600 s), "
        f"{1e3 * cpu / count:.0f} ms an adapter. {min(FEW, count)} folders hold random factors of "
        "the demo adapter's modules, ranks and sizes; those of the others are links to theirs.\n"
    )


PARTS = ("position", "head", "rank")


def beside_first_order(lens: ll.LoraLens, folders: list[Path]) -> None:
    head = " | ".join(f"{PROMPTS} × {length}" for length in LENGTHS)
    print(f"| in seconds, and in forward passes F | {head} |\n| --- |{' --- |' * len(LENGTHS)}")
    columns = [_column(lens, folders, random_prompts(lens, PROMPTS, n)) for n in LENGTHS]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |", flush=True)


def _column(lens: ll.LoraLens, folders: list[Path], prompts: ll.results.Prompts) -> dict[str, str]:
    """What each way takes for an adapter, with its F; the last row is the ratio of two of them."""
    forward = statistics.median(seconds(lambda: lens.logits(prompts)) for _ in range(3))
    built = seconds(lambda: ll.bank(lens.model, prompts, MARGIN, **QUIET))
    bank = ll.bank(lens.model, prompts, MARGIN, **QUIET)
    bank.scan(folders[:2], **QUIET)
    scanned = seconds(lambda: bank.scan(folders, **QUIET)) / len(folders)

    def each(run: Callable[[ll.Adapter], object]) -> float:
        adapters = [ll.load_adapter(folder) for folder in folders[:3]]
        return statistics.median(seconds(lambda a=adapter: run(a)) for adapter in adapters)

    def from_folder(folder: Path) -> object:
        return ll.first_order(lens.with_adapter(ll.load_adapter(folder)), prompts, MARGIN)

    alone = statistics.median(seconds(lambda f=f: from_folder(f)) for f in folders[:3])
    works = {
        "a forward pass": forward,
        "`ll.bank`, once": built,
        "an adapter in `bank.scan`, from its folder": scanned,
        "`bank.first_order`, loaded": each(bank.first_order),
        "the same by position, head and rank": each(lambda a: bank.first_order(a, by=PARTS)),
        "`ll.first_order`, from its folder": alone,
        "the same by position, head and rank, loaded": each(
            lambda a: ll.first_order(lens.with_adapter(a), prompts, MARGIN, by=PARTS)
        ),
    }
    cells = {name: f"{taken:.3g} s, {taken / forward:.2g} F" for name, taken in works.items()}
    return cells | {"adapters scanned in the time of one": f"{alone / scanned:.0f}"}


def marginal_costs(lens: ll.LoraLens) -> None:
    """A draw, one that is run, and a checkpoint: what one more adds to a call."""
    prompts = random_prompts(lens, 1, 8)
    forward = statistics.median(seconds(lambda: lens.logits(prompts)) for _ in range(5))

    def nulls(draws: int, exact: int) -> float:
        return seconds(
            lambda: ll.null_test(lens, prompts, MARGIN, draws=draws, exact=exact, **QUIET)
        )

    nulls(2, 2)
    few, many, run = nulls(2, 2), nulls(22, 2), nulls(22, 12)
    drawn = statistics.median(seconds(lambda s=s: lens.adapter.null(0, s)) for s in range(5))
    shares = itertools.count(1)

    def steps(count: int) -> float:
        adapters = [lens.adapter.scaled(1e-4 * next(shares)) for _ in range(count)]
        return seconds(lambda: ll.checkpoints(lens, adapters, prompts, MARGIN, **QUIET))

    two, six = steps(2), steps(6)
    print(
        f"\nOn one prompt of 8 tokens, beside an adapted forward pass of {1e3 * forward:.0f} ms: a "
        f"null test of two draws takes {few:.2f} s, one more draw {50 * (many - few):.0f} ms "
        f"({1e3 * drawn:.0f} ms of them to draw it), its exact shift another "
        f"{100 * (run - many):.0f} ms; 1,000 draws of which two are run would take "
        f"{few + 998 * (many - few) / 20:.0f} s. One more checkpoint takes {250 * (six - two):.0f} "
        f"ms, {(six - two) / 4 / forward:.1f} such passes."
    )


def callback_line(lens: ll.LoraLens, batch: int = 4, length: int = 64) -> None:
    hf_model, _ = load_embedded(quiet=True)
    targets = sorted({path.rpartition(".")[2] for path in lens.adapter.modules})
    peft_model = get_peft_model(hf_model, LoraConfig(r=8, target_modules=targets))
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, 1e-4), random_prompts(lens, batch, length).tokens

    def step() -> None:
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    bank = ll.bank(lens.model, random_prompts(lens, 1, 8), MARGIN, **QUIET)
    callback, number = ll.ShiftCallback(bank, every=10), itertools.count(10, 10)
    step()
    callback.measure(next(number), peft_model)
    one = statistics.median(seconds(step) for _ in range(5))
    measured = statistics.median(
        seconds(lambda: callback.measure(next(number), peft_model)) for _ in range(5)
    )
    print(
        f"\n`ShiftCallback.measure` takes {1e3 * measured:.0f} ms, a training step of {batch} × "
        f"{length} tokens {one:.2f} s: with every=10 {measured / (10 * one):.1%} of a step "
        "(target ≤ 5 %)."
    )


def memory_table(lens: ll.LoraLens, rows: int = 8) -> None:
    """Computed for known shapes, and measured for the one that is here."""
    modules = [f"*.{name}" for name in ("?_proj", "gate_proj", "up_proj", "down_proj")]
    prompts = random_prompts(lens, rows, TOKENS // rows)
    bank = ll.bank(lens.model, prompts, MARGIN, modules=modules, **QUIET)
    held = sum(stack.nbytes for stack in bank._held.stacks.values())
    computed = bytes_of(SHAPES["SmolLM2-135M"], TOKENS, lens.dtype.itemsize)
    print(
        f"\nA bank of {rows} × {TOKENS // rows} tokens of SmolLM2-135M and its seven kinds of "
        f"linear map holds {held / 1e9:.2f} GB; computed: {computed / 1e9:.2f} GB. Computed for as "
        "many tokens:\n"
    )
    print("| shape | float32 | bfloat16 |\n| --- | --- | --- |")
    for name, shape in SHAPES.items():
        cells = " | ".join(f"{bytes_of(shape, TOKENS, size) / 1e9:.1f} GB" for size in (4, 2))
        print(f"| {name} | {cells} |")
