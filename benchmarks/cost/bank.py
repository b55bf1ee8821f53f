"""Measure what a bank costs: in a scan of many adapters, in null tests, in training, and in memory.

1. A folder of adapters is made. `WRITTEN` adapters of random factors are written, the others are
   links to them.
2. The whole folder is scanned on `PROMPTS` prompts of `LENGTH` tokens, by the clock and in CPU
   seconds. Then an adapter in a scan of eight is compared with `ll.first_order`, which reads the
   same folder and lays the adapter over the model.
3. A draw of `ll.null_test` and a step of `ll.checkpoints` are each the difference of two runs.
4. `ShiftCallback.measure` is compared with a training step of the same model under PEFT.
5. The memory that a bank holds is compared with 8 d + 2 d_q + 2 d_kv + 3 d_ff numbers for each
   token and layer.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import lens_lora as ll
from benchmarks.measuring import MARGIN, cpu_seconds, seconds_of_turns, text_prompts
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded

__all__ = ["bank_lines", "bytes_of"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRITTEN = 24
PROMPTS = 16
LENGTH = 32
LENGTHS = (8, 32)
# How many adapters of the folder are read by both ways.
BOTH_WAYS = 24
TURNS_OF_SCANS = 5
# A scan is of many adapters, so the memory that one frees is there for the next. The first scan
# after other work finds neither that nor its caches, and is one of several in each turn.
SCANS_OF_A_TURN = 3
PARTS = ("position", "head", "rank")
# The prompt on which one adapter is asked alone, and how often.
SHORTEST = 6
TURNS_OF_ONE_PROMPT = 15
# The bank whose memory is measured: prompts, and tokens in all.
ROWS = 8
TOKENS = 2048


class Shape(NamedTuple):
    """A model's sizes, as its bank depends on them."""

    layers: int
    d: int
    d_q: int
    d_kv: int
    d_ff: int


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 576, 192, 1536),
    "Qwen2.5-0.5B": Shape(24, 896, 896, 128, 4864),
    "Qwen2.5-1.5B": Shape(28, 1536, 1536, 256, 8960),
    "Llama-3.2-3B": Shape(28, 3072, 3072, 1024, 8192),
    "Qwen2.5-7B": Shape(28, 3584, 3584, 512, 18944),
}


def bytes_of(shape: Shape, tokens: int, size: int) -> int:
    """Bytes of a bank of one readout over so many tokens, in numbers of `size` bytes."""
    per_token = 8 * shape.d + 2 * shape.d_q + 2 * shape.d_kv + 3 * shape.d_ff
    return size * tokens * shape.layers * per_token


def bank_of(lens: ll.LoraLens, prompts: ll.results.Prompts) -> ll.results.Bank:
    """A bank of the margin."""
    return ll.bank(lens.model, prompts, MARGIN, progress=False)


def median_of(work: Callable[[], object], turns: int) -> float:
    """Median seconds of one work, the first run among them."""
    return statistics.median(cpu_seconds(work) for _ in range(turns))


