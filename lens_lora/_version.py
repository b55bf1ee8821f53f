"""The versions that a result was made with."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on, from their metadata: none is imported."""
    packages = ("transformer-lens", "torch", "transformers", "peft")
    return {"lens_lora": __version__, **{package: _installed(package) for package in packages}}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
