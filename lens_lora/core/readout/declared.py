"""`@readout`: a function of the logits, declared once, becomes a class of readouts.

    @ll.readout(units="nats", label="H(next token)")
    def Entropy(logits):
        log_p = logits.log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    ll.first_order(lens, prompts, Entropy())

The declaration promises that the number of a row depends on that row alone. So prompts can be run
in groups and copied in a batch, which `Readout.of(fn)` cannot do, as it knows nothing of its
function. The promise is checked on a few random rows whenever the readout meets a model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.core.readout.readout import Before, LastToken
from lens_lora.errors import ArgumentError
from lens_lora.guesses import fitting, require_fitting

# A declaration is checked on so many rows of random logits.
_ROWS = 3


class DeclaredReadout(LastToken):
    """Base of the classes that `readout` makes. Two objects are equal if their arguments are.

    Attributes:
        arguments: the arguments of the function other than the logits, by name.
    """

    function: ClassVar[Callable[..., Tensor]]
    parameters: ClassVar[inspect.Signature]
    text: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_fitting(type(self).__name__, type(self).parameters, args, kwargs)
        given = type(self).parameters.bind(*args, **kwargs)
        given.apply_defaults()
        self.arguments: dict[str, Any] = dict(given.arguments)

    @property
    def label(self) -> str:
        """The declared label, with the arguments in their places."""
        return self.text.format(**self.arguments) if self.arguments else self.text

    def of_logits(self, model: Any, batch: int, before: Before = ()) -> OfEachRow:
        """The function of the logits, [row, vocab] → [row], once it has been checked.

        Raises:
            ArgumentError: the function does not give one number for each row; or the number
                depends on other rows, or has no derivative.
        """
        del batch, before
        read = OfEachRow(functools.partial(type(self).function, **self.arguments), self.label)
        read.require_as_declared(int(model.cfg.d_vocab_out))
        return read

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{type(self).__name__}({given})"


@dataclasses.dataclass(frozen=True)
class OfEachRow:
    """A reading in which the number of a row depends on that row alone.

    Attributes:
        fn: [row, vocab] → [row].
        name: the name of the readout, for messages.
    """

    fn: Callable[[Tensor], Tensor]
    name: str

    def __call__(self, logits: Float[Tensor, "row vocab"]) -> Float[Tensor, " row"]:
        """Compute g of each row."""
        values = self.fn(logits)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ArgumentError(
                f"the readout {self.name!r} gave {shape} for logits {list(logits.shape)}; expected "
                "one number a row, [row], of logits [row, vocab]."
            )
        return values

    def repeat(self, times: int) -> OfEachRow:
        """The same function of rows that are each repeated."""
        del times
        return self

    def of_rows(self, rows: Int[Tensor, " some"]) -> OfEachRow:
        """The same function of some rows."""
        del rows
        return self

    def require_as_declared(self, vocab: int) -> None:
        """Check on random logits that each row is read by itself, and has a derivative."""
        generator = torch.Generator(device="cpu").manual_seed(0)
        logits = torch.randn(_ROWS, vocab, generator=generator, dtype=torch.float64)
        with torch.enable_grad():
            values = self(logits.requires_grad_())
        alone = torch.cat([self(row) for row in logits.detach().split(1)])
        if not torch.allclose(values.detach(), alone, equal_nan=True):
            raise ArgumentError(
                f"the readout {self.name!r} gives a row another number beside other rows than "
                "alone, and a declared readout reads each row by itself",
                remedy="reduce over the last axis alone, dim=-1; a function of all rows together "
                "goes in ll.Readout.of(fn).",
            )
        if not values.requires_grad:
            raise ArgumentError(
                f"the readout {self.name!r} cuts its derivative (detach, item, numpy, argmax …)",
                remedy="compute it with differentiable torch operations of the logits.",
            )


def _own_parameters(function: Callable[..., Tensor]) -> inspect.Signature:
    """The parameters of a function of the logits, other than the logits."""
    if not callable(function) or not inspect.signature(function).parameters:
        raise ArgumentError(f"{function!r} is no function of the logits.")
    signature = inspect.signature(function)
    _, *own = signature.parameters.values()
    return signature.replace(parameters=own)


def _require_parameters_in_braces(label: str, names: list[str]) -> None:
    """Check that a label names only these parameters in braces."""
    try:
        label.format(**dict.fromkeys(names, ""))
    except (KeyError, IndexError, ValueError) as error:
        raise ArgumentError(
            f"label={label!r} names {error}, and the function has {names} beside the logits.",
            remedy="name only those in braces.",
        ) from error


@fitting
def readout(*, units: str, label: str) -> Callable[[Callable[..., Tensor]], type[DeclaredReadout]]:
    """Decorate a function of the logits, which becomes a class of readouts like `Logit`.

        >>> @readout(units="nats", label="log Z")
        ... def LogNormaliser(logits):
        ...     return logits.logsumexp(-1)
        >>> LogNormaliser().label
        'log Z'

    The function maps the logits at each prompt's last token, [row, vocab], to one number for each
    row, which depends on that row alone. Its further parameters become parameters of the class:

        >>> @readout(units="logits", label="the {k} largest logits")
        ... def Largest(logits, k=10):
        ...     return logits.topk(k).values.sum(-1)
        >>> Largest(k=3).label
        'the 3 largest logits'

    Args:
        units: the units of its numbers, for tables and figures.
        label: its name there, in which '{parameter}' is replaced by the value of the parameter.

    Raises:
        CallError: units or a label that are missing, as where the decorator stands without them.
        ArgumentError: units or a label that are not strings; a label that names something other
            than a parameter; or something that is not a function of the logits.
    """
    for name, text in (("units", units), ("label", label)):
        if not isinstance(text, str):
            raise ArgumentError(f"{name}={text!r}: expected a string.")

    def declare(function: Callable[..., Tensor]) -> type[DeclaredReadout]:
        own = _own_parameters(function)
        if own.parameters:
            _require_parameters_in_braces(label, list(own.parameters))
        members = {
            "__doc__": function.__doc__,
            "__module__": function.__module__,
            "__qualname__": function.__qualname__,
            "__signature__": own,
            "function": staticmethod(function),
            "parameters": own,
            "units": units,
            "text": label,
        }
        return type(function.__name__, (DeclaredReadout,), members)

    return declare


# The core already has a package `readout`, so the decorator has this name at the core's door.
declared_readout = readout
