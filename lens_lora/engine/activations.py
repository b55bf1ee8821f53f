"""u_l = A_l z_l of every site in one forward pass, and which tokens are sinks.

1. The adapted pass computes u = Az + a₀ anyway; it is kept before B writes it. So x, the input of
   the Hugging Face linear, is what A reads, whatever was folded into the hooked model: where value
   biases were folded, what an update of v adds to x at o is added to u there.
2. Nothing is unembedded, unless a site or a hook is there.
3. A token is a sink if it is the first of its row, or if at some site its ‖z‖ is more than
   `SINK_RATIO` times the median over the row's later tokens.

Cost: one forward pass of the adapted model, without the unembedding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.adapters.factors import LoRAFactors
from lens_lora.engine.function import require_finite
from lens_lora.engine.read import run_without_logits
from lens_lora.errors import ModelStateError, UnsupportedAdapterError
from lens_lora.hooked.gates import ScaleInject, weight_of, write
from lens_lora.hooked.gauge import Gauge, gauge_of
from lens_lora.hooked.norm_map import NormUpdate
from lens_lora.hooked.updates import SiteUpdate
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts

__all__ = [
    "SINK_RATIO",
    "Seen",
    "activation_ranks",
    "in_gauge",
    "sinks_among",
    "site_activations",
]

SINK_RATIO = 50.0


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What one forward pass showed.

    Attributes:
        values: u, NaN at padding and beyond a site's own rank.
        sinks: which tokens are sinks; False at padding.
    """

    values: Float[Tensor, "batch site pos rank"]
    sinks: Bool[Tensor, "batch pos"]


def in_gauge(lens: LoraLens, gauge: Gauge) -> LoraLens:
    """The same function f(ε), each rank space in the coordinates of the gauge.

    Raises:
        ArgumentError: another gauge.
    """
    if gauge_of(gauge) == "trained":
        return lens
    other = copy.copy(lens)
    other._plan = lens.plan.in_svd_gauge
    return other


def activation_ranks(lens: LoraLens, sites: Sequence[int], gauge: Gauge) -> tuple[int, ...]:
    """The number of coordinates of each of these sites; a change of bias has none.

    Args:
        lens: the adapter over the model.
        sites: indices.
        gauge: 'svd' or 'trained'.

    Raises:
        UnsupportedAdapterError: a site without a rank space, or without A of its own as trained.
    """
    return tuple(_rank(lens.plan.updates[site], gauge) for site in sites)


def _rank(one: SiteUpdate, gauge: Gauge) -> int:
    factors, name = one.site.factors, f"{one.site.name} ({one.site.module})"
    if isinstance(one.update, NormUpdate):
        raise UnsupportedAdapterError(
            f"{name}: a norm's update Δγ ⊙ n + Δβ has no rank space; name the other sites with "
            "sites=[…], globs allowed."
        )
    if gauge == "svd":
        return len(one.update.A)
    if isinstance(factors, LoRAFactors) and not factors.needs_base_weight:
        return factors.rank
    what = "DoRA's ΔW" if isinstance(factors, LoRAFactors) else "a weight that was trained whole"
    raise UnsupportedAdapterError(
        f"{name}: {what} is no product s·B·A, so it has no activations as trained; use "
        "gauge='svd', or name the other sites with sites=[…], globs allowed."
    )


def site_activations(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "*batch site"],
    sites: Sequence[int],
    ranks: Sequence[int],
) -> Seen:
    """u of these sites at these gates. One forward pass.

    Args:
        lens: in the gauge that is asked for (`in_gauge`).
        prompts: whole rows.
        gates: at which z is read.
        sites: indices.
        ranks: how many coordinates of each are kept.

    Raises:
        ModelStateError: a site's hook did not fire, or the heads of one have inputs of their own.
        NumericsError: non-finite activations.
    """
    keep = _Keep(lens, prompts, gates, sites, ranks)
    with torch.no_grad(), lens.injected(keep):
        run_without_logits(lens, prompts)
    keep.require_all_seen()
    keep.finish()
    keep.require_finite()
    real = prompts.real.to(keep.values.device)
    keep.values.masked_fill_(~real[:, None, :, None], torch.nan)
    return Seen(keep.values, keep.sinks() & real)


