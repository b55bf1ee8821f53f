"""Check that a module computes what its parameters say, so that ΔW z is what its training added.

Training adds (W' − W) z + b' − b to the output of a linear module only if the module computes
W z + b. It adds (γ' − γ) ⊙ n to that of a norm only if n is the normalised input. If a module has a
forward of its own (0.5 W z, a clipped output) or a hook, training adds something else. Shapes do
not show this, and if base and tuned model share the code, their logits agree as well. So the module
is run, and its output is compared with what its parameters say:

    linear module, embedding    output = W z + b
    norm                        output(γ = 1) − output(γ = 0) = n,  whose root mean square is 1

Cost, on eight tokens: one call of a linear module or of an embedding (none if its call is given),
and two of a norm.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from lens_lora.errors import AdapterError

TOKENS = 8
# Two runs of one function agree to 1e-4 of the output's range, or to 8 machine precisions of a
# coarse dtype.
_AGREEMENT = 1e-4
_ROUNDINGS = 8
# The ε in a norm's root takes the root mean square of n below 1 by less than this.
_NORM_TOLERANCE = 1e-3
# Large beside the ε in a norm's root, so that n has a root mean square of 1; its square is finite
# in float16.
_SIZE_OF_INPUT = 10.0


# --- Calls


class Call(NamedTuple):
    """The input and the output of a module in one call, on the CPU."""

    inputs: Any
    output: Any


@contextlib.contextmanager
def calls_of(model: nn.Module, paths: Iterable[str]) -> Generator[dict[str, Call]]:
    """Within the block, the last call of each of these modules is kept, by path."""
    calls: dict[str, Call] = {}
    handles: list[Any] = []

    def keep(
        path: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        del module
        inputs = next(iter((*args, *named.values())), None)
        calls[path] = Call(_on_the_cpu(inputs), _on_the_cpu(output))

    try:
        for path in paths:
            hook = functools.partial(keep, path)
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _on_the_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _call_on_random_input(module: nn.Module) -> Call:
    """Call a module by itself, outside its model."""
    inputs = _random_input(module)
    device = module.get_parameter("weight").device
    with torch.no_grad():
        output = module(inputs.to(device))
    return Call(inputs, _on_the_cpu(output))


def _random_input(module: nn.Module) -> Tensor:
    """Random token ids for an embedding, else random activations in the module's dtype."""
    weight = module.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.randint(len(weight), (1, TOKENS), generator=generator)
    width = weight_of(module).shape[-1]
    return torch.randn(1, TOKENS, width, generator=generator).to(weight.dtype)


def logits_of(model: Any, parameters: Mapping[str, Tensor]) -> Tensor:
    """A model's logits on a few tokens, in float64 on the CPU.

    Args:
        model: a Hugging Face model. It is run without dropout, and is then in its former mode.
        parameters: parameters in place of its own, by name.
    """
    vocabulary = getattr(model.config, "vocab_size", None) or 1 + TOKENS
    device = next(model.parameters()).device
    tokens = torch.arange(1, 1 + TOKENS, device=device)[None] % vocabulary
    with torch.no_grad(), _in_eval(model):
        out = functional_call(model, dict(parameters), (tokens,))
    logits = out.logits if hasattr(out, "logits") else out[0]
    return logits.cpu().double()


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Generator[None]:
    """Within the block, no dropout; afterwards every module is in its former mode."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


# --- The comparison


class Difference(NamedTuple):
    """How far two outputs are apart.

    Attributes:
        largest: the largest difference of two of their entries.
        span: the range of the entries.
        is_rounding: whether rounding explains the difference.
    """

    largest: float
    span: float
    is_rounding: bool


def difference_of(a: Tensor, b: Tensor, weights: Iterable[Tensor]) -> Difference:
    """Compare the outputs of two functions on one input.

    Args:
        a: the output of one function.
        b: the output of the other.
        weights: the weights of both, whose dtypes say how large a rounding is.
    """
    largest = float((a - b).abs().max())
    span = float(b.max() - b.min())
    eps = max(torch.finfo(weight.dtype).eps for weight in weights)
    is_rounding = largest <= max(_AGREEMENT, _ROUNDINGS * eps) * span
    return Difference(largest, span, is_rounding)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as [in, out]: GPT-2's Conv1D, an embedding."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def weight_of(module: nn.Module) -> Tensor:
    """A linear module's or an embedding's weight as [out, in], or a norm's γ; on the CPU."""
    weight = module.get_parameter("weight").detach().cpu()
    return weight.T if is_transposed(module) else weight


