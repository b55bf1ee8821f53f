"""The relative precision in which a hooked model computes, measured where its dtype does not tell.

A float64 model may round to float32 on its way, and a device may round the factors of a float32
model's products to TF32 or bfloat16. Both are seen by steps of the token embedding up and down: a
smooth function bends little between them, and one that rounds bends as much as it rounds.

Cost: at most one pass, of eight tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import home_of
from lens_lora.core.model import extensions
from lens_lora.core.model.hooks import attached
from lens_lora.core.model.running import TOKENS

# For a float64 model: a relative step of the embedding, an eighth of a rounding of float32, so that
# about one entry in eight is then rounded another way. Steps up and down bend the logits, as a
# share of the largest, by 2^-26 (a Llama of one layer, d = 8) to 2^-17 (SmolLM2) where norms round
# to float32; where nothing does, curvature and last bits make it 2^-50 to 2^-37.
_STEP = 2.0**-27
_BENT = 2.0**-31
# For a float32 model: an eighth of a rounding of TF32, in which a device may compute the products.
# Curvature and last bits bend a token's logits by 2^-10 to 2^-5.6 (SmolLM2) of what the step
# changes in them; where factors are rounded to the 10 bits of TF32, or the 7 of bfloat16, it is
# 2^-0.5 to 2^2.5. The median over tokens counts: a step may send single ones to other experts.
_PRODUCT_STEP = 2.0**-13
_BENT_BY_PRODUCTS = 2.0**-3
_PRODUCT_DRAWS = 2
_TF32_EPS = 2.0**-10
_Row = Float[Tensor, "1 pos d_vocab"]
_Rows = Float[Tensor, "draw pos d_vocab"]


def known_eps(modules: Collection[nn.Module]) -> float | None:
    """The relative precision in which a model computes; None where a pass has to tell. No pass.

    A float64 model may round to float32 on its way. In float32 a pass tells, unless the model lies
    on a CPU that is not told to round products, and all code in it is known to compute in float32.

    Args:
        modules: all modules of the model.
    """
    weights: list[nn.Parameter] = []
    for module in modules:
        weights += [p for p in compat.own_parameters(module).values() if p.is_floating_point()]
    dtype = weights[0].dtype
    if dtype == torch.float64:
        return None
    if dtype == torch.float32:
        is_single = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in weights)
        if not is_single or compat.may_round_on_cpu() or _has_other_code(modules):
            return None
    return torch.finfo(dtype).eps


def _has_other_code(modules: Collection[nn.Module]) -> bool:
    """Whether some module may compute in another dtype than that of its weights."""
    return any(map(compat.has_own_code, modules)) or bool(extensions.quantised_linears(modules))


def eps_of(model: Any, embedding: str) -> float:
    """Measure the relative precision in which a model computes. At most one pass of eight tokens.

    It is the precision of the model's dtype; of float32, for a float64 model that rounds to it on
    its way; and for a float32 model whose products a device rounds, that of the format to which the
    device rounds their factors.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if dtype == torch.float64 and _rounds_to_single(model, embedding):
        return torch.finfo(torch.float32).eps
    if dtype == torch.float32 and _rounds_products(model, embedding):
        return _eps_of_products()
    return torch.finfo(dtype).eps


def _rounds_to_single(model: Any, embedding: str) -> bool:
    """Whether a float64 model rounds to float32 on its way."""
    plain, up, down = _stepped(model, embedding, _STEP, draws=1)
    bend = (up + down - 2 * plain).abs().max()
    return bool(bend > _BENT * plain.abs().max())


def _rounds_products(model: Any, embedding: str) -> bool:
    """Whether the factors of a float32 model's products are rounded."""
    plain, up, down = _stepped(model, embedding, _PRODUCT_STEP, _PRODUCT_DRAWS)
    bend = (up + down - 2 * plain).norm(dim=-1)
    change = (up - down).norm(dim=-1)
    return bool((bend / change).nanmedian() > _BENT_BY_PRODUCTS)


def _stepped(model: Any, embedding: str, step: float, draws: int) -> tuple[_Row, _Rows, _Rows]:
    """Logits of eight tokens, and those after relative steps of the embedding up and down."""

    # The first row stays as it is, and the others step along the same random directions.
    def steps(rows: Tensor, hook: Any) -> Tensor:
        del hook
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(draws, *rows[0].shape, generator=generator)
        directions = torch.cat([0 * drawn[:1], drawn, -drawn]).to(rows)
        return rows * (1 + step * directions)

    tokens = TOKENS[:, : model.cfg.n_ctx].repeat(1 + 2 * draws, 1) % model.cfg.d_vocab
    with torch.no_grad(), attached(model, [(embedding, steps)]):
        logits = model(tokens.to(home_of(model)), return_type="logits")
    plain, up, down = logits.split([1, draws, draws])
    return plain, up, down


def _eps_of_products() -> float:
    """The precision of rounded factors: that of bfloat16 where torch says so, else of TF32."""
    is_bfloat16 = any(setting in ("bf16", "medium") for setting in compat.float32_products())
    return torch.finfo(torch.bfloat16).eps if is_bfloat16 else _TF32_EPS
