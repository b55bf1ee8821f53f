"""A model of two scalars, to be worked by hand.

    y₁ = (w₁ + ε₁ d₁) x,   y₂ = (w₂ + ε₂ d₂) φ(y₁),   logits = (y₂, 0)

x is the token's id. With φ(y) = y² and the numbers below, at x = 3:

    g(ε) = (2 + 5ε₂) (1 + 0.5ε₁)² · 9,   g(0) = 18,   g(1) = 7 · 2.25 · 9 = 141.75
    a₁ = ∂g/∂ε₁ = 2·9·2·0.5 = 18,        a₂ = ∂g/∂ε₂ = 5·9 = 45
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import lens_lora as ll
from lens_lora.core import Injection, SiteMap
from lens_lora.core.model.hooked_host import HookedHost
from lens_lora.core.model.host import Ports
from lens_lora.core.model.plan import Plan
from lens_lora.core.model.sites import Heads, Sites
from lens_lora.families import find_family

W1 = 1.0
D1 = 0.5
W2 = 2.0
D2 = 5.0


class TwoScalars(nn.Module):
    def __init__(self, phi: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.tensor(W1, dtype=torch.float64))
        self.w2 = nn.Parameter(torch.tensor(W2, dtype=torch.float64))
        self.phi = phi
        self.unembed = _ToLogits()
        self.cfg = SimpleNamespace(
            d_vocab=10, d_vocab_out=2, d_model=1, n_ctx=8, n_layers=1, model_name="two scalars"
        )
        names = ("embed", "block", "in1", "out1", "in2", "out2")
        self.hook_dict = {name: HookPoint() for name in names}

    def forward(self, tokens: Tensor, return_type: str = "logits") -> Tensor:
        assert return_type == "logits"
        at = self.hook_dict
        x = at["block"](at["embed"](tokens[..., None].double()))
        y1 = at["out1"](self.w1 * at["in1"](x))
        y2 = at["out2"](self.w2 * at["in2"](self.phi(y1)))
        return self.unembed(y2)


class _ToLogits(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([y, torch.zeros_like(y)], -1)


class _TwoScalarsHost(HookedHost):
    """What the engine asks of it; of its weights, one size for both."""

    class_name = "TwoScalars"
    pass_overhead = 0.0
    embedding_output = "embed"

    def block_input(self, layer: int) -> str:
        return "block"

    def unembedding(self) -> None:
        return None

    def state(self) -> tuple[()]:
        return ()

    def weight(self, layer: int, kind: str) -> Tensor:
        return torch.ones(1, 1)

    def _not_asked(self, *args: object) -> NoReturn:
        raise NotImplementedError

    ports = norm_ports = embedding_scale = bias = norm_parameters = _not_asked
    reads_folded_norm = is_tied = needs_base = refuse_reading = _not_asked
    run_cached = rows_of_cache = _not_asked


def scalar_lens(phi: Callable[[Tensor], Tensor]) -> ll.LoraLens:
    """The lens over it, with rank-1 updates d₁ and d₂."""
    model = TwoScalars(phi)
    host = _TwoScalarsHost(model, find_family("GPT2LMHeadModel"), Heads(1, 1, 1))
    sites = []
    maps = []
    for i, d in ((1, D1), (2, D2)):
        sites.append(ll.results.Site(f"site{i}", f"w{i}", 0, "fc_in", f"in{i}", f"out{i}", 1))
        maps.append(SiteMap(torch.ones(1, 1).double(), torch.full((1, 1), d).double(), None))
    lens = object.__new__(ll.LoraLens)
    lens.model = model
    lens._eps = torch.finfo(torch.float64).eps
    lens.prepend_bos = None
    lens.base_note = ""
    lens._hf_model = None
    one = torch.ones(1, 1)
    lens.adapter = ll.Adapter.from_factors({"w1": ll.LoRAFactors(one, one)})
    ports = (Ports("in1", "out1"), Ports("in2", "out2"))
    injections = tuple(Injection(i, ports[i], maps[i]) for i in range(2))
    lens._plan = Plan(host, Sites(sites), tuple(maps), injections, ())
    return lens
