"""Functions that the core calls, and that a folder above the core provides.

The core is g(ε). It reads plain LoRA and runs a hooked model, and it does not know how text is
generated, or how the adapter of a live PeftModel is read. Some of its public methods do these
things all the same (`LoraLens.generate`, `Adapter.from_peft`), and imports point downward only. So

1. the core declares the function, with its signature and what it does:

       @declared
       def save_adapter(modules: Updates, name: str, base_model: str | None, path: Path) -> Path:
           raise NotImplementedError

2. a folder above the core provides it. Pyright checks that the signature is the declared one:

       @extensions.save_adapter.provide
       def save_adapter(modules, name, base_model, path): …

3. `lens_lora/registered.py` lists which module provides which function. The module is imported when
   its function is first called, so that nothing is imported before it is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

from lens_lora.core import registry

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Declared(Generic[_P, _R]):
    """A function whose body stands in another folder: see above."""

    def __init__(self, signature: Callable[_P, _R]) -> None:
        functools.update_wrapper(self, signature)
        self.name: str = f"{signature.__module__}.{signature.__name__}"
        self._function: Callable[_P, _R] | None = None

    def provide(self, function: Callable[_P, _R]) -> Callable[_P, _R]:
        """Decorate the function that is called from now on; the last one that is given counts.

        Args:
            function: it takes and returns what is declared.
        """
        self._function = function
        return function

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call the provided function."""
        if self._function is None:
            registry.import_each([registry.PROVIDERS[self.name]])
        if self._function is None:
            raise RuntimeError(f"{registry.PROVIDERS[self.name]} does not provide {self.name}.")
        return self._function(*args, **kwargs)


def declared(signature: Callable[_P, _R]) -> Declared[_P, _R]:
    """Decorate a function of the core that a folder above it provides.

    Args:
        signature: the declared function, whose body is never run.
    """
    return Declared(signature)
