"""Estimate how long a command takes, before anything heavy is imported.

1. The size of the base is that of its weight files, if they are on this machine.
2. The speed of this machine, as busy as it is now, is measured on matrix products for a tenth of a
   second, and compared with that of the machine on which the commands were timed.
3. The estimate is the time of the imports, plus the command's own time in proportion to the size of
   the base.

It is right within a factor of about two, for a user who wonders whether to wait.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import NamedTuple

from lens_lora.cli.options import ModelOptions
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import ModelStateError
from lens_lora.formats.folders import stated_base

# The size of the matrix product that is timed, its time, and that of importing torch, transformers
# and transformer-lens, on the core on which the commands were timed with SmolLM2-135M-Instruct.
_SIZE_OF_PRODUCT = 768
_SECONDS_OF_PRODUCT = 0.006
_SECONDS_OF_IMPORTS = 6.0
_BYTES_OF_SMOLLM2 = 540e6  # in float32
_SECONDS_OF_MEASURING = 0.1


class Work(NamedTuple):
    """The work of a command, and how long it takes with SmolLM2-135M-Instruct on one core.

    Attributes:
        does: words that follow 'This will', such as 'explain 2 prompts and write page.html'.
        seconds: the time of loading the model and of the command's own passes.
    """

    does: str
    seconds: float

    def after(self, does: str, seconds: float) -> Work:
        """Return the work with something that is done before it."""
        return Work(f"{does}, {self.does}", seconds + self.seconds)


def forecast(work: Work, base: ModelOptions, adapter: Path) -> str:
    """Write a sentence on how long a command takes here.

    Args:
        work: what the command does.
        base: the base model that the options name.
        adapter: the adapter's folder, whose config may name the base.
    """
    size = _size_of_base(base.model, adapter)
    if size is None:
        return "How long it takes depends on its base, which is not on this machine."
    expected = (_SECONDS_OF_IMPORTS + work.seconds * size) * _slowness()
    return f"It takes {_about(expected)}."


def _about(seconds: float) -> str:
    """Write a duration as one would say it: 'about 20 seconds', 'about 3 minutes'."""
    if seconds < 50:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    if seconds < 90:
        return "about a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.0f} hours"


def _slowness() -> float:
    """Return the time of a matrix product now, over its time when the commands were timed."""
    import numpy as np

    matrix = np.ones((_SIZE_OF_PRODUCT, _SIZE_OF_PRODUCT), np.float32)
    np.dot(matrix, matrix)  # the first one starts the threads
    times: list[float] = []
    while sum(times) < _SECONDS_OF_MEASURING:
        began = time.perf_counter()
        np.dot(matrix, matrix)
        times.append(time.perf_counter() - began)
    mean = sum(times) / len(times)
    # If other programs compute too, a product waits now and then. The mean includes these waits,
    # but in so short a time a single long one would weigh too much; the geometric mean with the
    # fastest product lies between.
    return math.sqrt(mean * min(times)) / _SECONDS_OF_PRODUCT


def _size_of_base(model: str | None, adapter: Path) -> float | None:
    """Return the size of the base relative to SmolLM2-135M; None if it is not on this machine."""
    try:
        named = base_by_name(model, stated_base(adapter))
    except ModelStateError:
        return None
    if named.is_embedded:
        return 1.0
    folder = _folder_of_base(named.name)
    if folder is None:
        return None
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights / _BYTES_OF_SMOLLM2 if weights else None


def _folder_of_base(named: str) -> Path | None:
    """Find the folder of a base on this machine: the named folder, or one in the hub's cache."""
    if Path(named).is_dir():
        return Path(named)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(named, "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
