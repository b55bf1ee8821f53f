"""Mutated results, records and half-finished sweeps: what was computed, or refused by name.

The oracles: for a result the one that was saved; for records PEFT's margins of both models; for a
sweep's own files the tables of one that nobody touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import models
import pandas as pd
import sweep_runs
import torch
from every_result import every_result
from safetensors import safe_open
from safetensors.torch import save

import lens_lora as ll
from fuzz.guard import Case, Chance, Wrong, require_close
from lens_lora.core.results import storage
from lens_lora.sweeps.rows import RowStore

GOOD = sweep_runs.GOOD
FILES = ["r.parquet", "r.prompts.parquet"]
Saved = list[tuple[type, Path]]
Parts = tuple[dict[str, str], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class World:
    """A lens with its PEFT model, a finished sweep and a stopped one, and their whole tables."""

    case: cases.Case
    finished: Path
    stopped: Path
    whole: list[pd.DataFrame]


def saved_results(folder: Path) -> Saved:
    """One of each kind; made and read outside of `models.lifted()`, which changes float32."""
    folder.mkdir(parents=True)
    found: Saved = []
    for i, result in enumerate(every_result()):
        found.append((type(result), result.save(folder / f"{i}.safetensors")))
    return found


def world(folder: Path) -> World:
    """Made once; within `models.lifted()`."""
    case = cases.case("llama", next(iter(models.MAKERS)), "raw")
    sweep_runs.run(case.lens, GOOD, folder / "finished")
    merge = RowStore.merge
    RowStore.merge = _stop
    try:
        sweep_runs.run(case.lens, GOOD, folder / "stopped", batch_size=1)
    except KeyboardInterrupt:
        pass
    finally:
        RowStore.merge = merge
    return World(case, folder / "finished", folder / "stopped", frames(folder / "finished"))


def _stop(*args: object) -> None:
    raise KeyboardInterrupt


def frames(folder: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(folder / name) for name in FILES]


def spoiled(chance: Chance, content: bytes) -> bytes:
    """Bytes flipped, cut, added, or put in place of all."""
    how = chance.choice(["flip", "flip", "cut", "longer", "empty", "zeroes", "other"])
    changed = bytearray(content)
    if how == "flip":
        for _ in range(chance.choice([1, 1, 4])):
            changed[chance.randrange(len(changed))] ^= chance.randint(1, 255)
    elif how == "cut":
        changed = changed[: chance.randrange(len(changed))]
    elif how == "longer":
        changed += bytes(chance.randrange(256) for _ in range(chance.randint(1, 40)))
    elif how == "zeroes":
        start = chance.randrange(len(changed))
        changed[start : start + 512] = bytes(len(changed[start : start + 512]))
    else:
        changed = bytearray(b"" if how == "empty" else chance.text().encode(errors="ignore"))
    return bytes(changed)


# --- results


def _parts(path: Path) -> Parts:
    with safe_open(str(path), framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _require_same(one: Parts, other: Parts) -> None:
    """The same metadata, and the same tensors to the byte."""
    if one[0] != other[0] or one[1].keys() != other[1].keys():
        raise Wrong("a result came back with other labels")
    for name, tensor in one[1].items():
        if not torch.equal(*(t.contiguous().view(torch.uint8) for t in (tensor, other[1][name]))):
            raise Wrong(f"a result came back with another {name}")


def _edited(chance: Chance, labels: Any) -> Any:
    """JSON with one part of it changed."""
    if isinstance(labels, dict) and labels and chance.maybe(0.9):
        key = chance.choice(sorted(labels))
        how = chance.choice(["inner", "inner", "inner", "gone", "renamed"])
        rest = {name: part for name, part in labels.items() if name != key}
        if how == "inner":
            return {**labels, key: _edited(chance, labels[key])}
        return rest if how == "gone" else {**rest, chance.text(): labels[key]}
    if isinstance(labels, list) and labels and chance.maybe(0.9):
        i = chance.randrange(len(labels))
        return [*labels[:i], _edited(chance, labels[i]), *labels[i + 1 :]]
    return chance.value()


def _result_bytes(chance: Chance, path: Path) -> None:
    path.write_bytes(spoiled(chance, path.read_bytes()))


def _result_header(chance: Chance, path: Path) -> None:
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = _edited(chance, json.loads(content[8 : 8 + size]))
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])


def _result_labels(chance: Chance, path: Path, *, digest: bool = False) -> None:
    metadata, tensors = _parts(path)
    labels = json.dumps(_edited(chance, json.loads(metadata["labels"])))
    if digest and tensors and chance.maybe(0.3):
        name = chance.choice(sorted(tensors))
        tensors[name] = chance.choice([tensors[name][None], tensors[name].to(torch.int64)])
    metadata["labels"] = labels
    if digest:
        metadata["sha256"] = storage._digest(labels, tensors)
    path.write_bytes(save(tensors, metadata=metadata))


def _result_of_another_version(chance: Chance, path: Path) -> None:
    _result_labels(chance, path, digest=True)


def _nothing(chance: Chance, path: Path) -> None:
    """The control."""


RESULTS: dict[str, Callable[[Chance, Path], None]] = {
    "nothing": _nothing,
    "its bytes": _result_bytes,
    "its header": _result_header,
    "its labels": _result_labels,
    "of another version: labels and digest": _result_of_another_version,
}


def results(saved_ones: Saved, chance: Chance, scratch: Path) -> Case:
    kind, saved = chance.choice(saved_ones)
    mutation = chance.choice(sorted(RESULTS))
    path = scratch / "r.safetensors"
    shutil.copy(saved, path)
    RESULTS[mutation](chance, path)
    loader = chance.choice(saved_ones)[0] if chance.maybe(0.1) else kind

    def act() -> Any:
        return loader.load(path)

    def judge(found: Any) -> None:
        if type(found) is not loader:
            raise Wrong(f"{loader.__name__}.load gave a {type(found).__name__}")
        if RESULTS[mutation] is not _result_of_another_version:
            _require_same(_parts(saved), _parts(found.save(scratch / "again")))

    return Case("result files", mutation, act, judge, f"{kind.__name__}: {mutation}")


# --- records


def _field(chance: Chance) -> Any:
    odd = chance.choice([None, "", 3, 1.5, True, [], {}, ["w5"], "\ud800", "w5 " * 40, "zebra"])
    return chance.choice([odd, chance.text(), chance.value(), chance.number()])


def _a_record(chance: Chance, i: int) -> tuple[dict[str, Any], bool]:
    """A record, and whether it was left as it is."""
    words = [f"w{chance.randint(4, 60)}" for _ in range(5)]
    record: dict[str, Any] = {
        "id": f"clean {i}", "prompt": " ".join(words[:3]), "doc": words[3], "pre": f"{words[4]} w5",
    }  # fmt: skip
    if chance.maybe(0.5):
        return record, True
    name = chance.choice(sorted(record))
    how = chance.choice(["value", "value", "gone", "more", "twice"])
    if how == "gone":
        del record[name]
    elif how == "twice":
        record["pre"] = record["doc"]
    else:
        record[name if how == "value" else chance.text()] = _field(chance)
    if record.get("id") == f"clean {i}":
        record["id"] = f"spoiled {i}"
    return record, False


def _as_jsonl(chance: Chance, records: list[dict[str, Any]], path: Path) -> Any:
    lines = [json.dumps(record, default=str).encode() for record in records]
    junk = [b"", b"{", b"[1]", b"\xff\xfe", b"null", b'{"id": 1', b"[" * 20_000, b'"w5"', b"NaN"]
    lines.insert(chance.randrange(len(lines) + 1), chance.choice(junk))
    file = path / "r.jsonl"
    file.write_bytes(b"\n".join(lines))
    return file


def _as_csv(chance: Chance, records: list[dict[str, Any]], path: Path) -> Any:
    file = path / "r.csv"
    plain = [
        {name: str(record.get(name, "")) for name in ("id", "prompt", "doc", "pre")}
        for record in records
    ]
    content = pd.DataFrame(plain).to_csv(index=False).encode()
    junk = [b"", b"\xe9,w5,w6,w7\n", b'"w5\n', b"a,b\n", b"a,b,c,d,e,f\n", b"\0\0\n"]
    file.write_bytes(content + chance.choice(junk))
    return file


SOURCES: dict[str, Callable[[Chance, list[dict[str, Any]], Path], Any]] = {
    "as mappings": lambda chance, records, path: records,
    "as a data frame": lambda chance, records, path: pd.DataFrame(records),
    "as JSONL": _as_jsonl,
    "as CSV": _as_csv,
}


def records(world: World, chance: Chance, scratch: Path) -> Case:
    source = chance.choice(sorted(SOURCES))
    out = scratch / "sweep"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    made = [_a_record(chance, i) for i in range(4)]
    given: Any = [record for record, _ in made]
    with contextlib.suppress(UnicodeEncodeError):  # of pandas: such a source cannot be made
        given = SOURCES[source](chance, given, out)

    def act() -> ll.results.SweepResult:
        return sweep_runs.run(world.case.lens, given, out)

    def judge(found: ll.results.SweepResult) -> None:
        table = found.prompts()
        good = table[table["error"].isna()].to_dict("records")
        by_id = {str(row["id"]): row for row in good}
        for record in [record for record, is_clean in made if is_clean]:
            row = by_id.get(record["id"], {})
            if any(row.get(name) != text for name, text in record.items()):
                raise Wrong(f"{record} has the row {row}")
        for row in good:
            _require_margins(world.case, row)

    shown = f"{source}: {[record for record, _ in made]}"
    return Case("records", source, act, judge, shown)


def _require_margins(case: cases.Case, row: dict[str, Any]) -> None:
    """Both ends of a row are what Hugging Face and PEFT give."""
    model = case.model
    with torch.no_grad():
        with case.peft.disable_adapter():
            base = _margin(case.peft, model, row)
        adapted = _margin(case.peft, model, row)
    ends = torch.tensor([row["base"], row["adapted"]], dtype=torch.float64)
    require_close(ends, torch.stack([base, adapted]), f"{row}")


def _margin(peft: Any, model: Any, row: dict[str, Any]) -> torch.Tensor:
    prompt = model.to_tokens(row["prompt"])[0].tolist()
    answers = [
        model.tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("doc", "pre")
    ]
    if all(len(answer) == 1 for answer in answers):
        logits = peft(torch.tensor([prompt])).logits[0, -1]
        return logits[answers[0][0]] - logits[answers[1][0]]
    sums = []
    for answer in answers:
        logits = peft(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(logits[places, torch.tensor(answer)].sum())
    return sums[0] - sums[1]


# --- a sweep's own files


def sweep_files(world: World, chance: Chance, scratch: Path) -> Case:
    kind = chance.choice(["a part", "a result", "a part's name", "other files"])
    out = scratch / "s"
    shutil.rmtree(out, ignore_errors=True)
    is_result = kind == "a result" or (kind == "other files" and chance.maybe(0.5))
    shutil.copytree(world.finished if is_result else world.stopped, out)
    paths = sorted(out.rglob("*.parquet"))
    path = chance.choice([p for p in paths if p.is_file()])
    if kind == "a part's name":
        path.rename(path.with_name(chance.choice(["1.parquet", f"1-{'0' * 32}.parquet", "x"])))
    elif kind == "other files":
        name = chance.choice([".r.parquet.lock", "r.parts/about.json", "r.parts/.x", "r.csv"])
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(spoiled(chance, b"{}"))
    else:
        path.write_bytes(spoiled(chance, path.read_bytes()))

    def act() -> ll.results.SweepResult:
        return sweep_runs.run(world.case.lens, GOOD, out)

    def judge(found: ll.results.SweepResult) -> None:
        for table, wanted in zip(frames(out), world.whole, strict=True):
            try:
                pd.testing.assert_frame_equal(table, wanted, rtol=1e-10, atol=1e-12)
            except AssertionError as error:
                raise Wrong(str(error)) from error

    return Case("files of sweeps", kind, act, judge, f"{kind}: {path.name}")
