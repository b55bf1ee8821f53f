"""Whether a hooked model runs, and computes what its Hugging Face base does.

The host libraries build some families wrongly, without a warning, so logits of eight tokens are
compared (`base_logits`, then `require_same_logits`). The base is run first, because a
TransformerBridge wraps and changes it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import home_of
from lens_lora.core.model import extensions
from lens_lora.core.model.hooks import attached
from lens_lora.errors import (
    LensLoraError,
    ModelStateError,
    is_of_the_system,
)
from lens_lora.spans import Temporary

# The tokens on which logits are compared.
TOKENS = torch.arange(1, 9)[None]
# The largest difference that counts as equal, as a share of the logits' range. Rounding takes 1e-5
# in float32, and 1e-7 in float64, as weights are folded in float32.
AGREEMENT = 1e-4
# How many roundings two logits may be apart, where a device rounds products more coarsely.
_ROUNDINGS = 16
OF_A_GIVEN_BASE = (
    "Either hf_model is not its base, or transformer-lens builds this family wrongly (2.18 ignores "
    "Llama's rope_theta, and misfolds Mixtral); try another version, or its TransformerBridge."
)
_Logits = Float[Tensor, "batch pos d_vocab"]
_R = TypeVar("_R")


def base_logits(hf_model: nn.Module, dtype: torch.dtype) -> _Logits | None:
    """Logits of the base on eight tokens, its adapters off. One forward pass.

    None in half precision, where rounding moves logits by as much as the errors that the
    comparison should find.
    """
    base_dtype = next(p.dtype for p in hf_model.parameters() if p.is_floating_point())
    if min(torch.finfo(base_dtype).bits, torch.finfo(dtype).bits) < 32:
        return None
    return plain_logits(hf_model)


# Models that have run, and what they were then. A model is not kept alive by it.
_HAVE_RUN: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


def run_once(model: Any) -> None:
    """Run the model on eight tokens, or on as many as the context holds."""
    tokens = TOKENS[:, : model.cfg.n_ctx] % model.cfg.d_vocab
    with torch.no_grad():
        model(tokens.to(home_of(model)), return_type="logits")


def note_that_it_ran(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Remember that the model, as it is now, can run.

    Args:
        model: the hooked model.
        modules: its `modules_of`.
    """
    _HAVE_RUN[model] = _makeup(model, modules)


def has_run(model: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """Whether the model was seen to run as it is now: with these flags, weights and modules.

    Args:
        model: the hooked model.
        modules: its `modules_of`.
    """
    return model in _HAVE_RUN and _HAVE_RUN[model] == _makeup(model, modules)


def _makeup(model: Any, modules: Iterable[nn.Module]) -> object:
    """All that decides whether a model runs, apart from the numbers in its weights."""
    flags = {name: str(value) for name, value in vars(model.cfg).items()}
    types: list[tuple[int, type[nn.Module]]] = []
    weights: list[tuple[object, ...]] = []
    for module in modules:
        types.append((id(module), type(module)))
        for p in compat.own_parameters(module).values():
            weights.append((id(p), p.shape, p.dtype, p.device))
    return flags, types, weights


def kind_of(model: Any) -> str:
    """The class of the Hugging Face model within a bridge, or the name of what a model copies."""
    if hasattr(model, "original_model"):
        return type(model.original_model).__name__
    return str(getattr(model.cfg, "original_architecture", None) or "a model of its own")


def require_running(run: Callable[[], _R], which: str, remedy: str) -> _R:
    """Return what a short pass of a hooked model returns.

    Args:
        run: the pass.
        which: the model, for the error.
        remedy: what to do where it cannot run.

    Raises:
        ModelStateError: TransformerLens has made a model that cannot run.
    """
    try:
        return run()
    except LensLoraError:
        raise
    except Exception as error:
        if is_of_the_system(error) or compat.is_memory_short(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        raise ModelStateError(
            f"{which} cannot run on eight tokens: {type(error).__name__}: {first_line[:200]}",
            remedy=remedy,
        ) from error


def plain_logits(hf_model: nn.Module) -> _Logits:
    """Logits of the base on eight tokens, its adapters off, in any dtype. One forward pass."""
    extensions.refuse_without_float64(hf_model.modules())
    with torch.no_grad(), Temporary(functools.partial(_switch_adapters_off, hf_model)):
        return hf_model(TOKENS.to(home_of(hf_model))).logits


def _switch_adapters_off(hf_model: nn.Module, span: Temporary) -> None:
    """Switch off PEFT's layers inside the model until the span ends."""
    layer: Any
    for layer in hf_model.modules():
        if hasattr(layer, "enable_adapters") and not layer.disable_adapters:
            span.way_back(functools.partial(layer.enable_adapters, True))
            layer.enable_adapters(False)


def require_same_logits(
    expected: _Logits | None,
    logits_of: Callable[[Int[Tensor, "batch pos"]], _Logits],
    claim: str,
    remedy: str,
    eps: Callable[[], float],
) -> None:
    """Check that a hooked model's logits equal its base's. One forward pass.

    A constant at each position does not count, as a centred unembedding removes it.

    Args:
        expected: the base's logits; None where they are not compared.
        logits_of: runs the hooked model.
        claim: what is wrong if they differ.
        remedy: what to do then.
        eps: returns the precision in which the hooked model computes; called where they differ.

    Raises:
        ModelStateError: they differ by more than a ten-thousandth of their range, and by more than
            rounding can do.
    """
    if expected is None:
        return
    with torch.no_grad():
        logits = logits_of(TOKENS.to(expected.device)).to(expected)
    logits = logits - logits.mean(-1, keepdim=True)
    expected = expected - expected.mean(-1, keepdim=True)
    difference = float((logits - expected).abs().max())
    extent = float(expected.max() - expected.min())
    # Written so that NaN agrees with nothing.
    is_close = difference <= AGREEMENT * extent
    agrees = is_close or difference <= _ROUNDINGS * eps() * extent
    if not agrees:
        raise ModelStateError(
            f"{claim}: {difference:.2g} off, of a range of {extent:.2g}. {remedy}"
        )


def first_non_finite(model: Any, run: Callable[[], object]) -> str:
    """A sentence that names the first hook point with a NaN or an infinity. One forward pass."""
    non_finite: list[str] = []

    def check(name: str, tensor: Any, hook: Any) -> None:
        del hook
        is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not non_finite and is_float and not torch.isfinite(tensor).all():
            non_finite.append(name)

    # Masked attention scores are −∞.
    names = [name for name in model.hook_dict if "attn_scores" not in name]
    with attached(model, [(name, functools.partial(check, name)) for name in names]):
        run()
    where = non_finite[0] if non_finite else "the unembedding"
    return f"non-finite activations first appear at {where}; check the model's dtype and weights."
