"""Shards, and what gathers them, killed at random moments: the files of one process, bit for bit.

    python tests/sweeps/kill_shards.py --kills 50 --seed 0

Each shard is started in a fork and killed (SIGKILL) at a random moment, until a run of it comes to
its end. Then `gather` is killed in the same way. It prints how many kills there were.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).parent))

import kills  # noqa: E402
import models  # noqa: E402
import sweep_runs  # noqa: E402

import lens_lora as ll  # noqa: E402

SHARDS = 3


def until_done(work: Callable[[], None], longest: float, chance: random.Random, most: int) -> int:
    """Run the work in forks, each killed at a random moment, until one ends; how many were killed.

    Args:
        work: what is run.
        longest: a fork runs at most so many seconds before it is killed.
        chance: draws the moments.
        most: after so many kills no further one.
    """
    killed = 0
    while True:
        with tempfile.TemporaryDirectory() as folder:
            process = kills.forked(work, Path(folder) / "error")
            patience = chance.uniform(0, longest) if killed < most else kills.PATIENCE
            code = kills.ended(process, patience)
            if code is None:
                kills.kill(process)
                killed += 1
            elif code == 0:
                return killed
            else:
                raise kills.Broken((Path(folder) / "error").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    with models.lifted():
        lens = sweep_runs.a_lens()
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        parts = Path(place) / "parts"

        def shard(index: int) -> None:
            ll.sweep(
                lens,
                kills.RECORDS,
                out=parts / "r.parquet",
                batch_size=2,
                shard=(index, SHARDS),
                progress=False,
            )

        begun = time.monotonic()
        until_done(lambda: kills.sweep(lens, kills.RECORDS, whole, None), 1.0, chance, 0)
        longest = time.monotonic() - begun
        killed = 0
        for index in range(1, SHARDS + 1):
            left = (asked.kills - killed) // (SHARDS + 2 - index)
            killed += until_done(lambda index=index: shard(index), longest, chance, left)
        killed += until_done(
            lambda: ll.gather(parts / "r.parquet"), longest / 4, chance, asked.kills - killed
        )
        for name in kills.FILES:
            if (whole / name).read_bytes() != (parts / name).read_bytes():
                raise kills.Broken(f"{name} is not that of one process")
        print(killed)


if __name__ == "__main__":
    main()