def random_adapter(adapter: ll.Adapter, seed: int) -> ll.Adapter:
    """An adapter of the same modules, ranks and norms, in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def like(factor: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(factor.shape, generator=generator)
        return (drawn * factor.norm() / drawn.norm()).to(factor)

    factors = {
        path: ll.LoRAFactors(like(update.A), like(update.B), update.scale)
        for path, update in adapter.modules.items()
    }
    return ll.Adapter.from_factors(factors, name=f"random {seed}")


def folder_of(adapter: ll.Adapter, place: Path, count: int) -> list[Path]:
    """Make so many folders beside one another; return the first ones, which are written.

    The files of the others are links to theirs. Each has the demo adapter's config, as PEFT wrote
    it: `save` would list every module's path.
    """
    seeds = range(min(WRITTEN, count))
    written = [random_adapter(adapter, seed).save(place / f"a{seed:04}") for seed in seeds]
    for folder in written:
        shutil.copy(shipped_adapter() / CONFIG, folder)
    for index in range(len(written), count):
        folder = place / f"a{index:04}"
        folder.mkdir()
        for file in written[index % WRITTEN].iterdir():
            (folder / file.name).symlink_to(file)
    return written


def bank_lines(lens: ll.LoraLens, count: int) -> None:
    """Print all of it, with a scan of so many adapters."""
    with tempfile.TemporaryDirectory() as place:
        written = folder_of(lens.adapter, Path(place), count)
        whole_scan(lens, Path(place), count)
        beside_first_order(lens, written[:BOTH_WAYS])
    one_prompt_line(lens)
    marginal_costs(lens)
    callback_line(lens)
    memory_table(lens)


def whole_scan(lens: ll.LoraLens, folder: Path, count: int) -> None:
    """Print what the scan of the whole folder takes."""
    bank = bank_of(lens, text_prompts(lens, PROMPTS, LENGTH))
    start = time.monotonic()
    start_of_cpu = time.process_time()
    frame = bank.scan(folder, out=folder / "scan.parquet", progress=False)
    cpu = time.process_time() - start_of_cpu
    clock = time.monotonic() - start
    rows = frame.drop_duplicates(["adapter", "prompt"])
    if len(rows) != count * PROMPTS or frame["error"].notna().any():
        raise RuntimeError(f"{len(rows)} rows of {count} × {PROMPTS}, or an adapter was refused")
    print(
        f"A scan of {count:,} adapters × {PROMPTS} prompts of {LENGTH} tokens, written to Parquet: "
        f"{clock:.0f} s by the clock, {cpu:.0f} s of CPU on one thread (target ≤ 600 s), "
        f"{1e3 * cpu / count:.0f} ms an adapter. {min(WRITTEN, count)} folders hold random factors "
        "of the demo adapter's modules, ranks and sizes; those of the others are links to theirs.\n"
    )


def beside_first_order(lens: ll.LoraLens, folders: list[Path]) -> None:
    """Print what an adapter takes by each way."""
    head = " | ".join(f"{PROMPTS} × {length}" for length in LENGTHS)
    print(f"| in seconds, and in forward passes F | {head} |\n| --- |{' --- |' * len(LENGTHS)}")
    columns = [column(lens, folders, text_prompts(lens, PROMPTS, length)) for length in LENGTHS]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(cells[name] for cells in columns)} |", flush=True)


def column(lens: ll.LoraLens, folders: list[Path], prompts: ll.results.Prompts) -> dict[str, str]:
    """The seconds that each way takes for an adapter, and those in F.

    The last row says how many adapters are scanned while `ll.first_order` runs on one from its
    folder.
    """
    forward = median_of(lambda: lens.logits(prompts), turns=3)
    built = cpu_seconds(lambda: bank_of(lens, prompts))
    bank = bank_of(lens, prompts)
    bank.scan(folders[:2], progress=False)
    loaded = [ll.load_adapter(folder) for folder in folders]
    of_scans = seconds_of_turns(
        {
            "folders": lambda: bank.scan(folders, progress=False),
            "loaded": lambda: bank.scan(loaded, progress=False),
            "file": lambda: [load_file(folder / WEIGHTS) for folder in folders],
        },
        TURNS_OF_SCANS,
        repeats={"folders": SCANS_OF_A_TURN, "loaded": SCANS_OF_A_TURN},
    )
    an_adapter = {
        name: statistics.median(seconds) / len(folders) for name, seconds in of_scans.items()
    }
    scanned = an_adapter["folders"]

    def of_loaded(run: Callable[[ll.Adapter], object]) -> float:
        """Median seconds of a run on an adapter that is read already."""
        adapters = [ll.load_adapter(folder) for folder in folders[:3]]
        return statistics.median(
            cpu_seconds(lambda adapter=adapter: run(adapter)) for adapter in adapters
        )

    def from_folder(folder: Path) -> object:
        return ll.first_order(lens.with_adapter(ll.load_adapter(folder)), prompts, MARGIN)

    alone = statistics.median(
        cpu_seconds(lambda folder=folder: from_folder(folder)) for folder in folders[:3]
    )
    seconds = {
        "a forward pass": forward,
        "`ll.bank`, once": built,
        "an adapter in `bank.scan`, from its folder": scanned,
        "… loaded before": an_adapter["loaded"],
        "safetensors alone, of its file": an_adapter["file"],
        "`bank.first_order`, loaded": of_loaded(bank.first_order),
        "the same by position, head and rank": of_loaded(
            lambda adapter: bank.first_order(adapter, by=PARTS)
        ),
        "`ll.first_order`, from its folder": alone,
        "the same by position, head and rank, loaded": of_loaded(
            lambda adapter: ll.first_order(lens.with_adapter(adapter), prompts, MARGIN, by=PARTS)
        ),
    }
    cells = {name: f"{taken:.3g} s, {taken / forward:.2g} F" for name, taken in seconds.items()}
    return {**cells, "adapters scanned in the time of one": f"{alone / scanned:.0f}"}


def one_prompt_line(lens: ll.LoraLens) -> None:
    """Print what `bank.first_order` takes at one prompt, and its two parts that need no result."""
    prompts = text_prompts(lens, 1, SHORTEST)
    bank = bank_of(lens, prompts)
    bank.first_order(lens.adapter)
    (reach,) = bank._recorded.reaches
    plan = reach.base.plan_of(lens.adapter)
    assert not isinstance(plan, ll.LoraLens), "an adapter of plain factors shares a plan"

    def products() -> None:
        factors = plan.stacked([lens.adapter])
        plan.slopes(factors)
        plan.relative_norm(factors)

    times = seconds_of_turns(
        {
            "call": lambda: bank.first_order(lens.adapter),
            "products": products,
            "state": bank._require_same_model,
            "alone": lambda: ll.first_order(lens, prompts, MARGIN),
        },
        TURNS_OF_ONE_PROMPT,
    )
    median = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    print(
        f"\nOn one prompt of {SHORTEST} tokens `bank.first_order` takes {median['call']:.0f} ms "
        f"(target ≤ 15): {median['products']:.0f} ms for products with what the bank holds and "
        f"‖ΔW‖, {median['state']:.0f} ms to see that the model is as it was, and the rest for "
        f"labels and the result. `ll.first_order` takes {median['alone']:.0f} ms there. Medians "
        f"of {TURNS_OF_ONE_PROMPT} turns."
    )


def marginal_costs(lens: ll.LoraLens) -> None:
    """Print what one draw, one that is run, and one checkpoint more add to a call."""
    prompts = text_prompts(lens, 1, 8)
    forward = median_of(lambda: lens.logits(prompts), turns=5)

    def null_test(draws: int, exact: int) -> float:
        return cpu_seconds(
            lambda: ll.null_test(lens, prompts, MARGIN, draws=draws, exact=exact, progress=False)
        )

    null_test(2, 2)
    two_draws = null_test(2, 2)
    more_draws = null_test(22, 2)
    more_exact = null_test(22, 12)
    a_draw = (more_draws - two_draws) / 20
    an_exact_shift = (more_exact - more_draws) / 10
    drawing = statistics.median(
        cpu_seconds(lambda seed=seed: lens.adapter.null(0, seed)) for seed in range(5)
    )
    strengths = itertools.count(1)

    def checkpoints(count: int) -> float:
        adapters = [lens.adapter.scaled(1e-4 * next(strengths)) for _ in range(count)]
        return cpu_seconds(lambda: ll.checkpoints(lens, adapters, prompts, MARGIN, progress=False))

    two_steps = checkpoints(2)
    six_steps = checkpoints(6)
    a_step = (six_steps - two_steps) / 4
    print(
        f"\nOn one prompt of 8 tokens, beside an adapted forward pass of {1e3 * forward:.0f} ms: a "
        f"null test of two draws takes {two_draws:.2f} s, one more draw {1e3 * a_draw:.0f} ms "
        f"({1e3 * drawing:.0f} ms of them to draw it), its exact shift another "
        f"{1e3 * an_exact_shift:.0f} ms; 1,000 draws of which two are run would take "
        f"{two_draws + 998 * a_draw:.0f} s. One more checkpoint takes {1e3 * a_step:.0f} "
        f"ms, {a_step / forward:.1f} such passes."
    )


def callback_line(lens: ll.LoraLens, batch: int = 4, length: int = 64) -> None:
    """Print what the callback takes beside a training step."""
    hf_model, _ = load_embedded(quiet=True)
    targets = sorted({path.rpartition(".")[2] for path in lens.adapter.modules})
    peft_model = get_peft_model(hf_model, LoraConfig(r=8, target_modules=targets))
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    ids = text_prompts(lens, batch, length).tokens

    def step() -> None:
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    callback = ll.ShiftCallback(bank_of(lens, text_prompts(lens, 1, 8)), every=10)
    steps = itertools.count(10, 10)
    step()
    callback.measure(next(steps), peft_model)
    one_step = median_of(step, turns=5)
    measured = median_of(lambda: callback.measure(next(steps), peft_model), turns=5)
    print(
        f"\n`ShiftCallback.measure` takes {1e3 * measured:.0f} ms, a training step of {batch} × "
        f"{length} tokens {one_step:.2f} s: with every=10 {measured / (10 * one_step):.1%} of a "
        "step (target ≤ 5 %)."
    )


def memory_table(lens: ll.LoraLens) -> None:
    """Print the memory of a bank: computed for known shapes, measured for the one that is here."""
    modules = [f"*.{name}" for name in ("?_proj", "gate_proj", "up_proj", "down_proj")]
    prompts = text_prompts(lens, ROWS, TOKENS // ROWS)
    bank = ll.bank(lens.model, prompts, MARGIN, modules=modules, progress=False)
    measured = sum(stack.nbytes for stack in bank._held.stacks.values())
    computed = bytes_of(SHAPES["SmolLM2-135M"], TOKENS, lens.dtype.itemsize)
    print(
        f"\nA bank of {ROWS} × {TOKENS // ROWS} tokens of SmolLM2-135M and its seven kinds of "
        f"linear map holds {measured / 1e9:.2f} GB; computed: {computed / 1e9:.2f} GB. Computed "
        "for as many tokens:\n"
    )
    print("| shape | float32 | bfloat16 |\n| --- | --- | --- |")
    for name, shape in SHAPES.items():
        cells = " | ".join(f"{bytes_of(shape, TOKENS, size) / 1e9:.1f} GB" for size in (4, 2))
        print(f"| {name} | {cells} |")
