"""How a base model is loaded: its dtype, its devices, its quantisation, its attention.

All of it is held as words, as a command line gives them, and torch is not imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Literal, get_args

from lens_lora.errors import ArgumentError, ModelStateError, named, setting

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Attention = Literal["eager", "sdpa"]
DeviceMap = str | Mapping[str, int | str]


@dataclasses.dataclass(frozen=True)
class Placement:
    """How a base model is loaded, and where it lies.

    Raises:
        ArgumentError: an unknown word, two quantisations, a device beside a device map, or a device
            map that puts modules on the disk.
    """

    dtype: str | None = None
    device: str | None = None
    device_map: DeviceMap | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn: str = "eager"

    def __post_init__(self) -> None:
        if self.dtype is not None:
            _require_word("dtype", self.dtype, get_args(Dtype))
        _require_word("attn", self.attn, get_args(Attention))
        if self.load_in_4bit and self.load_in_8bit:
            both = f"{named('load_in_4bit')} and {named('load_in_8bit')}"
            raise ArgumentError(f"{both} exclude each other; choose one.")
        if isinstance(self.device_map, Mapping) and "disk" in self.device_map.values():
            raise ArgumentError(
                f"{named('device_map')} puts modules on 'disk', and a lens needs its weights at "
                "hand. Leave 'disk' out: load in 4 bit or in bfloat16, or over more devices."
            )
        if self.device is not None and self.device_map is not None:
            raise ArgumentError(
                f"{setting('device', self.device)} and {setting('device_map', self.device_map)} "
                "exclude each other: the map says where each module lies. Leave one out."
            )

    def require_packages(self) -> None:
        """Check that the packages which this placement needs are installed.

        Raises:
            ModelStateError: bitsandbytes or accelerate is needed and not installed.
        """
        if self.is_quantised:
            _require_package(
                "bitsandbytes",
                f"{named('load_in_4bit')} and {named('load_in_8bit')} need",
                " (this package's extra: [quantised])",
            )
        if self.is_quantised or self.device_map is not None:
            _require_package("accelerate", f"{named('device_map')} needs")

    @property
    def is_quantised(self) -> bool:
        """Whether linear modules are loaded in 4 or 8 bit."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def says_how_to_load(self) -> bool:
        """Whether it has settings that a model which is loaded already cannot follow."""
        return self.is_quantised or self.device_map is not None

    @property
    def weights(self) -> str:
        """The dtype of the weights: the given one, else float32 on a CPU and 'auto' elsewhere."""
        if self.dtype is not None:
            return self.dtype
        is_on_cpu = self.device_map is None and (self.device or "cpu").startswith("cpu")
        return "float32" if is_on_cpu and not self.is_quantised else "auto"


def _require_word(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        expected = ", ".join(repr(word) for word in words)
        raise ArgumentError(f"{setting(name, value)}; expected {expected}.")


def _require_package(package: str, what_needs: str, extra: str = "") -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelStateError(
            f"{what_needs} the package {package}, which is not installed: pip install "
            f"{package}{extra}."
        )
