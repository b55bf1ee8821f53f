"""What half precision does to each analysis: bfloat16 and float16 beside float64, same weights.

    python benchmarks/precision.py --write              # all of it; some minutes
    python benchmarks/precision.py --dtypes bfloat16 --works "leave one out"
    python benchmarks/precision.py --floors --write     # how many floors a shift is off

1. The demo's model and adapter, and tiny models of several families, are rounded to half precision.
   The float64 run has those rounded weights, with the libraries' float32 casts lifted.
2. `tests/lib/half_precision.py` has the calls, and compares each with the floor that it states.
3. With --floors, shifts alone, of many readouts and prompts, in units of their floors.
4. With --write the numbers go into docs/precision.json (of --floors, docs/floors.json), and
   docs/precision.md is made from them.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "lib"))

import models  # noqa: E402
import precision_page  # noqa: E402
import torch  # noqa: E402
from half_precision import ALONE, STATED, Asked, compared, errors_in_floors  # noqa: E402

import lens_lora as ll  # noqa: E402
from lens_lora.core.results.base import SIGMAS
from lens_lora.demonstration import shipped_adapter  # noqa: E402
from lens_lora.demonstration.embedded import load_embedded  # noqa: E402
from lens_lora.hosts.build import bridge_if_there, hooked_model

WORKS = STATED | ALONE
PROMPTS = (
    "The capital of France is",
    "The Eiffel Tower is in the city of",
    "I am flying to France, to its capital",
)
TEXTS = (
    *PROMPTS,
    "Paris is known for",
    "My favourite city in France is",
    "Water boils at a temperature of",
    "The president of the United States lives in",
    "Once upon a time there was a",
    "In 1969, humans first landed on the",
    "The largest planet is",
    "She opened the door and saw",
    "The French parliament sits in",
)
READOUTS = (
    ll.Margin(" Lyon", " Paris"),
    ll.LogProb(" Paris"),
    ll.Logit(" the"),
    ll.Logit(" London"),
)
SWEPT = ("add one", "leave one out", "coupling", "path", "patch", "kl", "components")
FAMILIES = ("llama", "gpt2", "qwen2", "gemma3", "neox")
Pair = tuple[ll.LoraLens, ll.LoraLens]


def real(dtype: torch.dtype) -> Pair:
    """The demo's lens in half precision, and in float64."""
    base, tokenizer = load_embedded(dtype, quiet=True)
    adapter, kind = ll.load_adapter(shipped_adapter()), bridge_if_there()

    def lens_of(model: Any) -> ll.LoraLens:
        # With a BOS before each prompt, as the stored numbers were measured.
        hooked, _ = hooked_model(model, tokenizer, kind=kind)
        return ll.LoraLens(hooked, adapter, prepend_bos=True)

    low = lens_of(base)
    with models.lifted():
        return low, lens_of(copy.deepcopy(base).double())


def tiny(family: str, dtype: torch.dtype) -> Pair:
    """A lens of random weights in half precision, and in float64."""
    make, base = list(models.MAKERS.values())[-1], models.hf_model(family, dtype=dtype)
    adapter = ll.Adapter.from_peft(models.peft_model(family, base)).scaled(0.3)
    low = ll.LoraLens(make(base), adapter)
    with models.lifted():
        return low, ll.LoraLens(make(base.double()), adapter)


def rows(lenses: Pair, asked: Asked, work: str) -> Iterator[dict[str, Any]]:
    """Each analysis of a work, compared."""
    found = WORKS[work](lenses[0], asked)
    with models.lifted():
        exact = WORKS[work](lenses[1], asked)
    for name in found:
        yield {"analysis": name, **compared(found[name], exact[name])._asdict()}


def measure(dtype: str, works: list[str], on_tiny: bool) -> Iterator[dict[str, Any]]:
    """The rows of the demo's model, or of the tiny ones."""
    rounded = getattr(torch, dtype)
    if on_tiny:
        asked = Asked(models.tokens(batch=24), 5, 9, torch.tensor([5, 9]))
        for family in FAMILIES:
            lenses = tiny(family, rounded)
            for work in works:
                for row in rows(lenses, asked, work):
                    yield {"model": family, "dtype": dtype, **row}
        return
    lenses = real(rounded)
    for work in works:
        some = PROMPTS[:1] if work.startswith(SWEPT) else PROMPTS
        asked = Asked(list(some), " Lyon", " Paris", " Lyon, which lies on two rivers")
        for row in rows(lenses, asked, work):
            yield {"model": precision_page.REAL, "dtype": dtype, **row}


def floors(dtype: str) -> Iterator[dict[str, Any]]:
    """How far shifts are off, in noise floors: of the demo's model, and of each tiny one."""
    rounded = getattr(torch, dtype)
    ids = (ll.Margin(5, 9), ll.LogProb(5), ll.Logit(9), ll.AnswerLogProb(torch.tensor([5, 9])))
    cases = {precision_page.REAL: (functools.partial(real, rounded), TEXTS, READOUTS)}
    for family in FAMILIES:
        cases[family] = (functools.partial(tiny, family, rounded), models.tokens(24), ids)
    for model, (made, prompts, readouts) in cases.items():
        lenses = made()
        for analysis, asked in (("margin, logit, log p", readouts), ("KL", (ll.KL(),))):
            ratios = errors_in_floors(*lenses, prompts, asked)
            yield {
                "model": model,
                "dtype": dtype,
                "analysis": analysis,
                "shifts": len(ratios),
                "rms": float(ratios.square().mean().sqrt()),
                "beyond": int((ratios > SIGMAS).sum()),
            }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    options.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    options.add_argument("--only", choices=["real", "tiny"])
    options.add_argument("--floors", action="store_true", help="how many floors a shift is off")
    options.add_argument("--write", action="store_true", help="into docs/*.json and precision.md")
    asked = options.parse_args()
    for dtype in asked.dtypes if asked.floors else ():
        for row in floors(dtype):
            print(row, flush=True)
            if asked.write:
                precision_page.add(row, precision_page.FLOORS)
    if asked.floors:
        return
    sets = [asked.only == "tiny"] if asked.only else [True, False]
    for dtype in asked.dtypes:
        for on_tiny in sets:
            start = time.perf_counter()
            for row in measure(dtype, asked.works, on_tiny):
                print(row, f"{time.perf_counter() - start:.0f} s", flush=True)
                if asked.write:
                    precision_page.add(row)


if __name__ == "__main__":
    main()
