"""Say what an audit will need before it runs: memory and time, from the base's configuration.

The model is built on the meta device, where its weights take no memory, and its parameters are
counted. With P parameters, w bytes each:

    memory   P w, and 512 tokens' logits and the keys and values of 12,288 tokens
    time     2 P multiplications for each token that is run, at the rate of a product of two
             matrices on this device; how many tokens, an audit of SmolLM2-135M says

Both are rough. A language model spends more than its products, so hours may be half or twice what
is said here.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, Literal

import psutil
import torch

from lens_lora.hosts.placement import Placement

# As many tokens as take the time of an audit if each takes that of 2 P multiplications: 90 and 40
# seconds with SmolLM2-135M on one core, which multiplies 7.5e10 times in a second.
_TOKENS: dict[Literal["whole", "fast"], float] = {"whole": 25_000, "fast": 11_000}
# So many tensors of the logits of 512 tokens are held at once, in float32.
_LOGITS_HELD = 6
_TOKENS_OF_LOGITS = 512
_CACHED_TOKENS = 12_288
# Python and its libraries, in bytes.
_LIBRARIES = 0.8e9
_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_SIDE = 1024


@dataclasses.dataclass(frozen=True)
class Needs:
    """The needs of one audit.

    Attributes:
        parameters: of the base model.
        memory: in bytes.
        seconds: in seconds, from the base's loading on.
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
        config: the base's, of Hugging Face.
        how: where the model lies and how it is stored.
        rate: multiplications in a second, from `rate_on`.
        fast: whether the audit is.
        models: how many such models are loaded at once: two where a model was fine-tuned whole.
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
    """Multiplications in a second, of a product of two square matrices; the best of three."""
    kind = getattr(torch, dtype) if dtype in _BYTES else torch.float32
    one = torch.randn(_SIDE, _SIDE, device=device).to(kind)
    seconds: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        # The sum waits for a device that computes on its own.
        (one @ one).sum().item()
        seconds.append(time.perf_counter() - started)
    return _SIDE**3 / min(seconds)


def free_bytes(device: str) -> float:
    """The bytes that are free on a device; infinite where it does not tell."""
    kind = torch.device(device).type
    if kind == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if kind == "cpu":
        return float(psutil.virtual_memory().available)
    return math.inf


def duration(seconds: float) -> str:
    """'2 minutes', or '3.5 hours'.

    Args:
        seconds: how many; a single one at least.
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.2g} hours"
