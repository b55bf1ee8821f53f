"""The exactness table, docs/exactness_data.md: how far a lens is from PEFT, in float64.

    python docs/make_exactness.py
    python docs/make_exactness.py --architectures   # only these, of the newest line
    python docs/make_exactness.py --defaults   # only families at their classes' defaults
    python docs/make_exactness.py --methods   # only PEFT's methods; AdaMSS needs scikit-learn

1. Measure every cell that the installed transformer-lens has: family × class × processing × target
   of `models`, `cases` and `targets` in `tests/lib`; write them to
   docs/exactness/<transformer-lens>.json, errors rounded to one digit.
2. On the newest line, measure every architecture of `architectures`, which has no entry in
   `lens_lora.families`, and every method of PEFT of `tuners`.
3. Render docs/exactness_data.md from all files there.

Run in one environment per transformer-lens line; a few minutes each.
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / folder) for folder in ("lib", "formats")]

import architectures  # noqa: E402
import cases  # noqa: E402
import models  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402
import tuners  # noqa: E402
from tqdm import tqdm  # noqa: E402

import lens_lora as ll  # noqa: E402
from lens_lora._version import versions  # noqa: E402
from lens_lora.families import known_family  # noqa: E402

RESULTS, PAGE = HERE / "exactness", HERE / "exactness_data.md"
BOUND, HOST_EXACT = 1e-9, 1e-11
ERRORS = ("host", "adapted", "modes")
Key = tuple[str, str, str, str]
Cell = dict[str, Any]

NAMES = {
    "gpt2": "GPT-2",
    "neox": "GPT-NeoX",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "gpt_neo": "GPT-Neo",
    "gptj": "GPT-J",
    "bloom": "Bloom",
    "opt": "OPT",
    "phi": "Phi",
    "phi3": "Phi-3",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "mixtral": "Mixtral",
}
INTRODUCTION = f"""# The evidence on exactness

How far is the adapted model of a `LoraLens` from PEFT's own? At most {BOUND:.0e} in every cell of
these tables, except where the hooked model without any adapter is already further from the Hugging
Face model than {HOST_EXACT:.0e}. There, that error of the host library stands in brackets.
[Exactness](exactness.md) says what follows from it.

Measured in float64 on tiny models of every family, with random weights, norms, biases and factors,
and with the float32 casts of the host libraries lifted. Each cell was measured in three ways:

- **adapted**, which the tables show: `lens.logits(scale=1)` against the Hugging Face model with
  PEFT's adapter active;
- **host**: logits of the bare hooked model against the bare Hugging Face model;
- **modes**: `first_order(at=1)` by forward mode against reverse mode, relative to the largest site.

The first two are the largest difference of any logit at any position, up to the constant that a
centred unembedding removes; the largest logits are 4 to 8. A number in square brackets refers to a
message at the end of the page. Beside the name of an error it is a refusal by `lens_lora`; beside
*host* it is a fault of the host library, which cannot build the model.

The processing is that of transformer-lens: none (raw), each flag alone, or all four. A
TransformerBridge is processed by `enable_compatibility_mode`. In the tables by processing, the LoRA
is on every linear module of the blocks.

