"""`@analysis`: a function of g becomes a function of (lens, prompts, readout).

The decorator does what every public call does before its own work: it takes the model for itself,
tokenises the prompts, looks up the readout's tokens, checks that the model is as it was when the
lens was made, and hands out a function g that remembers its values and whole slopes at strengths
(`core/function/cache.py`). After the call, also after an error, the model has its own hooks again.

The docstring of such a function is that of the call: it documents lens, prompts, readout and
progress in place of g.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable

from lens_lora.core.function.cache import Evaluations
from lens_lora.core.function.function import Function
from lens_lora.core.model import LoraLens, alone, run_alone
from lens_lora.core.readout import PromptsLike, Readout
from lens_lora.errors import ArgumentError

_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)
_Call = TypeVar("_Call")


@runtime_checkable
class Analysis(Protocol[_P, _R]):
    """A function of g that `analysis` has made a call of (lens, prompts, readout, …)."""

    @overload
    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> _R:
        """The analysis of these prompts.

        Args:
            lens: the adapter over the model.
            prompts: strings, conversations, ids, or `Prompts`.
            readout: what is read of the logits.
            args, kwargs: the analysis' own arguments, and progress: whether long calls show a bar.
        """
        ...

    @overload
    def __call__(
        self,
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout,
        *args: Any,
        progress: bool,
        **kwargs: Any,
    ) -> _R: ...

    def of(self, g: Function, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """The analysis of a function g; analyses of the same g share what it has evaluated.

        Args:
            g: from `lens.function`, with a readout.
            args, kwargs: the analysis' own arguments.
        """
        ...


_FunctionOfG = Callable[Concatenate[Evaluations, _P], _R]


@overload
def analysis(function: _FunctionOfG[_P, _R]) -> Analysis[_P, _R]: ...
@overload
def analysis(
    *, takes_max_memory: bool = False, of_several: Callable[..., Any] | None = None
) -> Callable[[_FunctionOfG[_P, _R]], Analysis[_P, _R]]: ...
@overload
def analysis(
    *,
    takes_max_memory: bool = False,
    of_several: Callable[..., Any] | None = None,
    typed_as: type[_Call],
) -> Callable[[Callable[..., Any]], _Call]: ...
def analysis(
    function: Callable[..., Any] | None = None,
    *,
    takes_max_memory: bool = False,
    of_several: Callable[..., Any] | None = None,
    typed_as: type[Any] | None = None,
) -> Any:
    """Decorate a function of g, so that it takes a lens, prompts and a readout in place of g.

        @ll.analysis
        def half_way(g):
            return g(0.5) - g.shift / 2

        half_way(lens, prompts, readout)
        half_way.of(lens.function(prompts, readout))  # the same

    Args:
        function: its first parameter is g, a `Function` that remembers its values and the slopes of
            whole sites at strengths; all others follow the readout in the call.
        takes_max_memory: whether the call has a keyword `max_memory`, a bound in bytes that
            replaces that of the lens.
        of_several: what is called, with a list of functions in place of g, where the readout is a
            list of them; it is given all arguments of the function, also those that were left out.
            Without it, a list is refused.
        typed_as: a Protocol of the call, for type checkers, where what it returns depends on its
            arguments. It changes nothing at run time.

    Raises:
        ArgumentError: something that is no function of g.
    """
    del typed_as
    if function is None:
        return functools.partial(analysis, takes_max_memory=takes_max_memory, of_several=of_several)
    if not callable(function) or not inspect.signature(function).parameters:
        raise ArgumentError(
            f"{function!r} has no first parameter g",
            remedy="decorate a function of g: def f(g, …).",
        )

    @functools.wraps(function)
    def call(
        lens: LoraLens,
        prompts: PromptsLike,
        readout: Readout | Sequence[Readout],
        *args: Any,
        progress: bool = True,
        **kwargs: Any,
    ) -> Any:
        if takes_max_memory:
            max_memory = kwargs.pop("max_memory", None)
            if max_memory is not None:
                lens = lens.within(max_memory)
        f = lens.function(prompts, progress=progress)
        if of_several is None or isinstance(readout, Readout):
            g = Evaluations(f.about(Readout.required(readout)))
            return function(g, *args, **kwargs)
        questions = [Evaluations(f.about(each)) for each in Readout.listed(readout)]
        # Whatever the function would refuse for one readout is refused for several as well.
        bound = inspect.signature(function).bind(questions, *args, **kwargs)
        bound.apply_defaults()
        return of_several(*bound.args, **bound.kwargs)

    def of(g: Function, *args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            return function(Evaluations.of(g), *args, **kwargs)

        return run_alone(g.lens, work)

    vars(call)["__signature__"] = _signature(function, takes_max_memory)
    public = cast(Any, alone(call))
    public.of = of
    return public


def _signature(function: Callable[..., Any], takes_max_memory: bool) -> inspect.Signature:
    """The signature of the call, for help and editors.

    (lens, prompts, readout, …, max_memory=None, progress=True) in place of (g, …).
    """
    inner = inspect.signature(function)
    _, *parameters = inner.parameters.values()
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    keyword = inspect.Parameter.KEYWORD_ONLY
    first = [
        inspect.Parameter("lens", positional, annotation=LoraLens),
        inspect.Parameter("prompts", positional, annotation=PromptsLike),
        inspect.Parameter("readout", positional, annotation=Readout),
    ]
    added: list[inspect.Parameter] = []
    if takes_max_memory:
        bound = inspect.Parameter("max_memory", keyword, default=None, annotation=float | None)
        added.append(bound)
    added.append(inspect.Parameter("progress", keyword, default=True, annotation=bool))
    # Python wants `**options` behind everything else.
    is_last = inspect.Parameter.VAR_KEYWORD
    own = [parameter for parameter in parameters if parameter.kind is not is_last]
    last = [parameter for parameter in parameters if parameter.kind is is_last]
    return inner.replace(parameters=[*first, *own, *added, *last])
