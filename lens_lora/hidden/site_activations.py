"""u_l = A_l z_l of every site at every token, kept in one forward pass.

The adapted pass computes u = Az + a₀ anyway; it is kept before B writes it. So x, the input of the
Hugging Face linear, is what A reads, whatever was folded into the hooked model: where value biases
were folded, what an update of v adds to x at o is added to u there.

A token is a sink if it is the first of its row, or if at some site its ‖z‖ is more than
`SINK_RATIO` times the median over the row's later tokens.

Cost: one forward pass, without the unembedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core.adapter.factors import LoRAFactors
from lens_lora.core.function.forward import (
    require_finite,
    run_without_logits,
)
from lens_lora.core.function.memory import rows_of_pass
from lens_lora.core.model import LoraLens, SiteUpdate
from lens_lora.core.model.basis import Gauge, NormUpdate
from lens_lora.core.model.gates import ScaleInject, weight_of, write
from lens_lora.core.readout import Prompts
from lens_lora.errors import (
    ModelStateError,
    UnsupportedAdapterError,
)

SINK_RATIO = 50.0  # sinks of trained models have up to hundreds of times the others' ‖z‖


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What one forward pass showed.

    Attributes:
        values: u, NaN at padding and beyond a site's own rank.
        sinks: True where a token is a sink; False at padding.
    """

    values: Float[Tensor, "batch site pos rank"]
    sinks: Bool[Tensor, "batch pos"]


def activation_ranks(lens: LoraLens, sites: Sequence[int], gauge: Gauge) -> tuple[int, ...]:
    """The number of coordinates of each of these sites; a change of bias has none."""
    return tuple(_rank(lens.plan.updates[site], gauge) for site in sites)


def _rank(site_update: SiteUpdate, gauge: Gauge) -> int:
    site, update = site_update.site, site_update.update
    factors, name = site.factors, f"{site.name} ({site.module})"
    if isinstance(update, NormUpdate):
        raise UnsupportedAdapterError(
            f"{name}: a norm's update Δγ ⊙ n + Δβ has no rank space; name the other sites with "
            "sites=[…], globs allowed."
        )
    if gauge == "svd":
        return len(update.A)
    if isinstance(factors, LoRAFactors) and not factors.needs_base_weight:
        return factors.rank
    kind = "DoRA's ΔW" if isinstance(factors, LoRAFactors) else "a weight that was trained whole"
    raise UnsupportedAdapterError(
        f"{name}: {kind} is no product s·B·A, so it has no activations as trained; use "
        "gauge='svd', or name the other sites with sites=[…], globs allowed."
    )


def site_activations(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "*batch site"],
    sites: Sequence[int],
    ranks: Sequence[int],
) -> Seen:
    """u of these sites at these gates. One forward pass, in groups that fit within the bound.

    Raises:
        ModelStateError: a site's hook did not fire, or the heads of one have inputs of their own.
        NumericsError: non-finite activations.
    """
    rows = prompts.batch
    fitting = rows_of_pass(lens, dataclasses.replace(prompts, reads=None)) or rows
    seen: list[Seen] = []
    for first in range(0, rows, fitting):
        last = min(first + fitting, rows)
        of_group = gates if gates.ndim == 1 else gates[first:last]
        seen.append(_activations(lens, prompts.cut(first, last), of_group, sites, ranks))
    return Seen(torch.cat([s.values for s in seen]), torch.cat([s.sinks for s in seen]))


def _activations(
    lens: LoraLens,
    prompts: Prompts,
    gates: Float[Tensor, "*batch site"],
    sites: Sequence[int],
    ranks: Sequence[int],
) -> Seen:
    keep = _Keep(lens, prompts, gates, sites, ranks)
    with torch.no_grad(), lens.injected(keep):
        run_without_logits(lens, prompts)
    keep.require_all_seen()
    keep.finish()
    keep.require_finite()
    real = prompts.real.to(keep.values.device)
    keep.values.masked_fill_(~real[:, None, :, None], torch.nan)
    return Seen(keep.values, sinks_among(keep.sizes, real) & real)


