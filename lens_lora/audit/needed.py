"""Estimate an audit's memory and time before it runs, from the base model's configuration.

The model is built on the meta device, where its weights take no memory, and its parameters are
counted. With P parameters of w bytes each:

    memory   P w, plus the logits of 512 tokens and the keys and values of 12,288 tokens
    time     2 P multiplications for each token that is run, at the rate of a matrix product on
             this device; the number of tokens was calibrated on an audit of SmolLM2-135M

Both are rough. A language model spends time on more than matrix products, so an audit may take half
or twice the time that is estimated here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal

import psutil
import torch

from lens_lora.hosts.placement import Placement

# The number of tokens with which the estimate meets the measured time of an audit: 300 and 80
# seconds with SmolLM2-135M on one core, which makes 5.0e10 multiplications a second.
_TOKENS: dict[Literal["whole", "fast"], float] = {"whole": 56_000, "fast": 15_000}
# The number of tensors of 512 tokens' logits that are held at once, in float32.
_LOGITS_HELD = 6
_TOKENS_OF_LOGITS = 512
_CACHED_TOKENS = 12_288
# The memory of Python and its libraries, in bytes.
_LIBRARIES = 0.8e9
_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Needs:
    """The needs of one audit.

    Attributes:
        parameters: the number of the base model's parameters.
        memory: the memory in bytes.
        seconds: the time in seconds, including the loading of the base.
    """

    parameters: int
    memory: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e9:.2g} billion parameters: about {self.memory / 1e9:.2g} GB of "
            f"memory and {duration(self.seconds)}"
        )


def needs_of(config: Any, how: Placement, rate: float, *, fast: bool, models: int = 1) -> Needs:
    """Find what an audit over a base needs.

    Args:
        config: the base's Hugging Face configuration.
        how: the device and the number format of the model.
        rate: the multiplications per second, from `rate_on`.
        fast: whether the audit is a fast one.
        models: how many such models are loaded at once: two for a full fine-tune.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    width = _bytes_of_a_weight(config, how)
    text = config.get_text_config()
    keys_and_values = 2 * text.num_hidden_layers * text.hidden_size
    held = 4.0 * _LOGITS_HELD * _TOKENS_OF_LOGITS * text.vocab_size
    cached = max(width, 2.0) * _CACHED_TOKENS * keys_and_values
    tokens = _TOKENS["fast" if fast else "whole"]
    return Needs(
        parameters=parameters,
        memory=models * parameters * width + held + cached + _LIBRARIES,
        seconds=2.0 * parameters * tokens / rate,
    )


def _bytes_of_a_weight(config: Any, how: Placement) -> float:
    if how.load_in_4bit:
        return 0.6
    if how.load_in_8bit:
        return 1.1
    dtype = how.weights
    if dtype == "auto":
        stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        dtype = str(stored or "float32").removeprefix("torch.")
    return _BYTES.get(dtype, 4.0)


def rate_on(device: str, dtype: str) -> float:
    """Measure multiplications per second on a product of two square matrices, the best of three."""
    kind = getattr(torch, dtype) if dtype in _BYTES else torch.float32
    one = torch.randn(_SIDE, _SIDE, device=device).to(kind)
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        # Reading the sum waits for a device that computes asynchronously.
        (one @ one).sum().item()
        seconds.append(time.perf_counter() - started)
    return _SIDE**3 / min(seconds)


def free_bytes(device: str) -> float:
    """Return the bytes that are free on a device; infinity if the device does not report them."""
    kind = torch.device(device).type
    if kind == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if kind == "cpu":
        return float(psutil.virtual_memory().available)
    return math.inf


def duration(seconds: float) -> str:
    """Write a duration in words, such as '2 minutes' or '3.5 hours'.

    Args:
        seconds: the duration; less than one second is written as one.
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.2g} hours"