def require_own_parameters(
    path: str,
    module: nn.Module,
    remedy: str,
    *,
    parameters_of: nn.Module | None = None,
    call: Call | None = None,
) -> None:
    """Refuse a linear module, embedding or norm that does not compute what its parameters say.

    A module whose output is no tensor, such as a router that returns a choice, is not compared.

    Args:
        path: the module's path.
        module: the module.
        remedy: what to do about it.
        parameters_of: the module whose parameters it had in the call, cast to its own dtype; None
            if the parameters were its own.
        call: a call of the module; None to call it on random input.

    Raises:
        AdapterError: it computes something else than W z + b, or γ ⊙ n + β.
    """
    weight = module.get_parameter("weight")
    if weight.ndim == 1:
        _require_norm(path, module, remedy)
    elif weight.ndim == 2:
        parameters_of = parameters_of or module
        call = call or _call_on_random_input(module)
        _require_affine(path, module, parameters_of, call, remedy)


def _require_affine(
    path: str, module: nn.Module, parameters_of: nn.Module, call: Call, remedy: str
) -> None:
    if not isinstance(call.output, Tensor) or not isinstance(call.inputs, Tensor):
        return
    expected = _affine(module, parameters_of, call.inputs)
    weight = module.get_parameter("weight")
    difference = difference_of(call.output.to(expected), expected, (weight,))
    if not difference.is_rounding:
        raise AdapterError(
            f"{path}: this {type(module).__name__} does not compute W z + b: its output differs "
            f"by {difference.largest:.2g}, and W z + b spans {difference.span:.2g}. So (W' − W) z "
            "is not what its training adds to its output.",
            remedy=remedy,
        )


def _affine(module: nn.Module, parameters_of: nn.Module, inputs: Tensor) -> Tensor:
    """W z + b in float32 or wider; for an embedding its rows times its own `embed_scale`."""
    dtype = module.get_parameter("weight").dtype
    wide = torch.promote_types(dtype, torch.float32)
    W: Float[Tensor, "out in"] = weight_of(parameters_of)
    if isinstance(module, nn.Embedding):
        scale = float(getattr(module, "embed_scale", 1.0))
        output = W.T[inputs].to(dtype).to(wide) * scale
    else:
        output = inputs.to(wide) @ W.to(dtype).to(wide).T
    bias = getattr(parameters_of, "bias", None)
    if bias is None:
        return output
    return output + bias.detach().cpu().to(dtype).to(wide)


def _require_norm(path: str, norm: nn.Module, remedy: str) -> None:
    gamma = norm.get_parameter("weight").detach()
    inputs = _SIZE_OF_INPUT * _random_input(norm).to(gamma.device)
    with torch.no_grad():
        # From γ = 0 to 1 the output changes as much as from γ to γ + 1, with less rounding.
        at_one = functional_call(norm, {"weight": torch.ones_like(gamma)}, (inputs,))
        at_zero = functional_call(norm, {"weight": torch.zeros_like(gamma)}, (inputs,))
    if not isinstance(at_one, Tensor):
        return
    added = (at_one - at_zero).float()
    size = float(added.square().mean().sqrt())
    tolerance = max(_NORM_TOLERANCE, _ROUNDINGS * torch.finfo(gamma.dtype).eps)
    # NaN is refused, too, as it is not at most anything.
    if not abs(size - 1) <= tolerance:
        raise AdapterError(
            f"{path}: this {type(norm).__name__} does not compute γ ⊙ n + β of a normalised input "
            f"n, whose root mean square is 1: from γ = 0 to 1 its output changes by {size:.3g}. "
            "So (γ' − γ) ⊙ n is not what its training adds to its output.",
            remedy=remedy,
        )