@dataclasses.dataclass(eq=False)
class _Keep:
    """Adds ε ΔW z at every site, and keeps u of the chosen ones."""

    lens: LoraLens
    prompts: Prompts
    gates: Tensor
    sites: Sequence[int]
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        lens = self.lens
        self._scaled = ScaleInject(lens.plan, self.gates)
        self._slot = {site: slot for slot, site in enumerate(self.sites)}
        self._real = self.prompts.real.to(lens.device)
        self._seen: set[int] = set()
        self.sizes: list[Float[Tensor, "batch pos"]] = []
        self._added: dict[int, Tensor] = {}
        self._last: Tensor | None = None
        batch, pos = self.prompts.tokens.shape
        shape = batch, len(self.sites), pos, max(self.ranks)
        self.values = torch.full(shape, torch.nan, dtype=lens.gate_dtype, device=lens.device)

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self.lens.plan.injections[index]
        u, slot = injection.map.coordinates(z), self._slot.get(injection.site)
        if index < len(self.lens.sites):
            self._size(z)
            if slot is not None:
                whole = u if injection.whole is None else injection.whole.coordinates(z)
                by_token, rank = injection.map.by_token(whole), self.ranks[slot]
                kept = _of_one_input(self.lens.sites[injection.site].name, z, by_token)[..., :rank]
                self.values[:, slot, :, :rank] = kept
                self._seen.add(slot)
        elif slot is not None and injection.partner is not None and not injection.is_constant_of_v:
            # What an update of v adds to the input of o, where it is not in z.
            gate = self.gates[..., injection.partner].to(u.device, u.dtype)
            self._added[slot] = u * (gate.view(-1, 1, 1) if gate.ndim else gate)
        if not self._scaled.is_active(index):
            return None
        return write(out, injection.map, u, weight_of(injection, self.gates))

    def _size(self, z: Tensor) -> None:
        """‖z‖, once for each tensor that several sites read."""
        if z is self._last or not z.is_floating_point():
            return
        self._last = z
        size = torch.linalg.vector_norm(
            z.flatten(2), dim=-1, dtype=torch.promote_types(z.dtype, torch.float32)
        )
        self.sizes.append(size.to(self._real.device))

    def finish(self) -> None:
        """Add what is kept apart, as hooks of one point may fire in any order."""
        for slot, added in self._added.items():
            rank = self.ranks[slot]
            self.values[:, slot, :, :rank] += added[..., :rank].to(self.values.device)

    def require_finite(self) -> None:
        """Raise NumericsError where a token has an activation that is not finite."""
        for slot, (site, rank) in enumerate(zip(self.sites, self.ranks, strict=True)):
            u = self.values[:, slot, :, :rank][self._real]
            require_finite(u, f"u of {self.lens.sites[site].name}")

    def require_all_seen(self) -> None:
        """Raise ModelStateError where a chosen site did not run."""
        missed = [site for site, slot in self._slot.items() if slot not in self._seen]
        if missed:
            name = self.lens.sites[missed[0]].name
            raise ModelStateError(
                f"{name} did not run ({len(missed)} sites in all): a hook or a flag of the model "
                "leaves its module out."
            )


def sinks_among(
    sizes: Sequence[Float[Tensor, "batch pos"]], real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """The first token of each row, and those with an outlier among the sizes."""
    sinks = torch.zeros_like(real)
    if sizes and sinks.shape[1] > 2:
        of_sites = torch.stack(list(sizes), 1).masked_fill(~real[:, None], torch.nan)
        usual = of_sites[..., 1:].nanmedian(-1, keepdim=True).values
        sinks = (of_sites > SINK_RATIO * usual).any(1)
    sinks[:, 0] = True
    return sinks


def _of_one_input(site: str, z: Tensor, u: Tensor) -> Float[Tensor, "batch pos rank"]:
    """u where each head has an input of its own: the heads' one u, if they read the same."""
    if u.ndim < 4:
        return u
    if not torch.equal(z, z[:, :, :1].expand_as(z)):  # products of equal rows differ by rounding
        raise ModelStateError(
            f"{site}: each head has an input of its own here, and they differ, so there is no one "
            "u. Take the hooks off that change them, or turn use_split_qkv_input and use_attn_in "
            "off."
        )
    return u[:, :, 0]
