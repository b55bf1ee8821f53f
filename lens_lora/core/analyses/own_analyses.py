"""`@analysis`: a function of g becomes a function of (lens, prompts, readout).

The decorator does what every public call does before its own work: it takes the model for itself,
tokenises the prompts, looks up the readout's tokens, checks that the model is as it was when the
lens was made, and hands out a function g that remembers what it has evaluated. After the call, also
after an error, the model has its own hooks again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from lens_lora.core.function.cache import Evaluations, evaluations
from lens_lora.core.function.function import Function
from lens_lora.core.model import LoraLens, alone
from lens_lora.core.readout import PromptsLike, Readout
from lens_lora.errors import ArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Analysis(Generic[_P, _R]):
    """What `analysis` makes of a function of g: a call of (lens, prompts, readout, …).

    Attributes:
        of: the function itself, of a g at hand: analyses that are given the same one share what it
            has evaluated.
    """

    def __init__(self, verb: Callable[Concatenate[Function, _P], _R]) -> None:
        functools.update_wrapper(self, verb)
        self._verb = verb
        self.__signature__: inspect.Signature = _signature(verb)

    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout,
        *args: Any,
        progress: bool = True,
        **kwargs: Any,
    ) -> _R:
        """The analysis of these prompts.

        Args:
            lens: the adapter over the model.
            prompts: strings, conversations, ids, or `Prompts`.
            readout: what is read of the logits.
            args, kwargs: the analysis' own arguments.
            progress: whether long calls show a bar.
        """

        @alone
        def once(lens: LoraLens) -> _R:
            g = evaluations(lens, prompts, readout, progress=progress)
            return self._verb(g, *args, **kwargs)  # pyright: ignore[reportCallIssue]

        return once(lens)

    def of(self, g: Function, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """The analysis of a function at hand.

        Args:
            g: from `lens.function`, with a readout.
            args, kwargs: the analysis' own arguments.
        """

        @alone
        def once(lens: LoraLens) -> _R:
            del lens
            return self._verb(Evaluations.of(g), *args, **kwargs)

        return once(g.lens)


def analysis(verb: Callable[Concatenate[Function, _P], _R]) -> Analysis[_P, _R]:
    """Decorate a function of g, so that it takes a lens, prompts and a readout in place of g.

        @ll.analysis
        def half_way(g):
            return g(0.5) - g.shift / 2

        half_way(lens, prompts, readout)

    Args:
        verb: its first parameter is g, a `Function` that remembers what it has evaluated; all
            others follow the readout in the call.

    Raises:
        ArgumentError: something that is no function of g.
    """
    if not callable(verb) or not inspect.signature(verb).parameters:
        raise ArgumentError(
            f"{verb!r} has no first parameter g", remedy="decorate a function of g: def f(g, …)."
        )
    return Analysis(verb)


def _signature(verb: Callable[..., Any]) -> inspect.Signature:
    """(lens, prompts, readout, …, progress=True), for help and editors."""
    inner = inspect.signature(verb)
    _, *own = inner.parameters.values()
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    common = [inspect.Parameter(name, positional) for name in ("lens", "prompts", "readout")]
    last: list[inspect.Parameter] = []
    while own and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last.append(own.pop())
    shows = inspect.Parameter("progress", inspect.Parameter.KEYWORD_ONLY, default=True)
    return inner.replace(parameters=[*common, *own, shows, *last])
