"""Sweeps that are killed at random moments, on one process and on two, until each is finished.

    python tests/sweeps/kills.py --kills 100 --processes 1 2 --seed 0

1. A fresh process imports everything once and forks each run from there.
2. A run is killed (SIGKILL) at a random moment of its length; of two processes a random one first,
   and the other a little later, or once it has noticed.
3. The same sweep is run again and killed again, until a run comes to its end. Now and then a sweep
   begins with results of a few of its records, so that they grow.

After each kill, a result file that is there is whole. No prompt that was kept runs again. At the
end the tables are those of a run that nobody disturbed, and nothing else lies beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import accelerate.state  # noqa: F401  (before the fork)
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

import models  # noqa: E402
import sweep_runs  # noqa: E402

import lens_lora as ll  # noqa: E402
from lens_lora.sweeps import sweep as sweeps  # noqa: E402, F401
from lens_lora.sweeps.rows import RowStore  # noqa: E402

RECORDS = [
    *sweep_runs.WITH_A_BAD_ONE,
    *({"id": f"w{i}", "prompt": f"w{i} w5", "doc": "w8", "pre": "w9"} for i in range(20, 26)),
]
FEW = RECORDS[2:6]
NOTICED = 3
PATIENCE = 60.0
FILES = ["r.parquet", "r.prompts.parquet"]


class Broken(AssertionError):
    """A law that did not hold."""


def logged(log: Path) -> None:
    """Write down which prompt is begun, and which is kept, in one line each."""
    module = sys.modules["lens_lora.sweeps.batches"]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(word: str, prompts: Sequence[str | None]) -> None:
        os.write(file, "".join(f"{word}\t{prompt}\n" for prompt in prompts).encode())

    def measured(lens, jobs, names, plain=module.measure):
        note("begun", [job.prompt for job in jobs])
        return plain(lens, jobs, names)

    def added(self, rows, plain=RowStore.add):
        plain(self, rows)
        note("kept", [row["prompt"] for row in rows])

    module.measure = measured
    RowStore.add = added


def forked(work: Callable[[], None], errors: Path) -> int:
    """The process id of a fork that does the work and ends: 0, 3 for an error of ours, or 4."""
    process = os.fork()
    if process:
        return process
    code = 0
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        with models.lifted():
            work()
    except ll.errors.LensLoraError:
        code = NOTICED
    except BaseException:
        code = 4
        errors.write_text(traceback.format_exc())
    os._exit(code)


def sweep(lens: ll.LoraLens, records: Sequence[dict], folder: Path, log: Path | None) -> None:
    if log is not None:
        logged(log)
    ll.sweep(lens, records, out=folder / "r.parquet", batch_size=2, progress=False)


def start(lens, records, folder: Path, log: Path | None, count: int) -> list[int]:
    """The processes of one run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        if count > 1:
            os.environ |= {
                "WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
            }  # fmt: skip
        sweep(lens, records, folder, log)

    errors = folder.parent / "error"
    return [forked(lambda rank=rank: work(rank), errors) for rank in range(count)]


def ended(process: int, within: float) -> int | None:
    """The exit code of a process, negative for a signal; None if it still runs."""
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def kill(process: int) -> int:
    os.kill(process, signal.SIGKILL)
    code = ended(process, PATIENCE)
    if code is None:
        raise Broken("a killed process still runs")
    return code


def disturbed(rng: random.Random, processes: list[int], length: float) -> bool:
    """Kill the processes at a random moment; whether the run came to its end before."""
    first, *others = rng.sample(processes, len(processes))
    code = ended(first, rng.uniform(0.0, length))
    codes = [kill(first) if code is None else code]
    patience = rng.choice([0.0, 0.05, 1.0]) if code is None else PATIENCE
    for other in others:
        code = ended(other, patience)
        codes.append(kill(other) if code is None else code)
    for code in codes:
        if code not in (0, NOTICED, -signal.SIGKILL):
            raise Broken(f"a process ended with {code}")
    if NOTICED in codes and -signal.SIGKILL not in codes:
        raise Broken(f"a run that nobody killed was refused: {codes}")
    return set(codes) == {0}


def frames(folder: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(folder / name) for name in FILES]


def require_whole(folder: Path) -> None:
    """Whatever was killed, each result that is there can be read."""
    for name in FILES:
        if (folder / name).exists():
            pd.read_parquet(folder / name)


def require_no_repetition(log: Path) -> int:
    """No prompt is begun after it was kept; how many were begun."""
    kept: set[str] = set()
    begun = 0
    for line in log.read_text().splitlines() if log.exists() else ():
        word, prompt = line.split("\t")
        if word == "begun" and prompt in kept:
            raise Broken(f"{prompt!r} was kept, and was run again")
        begun += word == "begun"
        if word == "kept":
            kept.add(prompt)
    return begun


def undisturbed(lens, records, folder: Path, count: int = 1) -> float:
    """A whole run; how long it took."""
    began = time.monotonic()
    codes = [ended(p, PATIENCE) for p in start(lens, records, folder, None, count)]
    if set(codes) != {0}:
        raise Broken(f"an undisturbed run ended with {codes}")
    return time.monotonic() - began


def storm(kills: int, count: int, seed: int, top: Path) -> dict[str, int]:
    """So many kills of sweeps on so many processes."""
    rng = random.Random(seed)
    lens = sweep_runs.a_lens()
    undisturbed(lens, RECORDS, top / "whole")
    wanted = frames(top / "whole")
    length = undisturbed(lens, RECORDS, top / "timed", count)
    made = {"kills": 0, "sweeps": 0, "grown": 0, "runs": 0}
    while made["kills"] < kills:
        folder = top / f"sweep {made['sweeps']}"
        log = top / f"log {made['sweeps']}"
        if rng.random() < 0.3:
            undisturbed(lens, FEW, folder)
            made["grown"] += 1
        while True:
            made["runs"] += 1
            if disturbed(rng, start(lens, RECORDS, folder, log, count), length):
                break
            made["kills"] += 1
            require_whole(folder)
        require_no_repetition(log)
        left = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
        if left != FILES:
            raise Broken(f"left behind: {left}")
        for found, expected in zip(frames(folder), wanted, strict=True):
            pd.testing.assert_frame_equal(found, expected, rtol=1e-10, atol=1e-12)
        made["sweeps"] += 1
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, nargs="+", default=[100], help="one, or one each")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    kills = asked.kills * (len(asked.processes) if len(asked.kills) == 1 else 1)
    for wanted, count in zip(kills, asked.processes, strict=True):
        with tempfile.TemporaryDirectory(prefix="kills_") as top:
            try:
                made = storm(wanted, count, asked.seed, Path(top))
            except BaseException:
                error = Path(top) / "error"
                print(error.read_text() if error.exists() else "", file=sys.stderr)
                raise
        print(json.dumps({"processes": count, **made}), flush=True)


if __name__ == "__main__":
    main()
