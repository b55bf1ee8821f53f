"""Annotations of the package, shapes included, checked at run time in every call.

jaxtyping's import hook puts a check before every function of `lens_lora`. It is on where the
variable LENS_LORA_SHAPES is "checked", in this process and not in those that a test starts. A test
of bad input is marked `bad_input` and runs without it, so as to meet the package's own errors.

jaxtyping's own check sees the arguments twice, binds them to the signature in every call, and is
made anew wherever an inner function is defined: that was half of the run. `_Check` is made once for
a piece of code: beartype sees the arguments, then what is returned, both with the same axes.

An annotation that cannot be resolved where it stands is taken for Any: a class's own name inside
it, and what a file imports for type checkers alone, other packages' classes that are slow to import
(plotly's Figure, PEFT's configurations, transformers' models). No shape is among them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jaxtyping

# An int passes for a float, as PEP 484 says.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CHECKED = os.environ.get("LENS_LORA_SHAPES") == "checked"
_jaxtyped = jaxtyping.jaxtyped


def check() -> None:
    """Install the hook; to be called before `lens_lora` is first imported.

    Torch calls `OneProduct` for every operation, those of a check of arguments among them: it is
    left unchecked, and its rules are checked.
    """
    if CHECKED:
        jaxtyping.jaxtyped = _decorator  # by this name the hook's decorators look it up
        jaxtyping.install_import_hook("lens_lora", CHECKER)
        from lens_lora.core.function.duals import OneProduct

        OneProduct.__torch_function__ = inspect.unwrap(OneProduct.__torch_function__)


class _Check(NamedTuple):
    """Two checked functions that do nothing.

    Attributes:
        arguments: takes a function's arguments.
        value: returns its value.
    """

    arguments: Callable
    value: Callable

    @classmethod
    def of(cls, function: types.FunctionType, typechecker: Callable) -> _Check:
        hints: dict[str, Any] = {}
        for name, annotation in function.__annotations__.items():
            hints[name] = _resolved(annotation, function.__globals__)
        returned = hints.pop("return", Any)

        arguments = _taking_the_same(function)
        arguments.__annotations__ = hints
        value = types.FunctionType(_same.__code__, {})
        value.__annotations__ = {"return": returned}
        # An error names the function itself.
        for stub in (arguments, value):
            stub.__module__ = function.__module__
            stub.__name__ = function.__name__
            stub.__qualname__ = function.__qualname__
        return cls(typechecker(arguments), typechecker(value))


_CHECKS: dict[types.CodeType, _Check] = {}


def _taking_the_same(function: types.FunctionType) -> types.FunctionType:
    """A function of the same parameters, with the same defaults, that does nothing."""
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        # In the text of a signature a default is None; the values are set below.
        default = parameter.empty if parameter.default is parameter.empty else None
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    names: dict[str, Any] = {}
    exec(f"def arguments{inspect.Signature(parameters)}: ...", names)
    arguments = names["arguments"]
    arguments.__defaults__ = function.__defaults__
    arguments.__kwdefaults__ = function.__kwdefaults__
    return arguments


def _same(value: Any) -> Any:
    return value


def _resolved(annotation: Any, names: dict[str, Any]) -> Any:
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:  # whatever evaluating it raises
        return Any


def _decorator(subject: Any = None, *, typechecker: Callable | None = None) -> Any:
    """Take the place of `jaxtyping.jaxtyped`, which still sees the fields of dataclasses."""
    if subject is None:
        return functools.partial(_decorator, typechecker=typechecker)
    if typechecker is None or not isinstance(subject, types.FunctionType):
        return _jaxtyped(subject, typechecker=typechecker)
    if subject.__code__ not in _CHECKS:
        _CHECKS[subject.__code__] = _Check.of(subject, typechecker)
    return _checked(subject, _CHECKS[subject.__code__])


def _checked(function: Callable, check: _Check) -> Callable:
    from beartype.roar import BeartypeCallHintViolation

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        with _jaxtyped("context"):  # in which an axis has one size
            try:
                check.arguments(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise jaxtyping.TypeCheckError(str(error)) from None
            value = function(*args, **kwargs)
            try:
                return check.value(value)
            except BeartypeCallHintViolation as error:
                raise jaxtyping.TypeCheckError(str(error)) from None

    return checked


# How many times as many random cases are run. At 1 they are the same in every run, else others.
MORE_CASES = int(os.environ.get("LENS_LORA_CASES", "1"))


def share(cases: int) -> int:
    """How many of so many random cases are run: all, or a fifth under the check of shapes.

    A call then takes longer, and the plain run has had all of them. A nightly run has more.
    """
    return max(2, cases // 5) if CHECKED else cases * MORE_CASES


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the check inside, for bad input."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
