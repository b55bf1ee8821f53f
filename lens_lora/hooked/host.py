"""What the rest of the package needs to know of a hooked model, whatever its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lens_lora.errors import ModelStateError
from lens_lora.families import FAMILIES, Family
from lens_lora.hooked.sites import Heads

__all__ = [
    "HookedView",
    "Ports",
    "find_family",
    "is_capped",
    "refuse_dropout",
    "refuse_unusable",
    "view_of",
]


def _as_read(tensor: Tensor) -> Tensor:
    return tensor


class Ports:
    """A site's hook points, and which of a read point's firings in one block is the site's.

    `read` is None for what is added without being read: a constant. `through` makes z of what was
    read, where no hook point shows z itself; it is called while the block runs.
    """

    __slots__ = ("firing", "firings", "read", "through", "write")

    def __init__(
        self,
        read: str | None,
        write: str,
        firing: int = 0,
        firings: int = 1,
        through: Callable[[Tensor], Tensor] = _as_read,
    ) -> None:
        self.read: str | None = read
        self.write: str = write
        self.firing: int = firing
        self.firings: int = firings
        self.through: Callable[[Tensor], Tensor] = through


@runtime_checkable
class HookedView(Protocol):
    """A hooked model, as this package sees it.

    `heads` are those of the weights; `kv_copies` how often a flag of the model repeats each head of
    k and v before its hook point. `grows`: whether the batch of a single prompt may grow at a
    block's input, all that the model passes beside the residual stream being the same for each row.
    `keeps_rows`: whether a batch stays in its order throughout, no expert taking tokens out of it.
    """

    model: Any
    family: Family
    heads: Heads
    kv_copies: int
    n_layers: int
    class_name: str
    grows: bool
    keeps_rows: bool

    def ports(self, layer: int, kind: str) -> Ports:
        """Where z is read and δ is added."""
        ...

    def block_input(self, layer: int) -> str:
        """The first hook point of a block, or of what comes after the last."""
        ...

    def embedding_output(self) -> str:
        """The hook point, or module, of the token embedding's output."""
        ...

    def embedding_scale(self, kind: str) -> float:
        """κ: what the model's own embedding holds more than Hugging Face's (1 elsewhere)."""
        ...

    def weight(self, layer: int, kind: str) -> Tensor:
        """The model's own weight of this kind, [out, in], heads flattened."""
        ...

    def bias(self, layer: int, kind: str) -> Tensor | None:
        """The model's own bias, flat; a HookedTransformer's of 'v' and 'o' only."""
        ...

    def unembedding(self) -> tuple[Tensor, Tensor | None] | None:
        """(W_U as [vocab, d_model], bias), or None where logits are more than these make."""
        ...

    def own_affine(self, layer: int, kind: str) -> tuple[Tensor, Tensor | None] | None:
        """(γ, β) between the recorded z and the linear, where the model still holds it."""
        ...

    def is_folded(self, layer: int, kind: str) -> bool:
        """Whether the affine of the norm that this kind reads was folded into the weights."""
        ...

    def state(self) -> tuple[tuple[str, Any], ...]:
        """What must not change after the lens is made: (name, value) pairs."""
        ...

    def needs_base(self) -> bool:
        """Whether the weights were processed, so that the base model must supply what is gone."""
        ...


def view_of(model: Any) -> HookedView:
    """The view that fits the model's class.

    Raises:
        ModelStateError: neither a HookedTransformer nor a TransformerBridge, or one in a state
            in which an adapter cannot be applied exactly.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    if "HookedTransformer" in names:
        from lens_lora.hooked.host_hooked_transformer import HookedTransformerView

        refuse_unusable(model)
        return HookedTransformerView(model)
    if "TransformerBridge" in names:
        from lens_lora.hooked.host_bridge import BridgeView

        refuse_unusable(model)
        return BridgeView(model)
    raise ModelStateError(
        f"{type(model).__name__} has no hook points; pass a HookedTransformer or a "
        "TransformerBridge."
    )


def refuse_unusable(model: nn.Module) -> None:
    """Refuse injected adapters, active dropout, and weights that are not floating point."""
    refuse_dropout(model)
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft."):
            raise ModelStateError(
                f"{name} already carries a PEFT adapter, which would be applied twice; build the "
                "hooked model from the bare base (peft_model.unload())."
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelStateError(
                f"{name} is {parameter.dtype}: quantised weights have no exact ΔW; load the model "
                "in a floating-point dtype."
            )


def refuse_dropout(model: nn.Module) -> None:
    """Refuse active dropout: modules, and what a Hugging Face config turns on in train mode."""
    if not model.training:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ModelStateError(
                f"{name}: dropout {module.p} is active, so no two runs agree; call model.eval()."
            )
    config = getattr(getattr(model, "original_model", None), "config", None)
    for name, value in (config.to_dict() if config is not None else {}).items():
        if ("drop" in name) and isinstance(value, float) and value > 0:
            raise ModelStateError(
                f"{name}={value} is active in train mode, so no two runs agree; call model.eval()."
            )


def find_family(architecture: str | None) -> Family:
    """The family of a Hugging Face architecture name.

    Raises:
        ModelStateError: it is not supported.
    """
    for family in FAMILIES:
        if architecture in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ModelStateError(
        f"the model's architecture is {architecture!r}; adapters are exact on {known}."
    )


def is_capped(model: Any) -> bool:
    """Whether logits pass a soft cap after the unembedding."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return cap is not None and cap > 0


def model_dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
