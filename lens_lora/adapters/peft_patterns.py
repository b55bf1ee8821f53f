"""What a PEFT config says of a module path: its r and its α, and whether it is adapted at all.

PEFT matches paths with regular expressions, and a file can hold one that takes years. Here they run
in an engine that can be stopped, and all those of one adapter share a limit of time.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import regex

from lens_lora.errors import AdapterError

__all__ = ["Patterns"]

_SECONDS = 4.0
_OUTSIDE_ALL_LINEAR = re.compile(r"(.*\.)?(lm_head|embed_out|embed_tokens|wte|wpe)")


class Patterns:
    """The patterns of one adapter's config, matched with module paths as PEFT matches them.

    Matching may take four seconds in all, counted from the construction: without a limit, some
    regular expressions would run for years.

    Args:
        config: PEFT's LoraConfig.
        source: the adapter's file or model, for error messages.
    """

    def __init__(self, config: Any, source: str) -> None:
        self._config = config
        self._source = source
        self._deadline = time.monotonic() + _SECONDS

    def value(self, field: str, path: str, default: Any) -> Any:
        """The value of the first pattern that PEFT matches with the path, else the default.

        Args:
            field: 'rank_pattern' or 'alpha_pattern'.
            path: the module's.
            default: what holds where no pattern matches.

        Raises:
            AdapterError: the field is no mapping, or a pattern is broken or takes too long.
        """
        patterns = getattr(self._config, field) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(
                f"{self._source}: {field}={patterns!r} does not map patterns of module names to "
                "numbers."
            )
        for key, value in patterns.items():
            if self._matches(field, rf"(.*\.)?({key})", path):
                return value
        return default

    def untargeted(self, paths: Iterable[str]) -> list[str]:
        """The paths that PEFT would not adapt, whatever factors the file holds for them.

        Args:
            paths: module paths as the file has them.

        Raises:
            AdapterError: a field of the config is not what PEFT knows, or takes too long.
        """
        paths = list(paths)
        if self._config.target_modules is None:
            return self._outside_every_default(paths)
        return [path for path in paths if not self._is_targeted(path, self._config.target_modules)]

    def _outside_every_default(self, paths: list[str]) -> list[str]:
        """No targets are named: PEFT takes its defaults of the model's type, which is not known."""
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

        rests = ([p for p in paths if not self._is_targeted(p, t)] for t in known.values())
        return min(rests, key=len)

    def _is_targeted(self, path: str, targets: Any) -> bool:
        from peft.tuners.tuners_utils import check_target_module_exists

        excluded, layers = self._config.exclude_modules, self._config.layers_pattern or []
        if isinstance(targets, str):
            targets = [path] if self._is_regex_for(targets, path) else []
        if isinstance(excluded, str):
            is_out = self._matches("exclude_modules", excluded, path)
            excluded = [path] if is_out else []
        names = [layers] if isinstance(layers, str) else layers
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.]*", name) for name in names):
            raise self._error("layers_pattern", "is no list of module names")
        plain = SimpleNamespace(
            target_modules=targets,
            exclude_modules=excluded,
            layers_to_transform=self._config.layers_to_transform,
            layers_pattern=layers,
        )
        try:
            return bool(check_target_module_exists(plain, path))
        except Exception as error:
            raise self._error("target_modules", f"is not as PEFT has it ({error})") from error

    def _is_regex_for(self, targets: str, path: str) -> bool:
        if targets.lower() == "all-linear":
            return not _OUTSIDE_ALL_LINEAR.fullmatch(path)
        return self._matches("target_modules", targets, path)

    def _matches(self, field: str, pattern: str, path: str) -> bool:
        left = self._deadline - time.monotonic()
        try:
            return _compiled(pattern).fullmatch(path, timeout=max(left, 1e-3)) is not None
        except TimeoutError as error:
            what = f"takes more than {_SECONDS:g} s to match with {path!r}"
            raise self._error(field, what) from error
        except Exception as error:
            raise self._error(field, f"holds no patterns of module names ({error})") from error

    def _error(self, field: str, what: str) -> AdapterError:
        value = getattr(self._config, field)
        return AdapterError(
            f"{self._source}: {field}={value!r} {what}; write plain module names there."
        )


@functools.lru_cache(maxsize=8192)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)
