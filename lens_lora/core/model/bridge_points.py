"""Where do the maps and norms of a TransformerBridge read and write? `BridgePoints`

Each component has its own `hook_in` and `hook_out`. Unprocessed, `hook_in` shows the Hugging Face
linear's input x; once the norm is folded, it shows n. Other points take their place

1. under use_split_qkv_input or use_attn_in. The heads of q, k and v then get copies of the residual
   stream, [batch, pos, head, d_model]. The bridge normalises them after their last hook point, and
   multiplies each by its head's weight. So they are read there, and normalised in the same way;
2. under use_attn_result: o writes after the sum over its heads;
3. in a gated MLP that the bridge computes by itself (`bridge_gated_mlp.py`);
4. for modules whose place was read from the model, and which may have no hook points or other axes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lens_lora import compat
from lens_lora.core.model.bridge_components import Components, attentions
from lens_lora.core.model.bridge_gated_mlp import reads_at_mlp
from lens_lora.core.model.hooked_host import COPIED_INPUTS
from lens_lora.core.model.host import Ports
from lens_lora.core.model.modules import HOOK_IN, normalised
from lens_lora.core.model.sites import Heads
from lens_lora.errors import ModelStateError, setting


@dataclasses.dataclass(frozen=True, eq=False)
class BridgePoints:
    """The hook points of one bridge, as the flags of its configuration are when they are asked for.

    Attributes:
        components: its components, by layer and kind.
        heads: the heads of its weights.
        keeps_patterns: whether attention makes its pattern, as eager attention does.
    """

    components: Components
    heads: Heads
    keeps_patterns: bool

    def ports(self, layer: int, kind: str) -> Ports:
        """Where the z of a linear map is read and its δ is added."""
        name = self.components.name(layer, kind)
        if self.components.may_flatten_rows(kind):
            return self._ports_by_path(layer, kind)
        read = f"{name}{HOOK_IN}"
        write = f"{name}.hook_out"
        copies = self._copies(layer, kind)
        if copies is not None:
            return Ports(copies, write, through=self._norm_per_head(layer, kind))
        if reads_at_mlp(self._bridge, layer, kind):
            return Ports(f"blocks.{layer}.mlp{HOOK_IN}", write)
        if kind == "o" and self._is_on("use_attn_result"):
            return Ports(read, f"blocks.{layer}.attn.hook_out")
        return Ports(read, write)

    def norm_ports(self, layer: int, kind: str) -> tuple[Ports, ...]:
        """Where a norm shows n and its δ is added.

        Raises:
            ModelStateError: a flag hides n, or the layout in which it is shown is not known.
        """
        if kind == "ln1" and self._copies(layer, "q") is not None:
            raise ModelStateError(
                f"blocks.{layer}.ln1: the adapter changes this norm, and with use_split_qkv_input "
                "or use_attn_in this TransformerBridge normalises each head's input past its hook "
                "points. Turn the flags off."
            )
        is_of_heads = kind in ("q_norm", "k_norm")
        if is_of_heads and not self.keeps_patterns:
            raise ModelStateError(
                f"blocks.{layer}.attn.{kind}: the adapter changes this norm, and with "
                f"{setting('attn', 'sdpa')} its hook points show another layout. Load the model "
                f"with {setting('attn', 'eager')}."
            )
        name = self.components.name(layer, kind)
        write = f"{name}.hook_out"
        if not self.components.is_listed:
            through = functools.partial(normalised, self.components.wrapped(layer, kind))
            return (Ports(f"{name}{HOOK_IN}", write, through=through),)
        layout = "heads_first" if is_of_heads else "rows"
        return (Ports(f"{name}.hook_normalized", write, layout=layout),)

    def block_input(self, layer: int) -> str:
        """`hook_in` of the block, or of the final norm."""
        n_layers = self._bridge.cfg.n_layers
        return f"blocks.{layer}{HOOK_IN}" if layer < n_layers else f"ln_final{HOOK_IN}"

    @property
    def _bridge(self) -> Any:
        return self.components.bridge

    def _is_on(self, flag: str) -> bool:
        return bool(getattr(self._bridge.cfg, flag, False))

    # --- Copies of the residual stream

    def _copies(self, layer: int, kind: str) -> str | None:
        """The hook point of the copies that the heads of q, k or v read; None without copies."""
        if kind not in ("q", "k", "v"):
            return None
        if self._is_on("use_split_qkv_input"):
            return f"blocks.{layer}.attn.hook_{kind}_input"
        if self._is_on("use_attn_in"):
            return f"blocks.{layer}.attn.hook_attn_in"
        return None

    def _norm_per_head(self, layer: int, kind: str) -> Callable[[Tensor], Tensor]:
        """The norm that the bridge applies to the copies; k and v take those of the first heads."""
        attention = self._bridge.blocks[layer].attn
        heads = self.heads.of(kind)
        return lambda copies: compat.normed_per_head(attention, copies[:, :, :heads])

    # --- Modules whose place was read from the model

    def _ports_by_path(self, layer: int, kind: str) -> Ports:
        """Where a module reads and writes that may see the tokens of all rows as one axis."""
        name = self.components.name(layer, kind)
        is_in_block = 0 <= layer < self._bridge.cfg.n_layers
        like = self.block_input(layer) if is_in_block else None
        module = self.components.at(layer, kind)
        if isinstance(module, nn.Parameter):
            is_stack = module.ndim == 3
            layout = "slots" if is_stack else "rows"
            return Ports(name, name, like=like, layout=layout)
        read = f"{name}{HOOK_IN}"
        if read in self._bridge.hook_dict:
            return Ports(read, f"{name}.hook_out", like=like)
        return Ports(name, name, like=like)


def refuse_unknown_copies(bridge: Any) -> None:
    """Refuse a flag under which a transformer-lens does something else to the copies.

    Raises:
        ModelStateError: naming the flag.
    """
    is_known = all(compat.can_norm_per_head(attention) for attention in attentions(bridge))
    for flag in COPIED_INPUTS:
        if getattr(bridge.cfg, flag, False) and not is_known:
            raise ModelStateError(
                f"cfg.{flag} is on, and lens_lora does not know how this transformer-lens "
                f"normalises each head's input, so it cannot compute z. Turn the flag off "
                f"(bridge.set_{flag}(False)) before you make the lens, or use transformer-lens 3.9 "
                "or later."
            )
