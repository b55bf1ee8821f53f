"""A few hundred cases of the fuzz; benchmarks/fuzz.py runs any number of the same.

Each case is right by an oracle that is not the package, or refused by an error of ours, within 10
seconds and 1 GB; nothing is connected to, started, unpickled or run (tests/house/fuzz/guard.py).
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from fuzz import guard
from fuzz.guard import PLANTED, Case, UsersOwn, Wrong

import lens_lora as ll

pytestmark = pytest.mark.bad_input
TESTS = Path(__file__).parents[1]

CASES = {
    "adapter folders": 180,
    "result files": 80,
    "records": 25,
    "files of sweeps": 25,
    "prompts": 90,
    "tokens of readouts": 90,
    "gates": 90,
    "hooks of users": 50,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> fuzz.Fuzz:
    return fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_run():
    assert list(CASES) == list(fuzz.TARGETS)


@pytest.mark.sample(1)
@pytest.mark.parametrize("target", CASES)
def test_right_or_refused(run, target):
    for number in range(CASES[target]):
        run.run_one(target, number)
    faults = [fault for fault in run.faults if fault.target == target]
    assert not faults, f"{len(faults)} faults:\n" + "\n\n".join(map(str, faults[:5]))
    kinds = {mutation for name, mutation in run.counts if name == target}
    assert sum(run.counts[target, kind]["right"] > 0 for kind in kinds) >= 1
    assert run.counts[target, "nothing"]["right"] > 0 or "nothing" not in kinds


@pytest.mark.slow
def test_a_case_is_the_same_whenever_it_is_run(run, tmp_path):
    """Its number decides it."""
    again = fuzz.Fuzz(tmp_path)
    for target in ("gates", "adapter folders"):
        for number in range(12):
            assert again.run_one(target, number) == run.run_one(target, number)


def test_each_target_has_its_share():
    names = [name for name, _ in zip_first(fuzz.cases(), 200)]
    shares = {name: target.share for name, target in fuzz.TARGETS.items()}
    assert {name: names.count(name) // 10 for name in shares} == shares
    numbers = [number for name, number in zip_first(fuzz.cases(), 200) if name == "gates"]
    assert numbers == list(range(20))


def zip_first(items, count):
    return [item for item, _ in zip(items, range(count), strict=False)]


def test_the_page_s_table_is_of_these_targets():
    """Written by the command, of thousands of cases, and without a fault."""
    page = (Path(__file__).parents[2] / "docs" / "precision_data.md").read_text(encoding="utf-8")
    text = page.partition("<!-- fuzz -->")[2].partition("<!-- end of fuzz -->")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    _, _, *lines, total = [[cell.strip() for cell in row] for row in rows]
    numbers = [[int(cell.replace(",", "")) for cell in row[2:]] for row in lines]
    assert list(dict.fromkeys(row[0] for row in lines)) == list(fuzz.TARGETS)
    assert all(n == right + refused and not faults for n, right, refused, faults in numbers)
    assert sum(row[0] for row in numbers) == int(total[-4].replace(",", "")) >= 5000
    assert f"{total[-4]} cases" in text
    front = (Path(__file__).parents[2] / "docs" / "precision.md").read_text(encoding="utf-8")
    assert f"{total[-3]}\ngave the answer" in front
    assert f"{total[-2]} were refused" in front


# --- negative controls: what is not right and not refused is seen


class Opens:
    def __reduce__(self):
        return (os.getcwd, ())


def refused():
    raise ll.errors.AdapterError("q_proj: no such module.")


def users_own():
    raise UsersOwn


def foreign():
    raise KeyError("q_proj")


def without_words():
    raise ll.errors.AdapterError("")


def connects():
    with socket.socket() as probe:
        probe.settimeout(0.1)
        probe.connect_ex(("127.0.0.1", 9))


def unpickles():
    return pickle.loads(pickle.dumps(Opens()))


def starts():
    os.system("true")


def opens():
    with pytest.raises(OSError):
        Path(f"/{PLANTED}/weights").read_bytes()


def imports():
    with pytest.raises(ImportError):
        __import__(PLANTED)


def turns():
    while True:
        pass


SEEN = {
    refused: "refused", users_own: "right", foreign: "foreign KeyError",
    without_words: "no message", connects: "trapped", unpickles: "trapped",
    starts: "trapped", opens: "trapped", imports: "trapped", turns: "slow",
}  # fmt: skip


@pytest.mark.parametrize("act", SEEN, ids=lambda act: act.__name__)
def test_what_is_seen(act, monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.3)
    monkeypatch.setattr(guard, "BYTES", 100_000_000)
    assert guard.run(Case("t", "m", act, lambda found: None)).kind == SEEN[act]


FILLS = """
import torch
from fuzz import guard
guard.BYTES = 100_000_000
fills = lambda: torch.ones(30_000_000, dtype=torch.float64)
print(guard.run(guard.Case("t", "m", fills, lambda found: None)).kind)
"""


@pytest.mark.slow
def test_memory_is_seen():
    """In a process of its own: one that has run long has memory to give out already."""
    places = os.pathsep.join([str(TESTS / "house"), str(TESTS / "lib"), str(TESTS.parent)])
    run = subprocess.run(
        [sys.executable, "-c", FILLS],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["memory"]


def test_a_wrong_answer_is_seen():
    def judge(found):
        guard.require_close(torch.tensor([found]), torch.tensor([1.0]), "it")

    assert guard.run(Case("t", "m", lambda: 1.0, judge)).kind == "right"
    assert guard.run(Case("t", "m", lambda: 1.1, judge)).kind == "wrong"
    for other in (torch.tensor([1.0, 1.0]), torch.tensor([float("nan")])):
        with pytest.raises(Wrong):
            guard.require_close(other, torch.tensor([1.0]), "it")


def test_a_lens_that_forgets_a_gate_is_seen(run, monkeypatch):
    """The oracle is not the package: a planted error of it is a wrong answer."""
    plain = ll.LoraLens.gates
    monkeypatch.setattr(ll.LoraLens, "gates", lambda lens, scale=1.0: plain(lens, scale) * 0.999)
    before = len(run.faults)
    kinds = [run.run_one("gates", number).kind for number in range(12)]
    assert "wrong" in kinds
    del run.faults[before:]