class _Keep:
    """Adds ε ΔW z at every site, and keeps u of the chosen ones."""

    def __init__(
        self,
        lens: LoraLens,
        prompts: Prompts,
        gates: Tensor,
        sites: Sequence[int],
        ranks: Sequence[int],
    ) -> None:
        self._lens, self._gates = lens, gates
        self._scaled = ScaleInject(lens.plan, gates)
        self._slot = {site: slot for slot, site in enumerate(sites)}
        self._ranks, self._real = ranks, prompts.real.to(lens.device)
        self._seen: set[int] = set()
        self._sizes: list[Float[Tensor, "batch pos"]] = []
        self._added: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        batch, pos = prompts.tokens.shape
        self.values = torch.full(
            (batch, len(sites), pos, max(ranks)),
            torch.nan,
            dtype=lens.gate_dtype,
            device=lens.device,
        )

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._lens.plan.injections[index]
        u = injection.map.coordinates(z)
        if index < len(self._lens.sites):
            self._size(z)
            whole = injection.whole
            self._keep(injection.site, u if whole is None else whole.coordinates(z))
        elif injection.partner is not None and not injection.is_constant_of_v:
            self._add(injection.site, u, self._gates[..., injection.partner])
        if not self._scaled.is_active(index):
            return None
        return write(out, injection.map, u, weight_of(injection, self._gates))

    def _keep(self, site: int, u: Tensor) -> None:
        slot = self._slot.get(site)
        if slot is None:
            return
        self._seen.add(site)
        rank = self._ranks[slot]
        self.values[:, slot, :, :rank] = _of_one_input(self._lens, site, u)[..., :rank]

    def _add(self, site: int, u: Tensor, gate: Tensor) -> None:
        """What an update of v adds to the input of o, where it is not in z."""
        if site in self._slot:
            gate = gate.to(u.device, u.dtype)
            self._added[site] = u * (gate.view(-1, 1, 1) if gate.ndim else gate)

    def _size(self, z: Tensor) -> None:
        """‖z‖, once for each tensor that several sites read."""
        if z is self._last or not z.is_floating_point():
            return
        self._last = z
        size = torch.linalg.vector_norm(
            z.flatten(2), dim=-1, dtype=torch.promote_types(z.dtype, torch.float32)
        )
        self._sizes.append(size.to(self._real.device))

    def finish(self) -> None:
        """Add what is kept apart, as hooks of one point may fire in any order."""
        for site, added in self._added.items():
            slot = self._slot[site]
            rank = self._ranks[slot]
            self.values[:, slot, :, :rank] += added[..., :rank].to(self.values.device)

    def sinks(self) -> Bool[Tensor, "batch pos"]:
        """The first token of each row, and those with an outlier among the sizes of z."""
        return sinks_among(self._sizes, self._real)

    def require_finite(self) -> None:
        """Raise NumericsError where a token has an activation that is not finite."""
        ranks = torch.tensor(self._ranks, device=self.values.device)
        slots = torch.arange(self.values.shape[-1], device=self.values.device)
        lacking = (slots >= ranks[:, None])[:, None] | ~self._real[:, None, :, None]
        broken = ~(torch.isfinite(self.values) | lacking).all(-1).all(-1).all(0)
        for slot in broken.nonzero().flatten().tolist():
            site = list(self._slot)[slot]
            require_finite(torch.tensor(torch.nan), f"u of {self._lens.sites[site].name}")

    def require_all_seen(self) -> None:
        """Raise ModelStateError where a chosen site did not run."""
        missed = [self._lens.sites[site].name for site in self._slot if site not in self._seen]
        if missed:
            raise ModelStateError(
                f"{missed[0]} did not run ({len(missed)} sites in all): a hook or a flag of the "
                "model leaves its module out."
            )


def sinks_among(
    sizes: Sequence[Float[Tensor, "batch pos"]], real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """The first token of each row, and those with an outlier among the sizes.

    Args:
        sizes: norms of each token, of any number of tensors.
        real: which positions hold tokens.
    """
    found = torch.zeros_like(real)
    if sizes and found.shape[1] > 2:
        every = torch.stack(list(sizes), 1).masked_fill(~real[:, None], torch.nan)
        usual = every[..., 1:].nanmedian(-1, keepdim=True).values
        found = (every > SINK_RATIO * usual).any(1)
    found[:, 0] = True
    return found


def _of_one_input(lens: LoraLens, site: int, u: Tensor) -> Float[Tensor, "batch pos rank"]:
    """u where each head has an input of its own: the heads' one u, if they agree."""
    if u.ndim < 4:
        return u
    if not torch.equal(u, u[:, :, :1].expand_as(u)):
        raise ModelStateError(
            f"{lens.sites[site].name}: each head has an input of its own here, and they differ, so "
            "there is no single u. Take the hooks off that change them, or turn "
            "use_split_qkv_input off."
        )
    return u[:, :, 0]
