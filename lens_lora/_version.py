"""The versions that a result was made with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of the packages that a number depends on."""
    found = {"lens_lora": __version__}
    for package in ("transformer-lens", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
