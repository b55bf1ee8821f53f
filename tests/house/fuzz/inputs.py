"""Odd prompts, tokens of readouts and gates: read as Hugging Face has it, or refused by name.

The oracle is PEFT's model on the ids that a prompt means, with each module's scaling multiplied by
its gate.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import models
import numpy as np
import torch

import lens_lora as ll
from fuzz.guard import Case, Chance, Wrong, require_close

IDS = models.tokens(2, 5)
LARGE = 1e4


World = dict[str, cases.Case]


def world() -> World:
    """A lens, its model and its PEFT model of each class; within `models.lifted()`."""
    return {cls: cases.case("llama", cls, "raw") for cls in models.MAKERS}


def pick(world: World, chance: Chance) -> tuple[str, cases.Case]:
    name = chance.choice(sorted(world))
    return name, world[name]


def by_peft(case: cases.Case, ids: Sequence[int], gates: Sequence[float] | None = None):
    """PEFT's logits [pos, vocab] of one prompt, each site's s multiplied by its gate."""
    old: dict[str, float] = {}
    try:
        for site, gate in zip(case.lens.sites, gates or (), strict=bool(gates)):
            old[site.module] = cases.set_peft_scale(case.peft, site.module, gate)
        with torch.no_grad():
            return case.peft(torch.tensor([list(ids)])).logits[0]
    finally:
        for module, scale in old.items():
            layer = case.peft.base_model.model.get_submodule(module)
            layer.scaling["default"] = scale


# --- prompts


Given = tuple[Any, "list[list[int]] | None"]


def _text(chance: Chance) -> str:
    words = " ".join(f"w{chance.randint(4, 60)}" for _ in range(chance.choice([1, 3, 8, 31, 40])))
    odd = [chance.text(), "", " ", "\n", "<bos>", "<pad>", "<eos> w5", "w5<bos>", "zebra", "w5\0w6"]
    return words if chance.maybe(0.4) else chance.choice(odd)


def texts(chance: Chance, model: Any) -> Given:
    """Strings, and what may hold them; the tokenizer's own ids after one BOS, never two."""
    strings = [_text(chance) for _ in range(chance.choice([1, 1, 2, 3]))]
    shapes: list[Callable[[], Any]] = [
        lambda: strings, lambda: tuple(strings), lambda: iter(strings), lambda: np.array(strings),
        lambda: dict.fromkeys(strings), lambda: [strings],
    ]  # fmt: skip
    given = strings[0] if len(strings) == 1 and chance.maybe(0.5) else chance.choice(shapes)()
    wanted = strings if not isinstance(given, dict) else list(given)
    try:
        return given, [_with_one_bos(model, s) for s in wanted]
    except Exception:
        return given, None


def _with_one_bos(model: Any, text: str) -> list[int]:
    own = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = model.tokenizer.bos_token_id
    return own if own[:1] == [bos] else model.to_tokens(text, truncate=False)[0].tolist()


def conversations(chance: Chance, model: Any) -> Given:
    """Messages that may be none, of a tokenizer without a chat template: none is read."""

    def message() -> Any:
        role = chance.choice(["user", "assistant", "system", "tool", "USER", "", None, 3])
        content = chance.choice([_text(chance), "w5", None, 3, ["w5"], {"text": "w5"}])
        odd = chance.choice([{}, {}, {"name": "a"}, {"tool_calls": []}, {"role": "user"}])
        plain = {"role": role, "content": content} | odd
        return plain if chance.maybe(0.8) else chance.choice([{}, "w5", None, ["w5"], (plain,)])

    def one() -> Any:
        return [message() for _ in range(chance.choice([1, 1, 2, 3]))]

    given = chance.choice([one, lambda: [one(), one()], lambda: (*one(),), lambda: [*one(), []]])()
    is_text = all(isinstance(item, str) for item in given)
    return texts(chance, model) if is_text else (given, None)


