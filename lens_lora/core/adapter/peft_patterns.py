"""The patterns of a config: which r and α PEFT gives a module path, and whether it adapts it."""

from __future__ import annotations

import copy
import functools
import re
import time
from collections.abc import Iterable
from typing import Any

import regex

from lens_lora.errors import AdapterError

# Some regular expressions would take PEFT's `re` years; all those of one adapter share this time.
_SECONDS = 4.0
_OUTSIDE_ALL_LINEAR = re.compile(r"(.*\.)?(lm_head|embed_out|embed_tokens|wte|wpe)")


class Patterns:
    """The patterns of one adapter's config, matched with module paths as PEFT matches them.

    They run in an engine that can be stopped, for four seconds in all from the construction on.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._deadline = time.monotonic() + _SECONDS

    def value(self, field: str, path: str, default: Any) -> Any:
        """The value of the first pattern that PEFT matches with the path, else the default.

        Args:
            field: 'rank_pattern' or 'alpha_pattern'.
            path: the path of a module.
            default: what holds for modules that no pattern matches.

        Raises:
            AdapterError: a field that is no map of patterns, or a pattern that cannot be matched.
        """
        patterns = getattr(self._config, field) or {}
        if not isinstance(patterns, dict):
            raise AdapterError(f"{field}={patterns!r} is no map of patterns of names to numbers.")
        for pattern, value in patterns.items():
            if self._matches(field, rf"(.*\.)?({pattern})", path):
                return value
        return default

    def untargeted(self, paths: Iterable[str]) -> list[str]:
        """The paths that PEFT would not adapt, whatever factors the file holds for them.

        Without targets PEFT takes its defaults of the model's type, which is not known here. Then
        the defaults that leave out the fewest of these paths count.

        Raises:
            AdapterError: targets that PEFT cannot match.
        """
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        of_file = list(paths)
        targets = self._config.target_modules
        if targets is not None:
            return self._not_targeted(of_file, targets)
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.values()
        return min((self._not_targeted(of_file, default) for default in defaults), key=len)

    def _not_targeted(self, paths: list[str], targets: Any) -> list[str]:
        return [path for path in paths if not self._is_targeted(path, targets)]

    def _is_targeted(self, path: str, targets: Any) -> bool:
        """Whether PEFT adapts the module of this path.

        The config's regular expressions are matched here, where they can be stopped. PEFT is given
        this very path in place of an expression that matches it, and nothing in place of another.
        """
        from lens_lora.compat import peft_adapts  # imports torch, which this file does without

        plain = copy.copy(self._config)
        plain.target_modules = targets
        plain.modules_to_save = None
        if isinstance(targets, str):
            plain.target_modules = [path] if self._is_in_targets(path, targets) else []
        if isinstance(plain.exclude_modules, str):
            is_excluded = self._matches("exclude_modules", plain.exclude_modules, path)
            plain.exclude_modules = [path] if is_excluded else []
        self._require_names_of_layers(plain.layers_pattern)
        try:
            return peft_adapts(plain, path)
        except Exception as error:
            raise self._error("target_modules", f"cannot be matched by PEFT ({error})") from error

    def _is_in_targets(self, path: str, targets: str) -> bool:
        if targets.lower() == "all-linear":
            return not _OUTSIDE_ALL_LINEAR.fullmatch(path)
        return self._matches("target_modules", targets, path)

    def _require_names_of_layers(self, pattern: Any) -> None:
        names = [pattern] if isinstance(pattern, str) else pattern or []
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.]*", name) for name in names):
            raise self._error("layers_pattern", "is no list of module names")

    def _matches(self, field: str, pattern: str, path: str) -> bool:
        seconds_left = max(self._deadline - time.monotonic(), 1e-3)  # 0 would be no limit
        try:
            return _compiled(pattern).fullmatch(path, timeout=seconds_left) is not None
        except TimeoutError as error:
            problem = f"takes more than {_SECONDS:g} s to match with {path!r}"
            raise self._error(field, problem) from error
        except Exception as error:
            raise self._error(field, f"holds no patterns of module names ({error})") from error

    def _error(self, field: str, problem: str) -> AdapterError:
        value = getattr(self._config, field)
        return AdapterError(f"{field}={value!r} {problem}; write plain module names there.")


# An adapter may have a pattern for each of its modules, and each is matched with each module.
_compiled = functools.lru_cache(maxsize=8192)(regex.compile)