In the tables by target, these are added to a LoRA on linear modules: a LoRA on the head, on an
embedding, or on the position embedding; biases of the LoRA itself (`lora_bias`) or of its modules
(`lora_only`); DoRA; `modules_to_save` of head, embedding (not Bloom's) and the MLP's output;
`modules_to_save` of every norm; trained rows of the embedding (`trainable_token_indices`), and of
the head where it is tied; and every bias (`bias="all"`). Where norms are folded, a change of γ or β
is refused.

[Precision and robustness](precision.md) has what bfloat16 and float16 leave of each analysis. Two
more tables on this page are of other architectures, whose sites are read from the bridge itself,
and of every method of PEFT.

To reproduce: run `python docs/make_exactness.py` in an environment of each transformer-lens line.
It measures the installed version, writes `docs/exactness/<transformer-lens>.json`, and renders
this page from all files there; `tests/docs/test_docs.py` checks that page and files agree.
"""


# --- measuring


def every_key() -> list[Key]:
    """(family, class, processing, target): all processings of the linears, two of the others."""
    others = [t for t in targets.TARGETS if t != "linears"]
    return [
        (family, cls, flags, target)
        for family, cls in itertools.product(models.FAMILIES, models.MAKERS)
        for flags, target in [
            *((flags, "linears") for flags in cases.FLAGS),
            *itertools.product(("raw", "processed"), others),
        ]
        if targets.has(family, target)
    ]


def measure(family: str, cls: str, flags: str, target: str) -> Cell:
    """One cell: its three errors, or the fault of the host, or the refusal. Within `lifted`."""
    try:
        base, model = targets.hooked(family, cls, flags)
    except Exception as error:  # whatever the host library raises is what the page is to say
        return {"fault": _message(error)}
    peft, tokens = targets.peft_with(family, base, target), models.tokens()
    with torch.no_grad():
        plain, adapted = base(tokens).logits, peft(tokens).logits
        host = _distance(model(tokens, return_type="logits"), plain)
    try:
        adapter = ll.Adapter.from_peft(peft)
        lens = ll.LoraLens(model, adapter, hf_model=targets.base_for(base, flags, target))
    except ll.errors.LensLoraError as error:
        return {"host": host, "refusal": _message(error)}
    return {
        "host": host,
        "adapted": _distance(lens.logits(tokens), adapted),
        "modes": _modes(lens, tokens),
    }


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((cases.centred(found) - cases.centred(expected)).abs().max())


def _modes(lens: ll.LoraLens, tokens: torch.Tensor) -> float:
    """Forward mode against reverse mode, relative to the largest site."""
    reverse = ll.first_order(lens, tokens, targets.MARGIN, at=1.0).values
    forward = ll.first_order(
        lens, tokens, targets.MARGIN, at=1.0, mode="forward", progress=False
    ).values
    return float((forward - reverse).abs().max() / reverse.abs().max())


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def measure_architectures() -> dict[str, Cell]:
    """The errors of every architecture that has no entry; none before transformer-lens 4."""
    if not models.is_newest():
        return {}
    with architectures.in_float64():
        bar = tqdm(architectures.ARCHITECTURES, unit="architecture")
        return {name: rounded(architectures.measure(name)) for name in bar}


def measure_defaults() -> dict[str, Any]:
    """The cells of each class for the families whose tiny model is not the default of its class."""
    found: dict[str, Any] = {}
    with models.lifted():
        for cls, family in itertools.product(models.MAKERS, models.CHOICES):
            found.setdefault(cls, {})[family] = rounded(measure_default(family, cls))
    return found


def measure_default(family: str, cls: str) -> Cell:
    """The errors of a family at its class's defaults, raw. Within `lifted`."""
    base = models.at_defaults(family)
    peft, tokens = models.peft_model(family, base), models.tokens()
    model = models.MAKERS[cls](base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    with torch.no_grad():
        plain, adapted = base(tokens).logits, peft(tokens).logits
        host = _distance(model(tokens, return_type="logits"), plain)
    return {
        "host": host,
        "adapted": _distance(lens.logits(tokens), adapted),
        "modes": _modes(lens, tokens),
    }


def measure_methods() -> dict[str, Any]:
    """The errors of every method by what it adapts, or its refusal; none before version 4."""
    if not models.is_newest():
        return {}
    found: dict[str, Any] = {name: tuners.refusal(name) for name in tuners.REFUSED}
    with tuners.in_float64():
        for name in tqdm(tuners.EXACT, unit="method"):
            places = tuners.places(name)
            found[name] = {place: rounded(tuners.measure(name, place)) for place in places}
    return found


def rounded(cell: Cell) -> Cell:
    """Errors with one digit, so that reruns agree."""
    return {k: float(f"{v:.0e}") if isinstance(v, float) else v for k, v in cell.items()}


def line() -> str:
    """The installed transformer-lens, as '3.9'."""
    return ".".join(versions()["transformer-lens"].split(".")[:2])


def measure_all() -> dict[str, Any]:
    """{versions, cells by class, family, target and processing} of this environment."""
    found: dict[str, Any] = {}
    with models.lifted():
        for family, cls, flags, target in tqdm(every_key(), unit="cell"):
            row = found.setdefault(cls, {}).setdefault(family, {}).setdefault(target, {})
            row[flags] = rounded(measure(family, cls, flags, target))
    return {"versions": versions_here(), "cells": found}


def versions_here() -> dict[str, str]:
    """What the numbers of this environment depend on."""
    return {**versions(), "python": platform.python_version()}


# --- rendering


def read_results() -> dict[str, Any]:
    """Every file of results, by transformer-lens line."""
    found = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")]))


def cells(result: dict[str, Any]) -> Iterator[tuple[Key, Cell]]:
    """Every ((family, class, processing, target), cell) of one environment."""
    for cls, families in result["cells"].items():
        for family, by_target in families.items():
            for target, by_flags in by_target.items():
                for flags, cell in by_flags.items():
                    yield (family, cls, flags, target), cell


def render(results: dict[str, Any]) -> str:
    """The page."""
    notes: dict[str, list[str]] = {}
    parts = [INTRODUCTION, _versions_table(results), _configurations(results)]
    for version, result in results.items():
        for cls, families in sorted(result["cells"].items()):
            parts.append(_section(f"{cls}, transformer-lens {version}", families, notes))
    for version, result in results.items():
        if result.get("architectures"):
            parts.append(_architectures(version, result["architectures"], notes))
    for version, result in results.items():
        if result.get("methods"):
            parts.append(_methods(version, result["versions"]["peft"], result["methods"]))
    return "\n".join([*parts, _notes_list(notes)])


def _versions_table(results: dict[str, Any]) -> str:
    """What was measured with what; a table that was measured anew by itself has its own row."""
    names = ("transformer-lens", "transformers", "torch", "peft", "python")
    rows: list[list[str]] = []
    for result in results.values():
        of_all = [str(result["versions"][name]) for name in names]
        rows.append([*of_all, "all that is not below"])
        for part, own in sorted(result.get("versions_of", {}).items()):
            of_part = [str(own[name]) for name in names]
            if of_part != of_all:
                rows.append([*of_part, part])
    return _table([*names, "tables"], rows)


CONFIGURATIONS = """## Configurations

The tables by processing and by target are of transformers' defaults for each family's class, but
for sizes (two layers, windows of eight tokens, a vocabulary of {vocab}) and for what the second
column names. With the default in its place, unprocessed, the largest difference of any logit from
PEFT's is:
"""


def _configurations(results: dict[str, Any]) -> str:
    """Which families are not measured at their defaults, and the errors of these at theirs."""
    columns: list[tuple[str, dict[str, Cell]]] = []
    for version, result in results.items():
        for cls, cells_of in sorted(result.get("defaults", {}).items()):
            columns.append((f"{cls} {version}", cells_of))
    rows: list[list[str]] = []
    for family, choices in models.CHOICES.items():
        said = ", ".join(f"{field}={value}" for field, value in choices.items())
        errors = [f"{cells_of[family]['adapted']:.0e}" for _, cells_of in columns]
        rows.append([NAMES[family], f"`{said}`", *errors])
    heads = ["", "configuration", *(name for name, _ in columns)]
    return "\n".join([CONFIGURATIONS.format(vocab=models.VOCAB), _table(heads, rows)])


def _section(title: str, families: dict[str, Any], notes: dict[str, list[str]]) -> str:
    order = [family for family in NAMES if family in families]
    flags, others = list(cases.FLAGS), [t for t in targets.TARGETS if t != "linears"]

    def shown(family: str, target: str, flag: str) -> str:
        place = f"{title}: {NAMES[family]}, {target}, {_heading(flag)}"
        return _cell(families[family][target][flag], place, notes)

    linears = [[NAMES[f], *(shown(f, "linears", flag) for flag in flags)] for f in order]
    by_target = [
        [NAMES[f], *(_pair(f, target, families[f], shown) for target in others)] for f in order
    ]
    return "\n".join(
        [
            f"## {title}\n",
            _table(["linear modules", *map(_heading, flags)], linears),
            _worst(families),
            "By target, raw / all four:\n",
            _table(["", *others], by_target),
        ]
    )


ARCHITECTURES = """## {n} other architectures, transformer-lens {version}

These have no entry in `lens_lora.families`, or hold experts. On a raw TransformerBridge every
linear module is a site, and so is every stack of experts and every router; a site is named by its
component, else by its path. The LoRA is on all of them except the head and what PEFT refuses to
adapt; the stacks of Llama 4 and JetMoE have a form of their own and are left out. One line in
`tests/lib/architectures.py` adds an architecture.

Each row is of transformers' defaults for its class, but for sizes (two layers, one of each kind,
windows of a few tokens) and for what **configuration** names; every architecture has a row with its
defaults. Mixtral and OPT are here beside these, for experts and for forms of OPT that the tables
above are not of.

- **adapted** as above; **each**: the same with one module's gate at 0.7, one after another;
- **activations**: every hook point against a bridge of PEFT's merged weights;
- **slopes**: `first_order` at 0, 0.37 and 1 against central differences of PEFT, relative to the
  largest; **modes**: forward against reverse mode at 0.37;
- **effects**: `patch_sites` that leaves one module out, against PEFT;
- **path**: the sum of `path_attribution` against PEFT's shift, relative to the sum of sizes, for
  the adapter at a hundredth of its strength (experts that change on the way make g jump);
- **said**: how many of twelve tokens of `generate` differ from PEFT's greedy ones.
"""


def _error(value: float | int | str, place: str, notes: dict[str, list[str]]) -> str:
    if isinstance(value, str):
        return _cell({"refusal": f"ModelStateError: {value}"}, place, notes)
    return f"{value:.0e}" if isinstance(value, float) else str(value)


def _architectures(version: str, measured: dict[str, Cell], notes: dict[str, list[str]]) -> str:
    columns = ("sites", *architectures.ERRORS)
    rows: list[list[str]] = []
    for name, cell in measured.items():
        errors = [_error(cell[column], f"{name}, {column}", notes) for column in columns]
        rows.append([name, _configuration(name), *errors])
    stems = {architectures.ARCHITECTURES[name][0] for name in measured}
    others = [stem for stem in stems if known_family(f"{stem}ForCausalLM") is None]
    heading = ARCHITECTURES.format(n=len(others), version=version)
    return "\n".join([heading, _table(["", "configuration", *columns], rows)])


def _configuration(name: str) -> str:
    said = architectures.configuration(name)
    return said if said == "default" else f"`{said}`"


METHODS = """## PEFT's {n} methods, transformer-lens {version}

One row for each folder of `peft.tuners` in PEFT {peft}. Except for LoRA, ΔW is measured by running
PEFT's own layers ([Adapter formats](formats.md#other-methods)). The adapter is random, on a tiny
Llama or GPT-2 (Conv1D, LayerNorm), read from the live model and from its folder over the base. A
kind of module that is missing here is one that PEFT itself does not adapt.

- **exact**: the largest difference of `lens.logits` from PEFT, for both readings, at the gates 0.37
  and 1; at 0.37, PEFT's own layers add that share of what they add;
- **slopes**: the sum of `first_order` at 0 against central differences of PEFT, relative.
"""


def _methods(version: str, peft: str, measured: dict[str, Any]) -> str:
    rows = [[name, *_method(measured[name])] for name in sorted(measured)]
    heading = METHODS.format(n=len(rows), version=version, peft=peft)
    return "\n".join([heading, _table(["method", "adapts", "exact", "slopes"], rows)])


def _method(cell: str | dict[str, Cell]) -> list[str]:
    if isinstance(cell, str):
        sentence, _, _ = cell.partition(". ")
        return [f"refused: {sentence.rpartition(': ')[2]}", "", ""]
    exact = max(max(errors["live"], errors["folder"]) for errors in cell.values())
    slopes = max(errors["slopes"] for errors in cell.values())
    return [", ".join(cell), f"{exact:.0e}", f"{slopes:.0e}"]


def _pair(family: str, target: str, by_target: dict[str, Any], shown: Any) -> str:
    """'raw / processed' of a target, '—' where the family has none such."""
    if target not in by_target:
        return "—"
    both = [shown(family, target, flag) for flag in ("raw", "processed")]
    return both[0] if both[0] == both[1] and both[0].endswith("]") else " / ".join(both)


def _heading(flags: str) -> str:
    return "all four" if flags == "processed" else flags


def _cell(cell: Cell, place: str, notes: dict[str, list[str]]) -> str:
    message = cell.get("refusal") or cell.get("fault")
    if message is not None:
        places = notes.setdefault(message, [])
        places.append(place)
        name = message.partition(":")[0] if "refusal" in cell else "*host*"
        return f"{name} [{list(notes).index(message) + 1}]"
    beside = f" (host {cell['host']:.0e})" if cell["host"] > HOST_EXACT else ""
    return f"{cell['adapted']:.0e}{beside}"


def _worst(families: dict[str, Any]) -> str:
    every = [c for _, c in cells({"cells": {"": families}}) if "adapted" in c]
    host, _, modes = (max(c[name] for c in every) for name in ERRORS)
    exact = max(c["adapted"] for c in every if c["host"] <= HOST_EXACT)
    return (
        f"Largest over both tables: host {host:.0e}; adapted {exact:.0e} where the host is exact; "
        f"modes {modes:.0e}.\n"
    )


def _notes_list(notes: dict[str, list[str]]) -> str:
    lines = ["## Refusals and faults of the host\n"]
    for number, (message, places) in enumerate(notes.items(), start=1):
        first = f"{places[0]}{f' and {len(places) - 1} more' if len(places) > 1 else ''}"
        lines.append(f"{number}. `{message}` ({first})")
    return "\n".join([*lines, ""])


def _table(heads: Any, rows: list[list[str]]) -> str:
    def one(row: Any) -> str:
        return f"| {' | '.join(row)} |"

    return "\n".join([one(heads), one(["---"] * len(heads)), *map(one, rows), ""])


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{line()}.json"
    asked = sys.argv[1:]
    measured = json.loads(file.read_text()) if asked else measure_all()
    parts = {
        "architectures": measure_architectures,
        "defaults": measure_defaults,
        "methods": measure_methods,
    }
    measured_now = {
        name: part() for name, part in parts.items() if not asked or f"--{name}" in asked
    }
    measured |= measured_now
    if asked:
        measured["versions_of"] = {
            **measured.get("versions_of", {}),
            **dict.fromkeys(measured_now, versions_here()),
        }
    file.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(render(read_results()))


if __name__ == "__main__":
    main()