def ids(chance: Chance, model: Any) -> Given:
    """Tensors of ids: any dtype, any shape, ids at and beyond the vocabulary's ends."""
    dtype = chance.choice(
        [torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
        + [torch.float32, torch.bool, torch.complex64]
    )
    shape = chance.choice(
        [(), (0,), (4,), (2, 4), (1, 1), (1, 32), (1, 33), (0, 4), (2, 0), (1, 2, 3)]
    )
    tensor = torch.randint(3, models.VOCAB, shape, generator=models.seeded(chance.randrange(99)))
    if tensor.numel() and chance.maybe(0.3):
        value = chance.choice([-1, 0, 1, 2, 60, 61, 127, 2**31, -(2**63)])
        tensor.view(-1)[chance.randrange(tensor.numel())] = value
    tensor = tensor.to(dtype)
    given: Any = tensor
    if chance.maybe(0.3):
        given = chance.choice([tensor.tolist(), tensor.numpy(), [tensor]])
    if dtype.is_floating_point or dtype.is_complex or tensor.ndim not in (1, 2):
        return given, None
    rows = tensor if tensor.ndim == 2 else tensor[None]
    return given, rows.tolist() if rows.numel() and dtype != torch.bool else None


def padded(chance: Chance, model: Any) -> Given:
    """`Prompts` made by hand: tokens and lengths that may not fit each other."""
    tokens = models.tokens(2, 5, seed=chance.randrange(99))
    lengths = chance.choice(
        [[5, 3], [1, 5], [0, 5], [6, 5], [5], [5, 3, 1], [-1, 5], [5.0, 3.0], [True, True]]
    )
    given = ll.results.Prompts(tokens, torch.tensor(lengths))
    return given, [row[:n].tolist() for row, n in zip(tokens, given.lengths.tolist(), strict=True)]


def others(chance: Chance, model: Any) -> Given:
    """No prompt at all."""
    given = [
        None,
        3,
        1.5,
        b"w5",
        object(),
        [],
        {},
        [None],
        [3, "w5"],
        Ellipsis,
        float,
        chance.value(),
    ]
    found = chance.choice(given)
    return (found, None) if not isinstance(found, str) else texts(chance, model)


PROMPTS = {
    "strings": texts,
    "conversations": conversations,
    "tensors of ids": ids,
    "Prompts": padded,
    "no prompts": others,
}


def prompts(world: World, chance: Chance, scratch: Path) -> Case:
    name, case = pick(world, chance)
    kind = chance.choice(sorted(PROMPTS))
    memory: list[Given] = []

    def act() -> torch.Tensor:
        memory.append(PROMPTS[kind](chance, case.model))
        return case.lens.logits(memory[0][0])

    def judge(logits: torch.Tensor) -> None:
        given, wanted = memory[0]
        if wanted is None:
            raise Wrong(f"{given!r} was read")
        if len(logits) != len(wanted):
            raise Wrong(f"{len(logits)} rows for {given!r}")
        for i, row in enumerate(wanted):
            require_close(logits[i, : len(row)], by_peft(case, row), f"{given!r} on {name}")

    return Case("prompts", kind, act, judge, f"{kind} on {name}")


# --- tokens of readouts


def _token(chance: Chance) -> tuple[Any, int | None]:
    """A token as a caller may give it, and the id that it means."""
    i = chance.randint(4, 60)
    return chance.choice(
        [
            (f"w{i}", i), (i, i), (torch.tensor(i), i), (np.int64(i), i), ([f"w{i}"], i), ([i], i),
            (torch.tensor([i]), i), (torch.tensor(i, dtype=torch.int16), i), (f" w{i}", i),
            (torch.tensor([7.5]), None), (True, None), (1.5, None), (-1, None), (61, None),
            (2**63, None), (None, None), ("", None), ("zebra", None), (f"w{i} w5", None),
            (chance.text(), None), ("\ud800", None), ([], None), ([i, i], None), (b"w5", None),
            (torch.tensor([True]), None), ({i: i}, None), (str(i), None), (torch.empty(0), None),
            (float("nan"), None), ([[i]], None), (object(), None),
        ]
    )  # fmt: skip


def readouts(world: World, chance: Chance, scratch: Path) -> Case:
    name, case = pick(world, chance)
    kind = chance.choice(["Logit", "LogProb", "Margin", "AnswerLogProb"])
    given, one = _token(chance)
    other, two = _token(chance)
    arguments = (given, other) if kind == "Margin" else (given,)
    row = IDS[:1]

    def act() -> ll.results.Attribution:
        return ll.first_order(case.lens, row, getattr(ll, kind)(*arguments))

    def judge(found: ll.results.Attribution) -> None:
        if one is None or (kind == "Margin" and two is None):
            if kind == "AnswerLogProb" and isinstance(given, str | list):
                return  # an answer of several tokens, or of other ones than one token
            raise Wrong(f"{kind}{arguments!r} was read")
        logits = by_peft(case, row[0].tolist())[-1]
        wanted = logits[one] - (logits[two] if kind == "Margin" else 0)
        if kind.endswith("LogProb"):
            wanted = logits.log_softmax(-1)[one]
        require_close(found.adapted[0], wanted, f"{kind}{arguments!r} on {name}")

    return Case("tokens of readouts", kind, act, judge, f"{kind}{arguments!r} on {name}")


# --- gates


def gates(world: World, chance: Chance, scratch: Path) -> Case:
    name, case = pick(world, chance)
    sites = [site.name for site in case.lens.sites]
    kind = chance.choice(["a number", "a tensor", "a table", "no gates"])
    given, wanted = _GATES[kind](chance, sites)

    def act() -> torch.Tensor:
        return case.lens.logits(IDS[:1], scale=given)

    def judge(found: torch.Tensor) -> None:
        if wanted is None:
            raise Wrong(f"{given!r} was read as gates")
        if max(map(abs, wanted)) > LARGE:  # the two round differently
            return
        logits = by_peft(case, IDS[0].tolist(), wanted)
        require_close(found[0], logits, f"{given!r} on {name}")

    return Case("gates", kind, act, judge, f"{given!r} on {name}")


def _finite(value: Any) -> float | None:
    """The number that a gate means; None where it is none."""
    with contextlib.suppress(OverflowError, TypeError, ValueError):
        return float(value) if math.isfinite(value) and not isinstance(value, str) else None
    return None


def _number(chance: Chance, sites: list[str]) -> tuple[Any, list[float] | None]:
    value = chance.choice([chance.number(), chance.uniform(-2, 2), np.float32(0.5), np.int64(2)])
    if chance.maybe(0.3):
        value = torch.tensor(0.25) if isinstance(value, complex) else torch.as_tensor(0.75)
        return value, [float(value)] * len(sites)
    gate = _finite(value)
    return value, None if gate is None else [gate] * len(sites)


def _tensor(chance: Chance, sites: list[str]) -> tuple[Any, list[float] | None]:
    dtype = chance.choice([torch.float64, torch.float32, torch.float16, torch.int64, torch.bool])
    count = chance.choice([len(sites)] * 4 + [0, 1, len(sites) + 1])
    values = torch.randn(count, generator=models.seeded(chance.randrange(99))).to(dtype)
    if count and values.is_floating_point() and chance.maybe(0.2):
        values[chance.randrange(count)] = chance.choice([float("nan"), float("inf"), 1e300, 0.0])
        if not bool(torch.isfinite(values).all()):
            return values, None
    given = chance.choice([values, values[None], values, values])
    return given, values.double().tolist() if count == len(sites) else None


def _table(chance: Chance, sites: list[str]) -> tuple[Any, list[float] | None]:
    keys = [
        chance.choice(sites),
        "*.q",
        "blocks.0.*",
        "*",
        "*[kv]",
        "nope",
        "",
        chance.text(),
        3,
        None,
    ]
    values = [0.5, -1, 0, True, "0.5", None, 1e308, float("nan")]
    given = {chance.choice(keys): chance.choice(values) for _ in range(chance.randint(0, 3))}
    found = dict.fromkeys(sites, 0.0)
    for key, value in given.items():
        hits = fnmatch.filter(sites, key) if isinstance(key, str) else []
        gate = _finite(value)
        if not hits or gate is None:
            return given, None
        found |= dict.fromkeys(hits, gate)
    return given, list(found.values())


def _no_gates(chance: Chance, sites: list[str]) -> tuple[Any, None]:
    given = [
        None,
        "0.5",
        "",
        [0.5] * len(sites),
        (1.0,),
        object(),
        {3: 1.0},
        b"1",
        1j,
        chance.text(),
    ]
    return chance.choice(given), None


_GATES = {"a number": _number, "a tensor": _tensor, "a table": _table, "no gates": _no_gates}
