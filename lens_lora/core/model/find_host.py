"""The host that fits a hooked model is found by the name of the model's class.

    @register_host("MyHookedModel")
    class MyHost(HookedHost): ...

TransformerLens's two classes have theirs. Another class of hooked models is registered under its
name, with what makes a host of a model and its unprocessed Hugging Face base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from lens_lora.core.model import extensions
from lens_lora.core.model.bridge import BridgeHost
from lens_lora.core.model.check import refuse_unusable
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.hooked_transformer import HookedTransformerHost
from lens_lora.core.model.modules import modules_of
from lens_lora.core.model.own_parameters import Fact
from lens_lora.errors import ModelStateError

# What makes a host of a hooked model and its base, by the name of the hooked model's class.
MakesHost = Callable[[Any, nn.Module | None], HookedHost]
_HOSTS: dict[str, MakesHost] = {
    HookedTransformerHost.class_name: HookedTransformerHost,
    BridgeHost.class_name: BridgeHost,
}
_Makes = TypeVar("_Makes", bound=MakesHost)


def register_host(class_name: str) -> Callable[[_Makes], _Makes]:
    """Decorate what makes the hosts of a class of hooked models: a class of hosts, or a function.

    Args:
        class_name: the name of the class of hooked models, or of a base class of it.
    """

    def register(make: _Makes) -> _Makes:
        _HOSTS[class_name] = make
        return make

    return register


def host_of(model: Any, hf_model: nn.Module | None = None) -> HookedHost:
    """The host that fits the model's class, with the base if it is given. No forward pass.

    Raises:
        ModelStateError: another class, or a state in which an adapter cannot be applied exactly.
    """
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _HOSTS), None)
    if name is None:
        raise ModelStateError(
            f"{type(model).__name__} has no hook points; pass a HookedTransformer or a "
            "TransformerBridge."
        )
    modules = modules_of(model)
    refuse_unusable(model, modules)
    host = _HOSTS[name](model, hf_model)
    host.known(Fact.MODULES, make=lambda: modules)
    if host.needs_base() and extensions.quantised_linears(modules):
        raise ModelStateError(
            f"this {name} is quantised and processed: folding needs the weights themselves. Use it "
            "before enable_compatibility_mode(), or load the base in bfloat16 or float32."
        )
    return host
