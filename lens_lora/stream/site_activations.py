"""Rank activations u_l = A_l z_l of every site at every token, kept in one forward pass.

The adapted pass computes u = Az + a₀ anyway, and u is kept before B is applied. So u is what A
reads from the Hugging Face module's own input x, whatever was folded into the hooked model. If
value biases were folded, an update of v changes x at o, and its part of u there is added here.

A token is a sink if it is the first of its row, or if its ‖z‖ at some site is more than
`SINK_RATIO` times the median over the row's later tokens.

Cost: one forward pass, without the unembedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_lora.core import (
    Function,
    Gauge,
    Injection,
    LoRAFactors,
    LoraLens,
    Prompts,
    ScaleInject,
    SiteUpdate,
)
from lens_lora.errors import ModelStateError, UnsupportedAdapterError, require_finite

# In a trained model, ‖z‖ of a sink is up to hundreds of times that of other tokens.
SINK_RATIO = 50.0


@dataclasses.dataclass(frozen=True, eq=False)
class RankActivations:
    """The rank activations of some sites in one forward pass.

    Attributes:
        values: u, NaN at padding and beyond a site's own rank.
        sinks: True where a token is a sink; False at padding.
    """

    values: Float[Tensor, "batch site pos rank"]
    sinks: Bool[Tensor, "batch pos"]


def activation_ranks(lens: LoraLens, sites: Sequence[int], gauge: Gauge) -> tuple[int, ...]:
    """The number of coordinates of each of these sites; a change of bias has none.

    Args:
        lens: the adapter over the model.
        sites: the indices of the sites.
        gauge: 'svd' or 'trained'.

    Raises:
        UnsupportedAdapterError: a site is a norm; or, in gauge 'trained', its update is no product
            s·B·A.
    """
    return tuple(_rank(lens.updates[site], gauge) for site in sites)


def _rank(site_update: SiteUpdate, gauge: Gauge) -> int:
    """The number of coordinates of one site."""
    site = site_update.site
    factors = site.factors
    if site_update.norm is not None:
        raise UnsupportedAdapterError(
            f"{site.name} ({site.module}): a norm's update Δγ ⊙ n + Δβ has no rank space",
            remedy="name the other sites with sites=[…], globs allowed.",
        )
    if gauge == "svd":
        return len(site_update.linear.A)
    if isinstance(factors, LoRAFactors) and not factors.needs_base_weight:
        return factors.rank
    kind = "DoRA's ΔW" if isinstance(factors, LoRAFactors) else "a weight that was trained whole"
    raise UnsupportedAdapterError(
        f"{site.name} ({site.module}): {kind} is no product s·B·A, so it has no activations as "
        "trained",
        remedy="use gauge='svd', or name the other sites with sites=[…], globs allowed.",
    )


def site_activations(
    f: Function,
    gates: Float[Tensor, "*batch site"],
    sites: Sequence[int],
    ranks: Sequence[int],
) -> RankActivations:
    """The activations u of these sites at these gates, and the sinks.

    Cost: one forward pass, in groups of prompts that fit within the lens's memory bound.

    Args:
        f: the function whose rows are run; u has the coordinates of its lens's gauge.
        gates: the gates, for all rows together or for each row.
        sites: the indices of the sites.
        ranks: the number of coordinates of each site, from `activation_ranks`.

    Raises:
        ModelStateError: a site's hook did not fire, or its heads have inputs of their own.
        NumericsError: an activation is not finite.
        SiteError: gates of another number of rows.
    """
    gates = f.lens.gates_of_rows(gates, f.rows.batch)
    step = f.passes.rows_at_once(logits=False)
    by_group: list[RankActivations] = []
    for first in range(0, f.rows.batch, step):
        end = min(first + step, f.rows.batch)
        gates_of_group = gates if gates.ndim == 1 else gates[first:end]
        group = f.of_rows(f.rows.cut(first, end))
        by_group.append(_in_one_pass(group, gates_of_group, sites, ranks))
    values = torch.cat([of_group.values for of_group in by_group])
    sinks = torch.cat([of_group.sinks for of_group in by_group])
    return RankActivations(values, sinks)


def _in_one_pass(
    f: Function,
    gates: Float[Tensor, "*batch site"],
    sites: Sequence[int],
    ranks: Sequence[int],
) -> RankActivations:
    """Run one pass, and return the activations u of these sites."""
    recorder = _Recorder(f.lens, f.rows, gates, sites, ranks)
    f.passes.observe(recorder, logits=False)
    recorder.require_all_seen()
    recorder.add_what_v_adds()
    recorder.require_finite()
    values = recorder.values
    real = f.rows.real.to(values.device)
    values.masked_fill_(~real[:, None, :, None], torch.nan)
    return RankActivations(values, sinks_among(recorder.sizes, real) & real)


class _Recorder:
    """The injection of a pass that keeps u of the chosen sites; sites write ε ΔW z as usual.

    Attributes:
        values: u, [batch, site, pos, rank]; NaN beyond a site's own rank.
        sizes: ‖z‖, [batch, pos], of each distinct tensor that sites read.
    """

    def __init__(
        self,
        lens: LoraLens,
        prompts: Prompts,
        gates: Float[Tensor, "*batch site"],
        sites: Sequence[int],
        ranks: Sequence[int],
    ) -> None:
        self._lens = lens
        self._gates = gates
        self._sites = sites
        self._ranks = ranks
        self._real = prompts.real.to(lens.device)
        self._scaled = ScaleInject(lens.plan, gates)
        self._slots = {site: slot for slot, site in enumerate(sites)}
        self._seen_slots: set[int] = set()
        # What an update of v adds to u of a site o, by the slot of that site.
        self._from_v: dict[int, Tensor] = {}
        self._last_z: Tensor | None = None
        batch, pos = prompts.tokens.shape
        shape = batch, len(sites), pos, max(ranks)
        self.values = torch.full(shape, torch.nan, dtype=lens.gate_dtype, device=lens.device)
        self.sizes: list[Float[Tensor, "batch pos"]] = []

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        injection = self._lens.plan.injections[index]
        u = injection.map.coordinates(z)
        slot = self._slots.get(injection.site)
        # The first injections are those of the sites' own maps, one each.
        is_own_map = index < len(self._lens.sites)
        if is_own_map:
            self._keep_size(z)
        if is_own_map and slot is not None:
            self._keep_u(slot, injection, u, z)
        if not is_own_map and slot is not None:
            self._keep_what_v_adds(slot, injection, u)
        if not self._scaled.is_active(index):
            return None
        return injection.map.added(out, u, injection.gate(self._gates))

    def _keep_what_v_adds(self, slot: int, injection: Injection, u: Tensor) -> None:
        """Keep what the constant part of an update of v adds to u of o, as o's own z lacks it."""
        if injection.partner is None or injection.is_constant_of_v:
            return
        gate_of_v = self._gates[..., injection.partner].to(u.device, u.dtype)
        if gate_of_v.ndim:
            gate_of_v = gate_of_v.view(-1, 1, 1)
        self._from_v[slot] = u * gate_of_v

    def _keep_u(self, slot: int, injection: Injection, u: Tensor, z: Tensor) -> None:
        """Keep u at each token; if this map lacks the constant of v, it is included."""
        if injection.whole is not None:
            u = injection.whole.coordinates(z)
        name = self._lens.sites[injection.site].name
        by_token = _of_one_input(name, z, injection.map.by_token(u))
        rank = self._ranks[slot]
        self.values[:, slot, :, :rank] = by_token[..., :rank]
        self._seen_slots.add(slot)

    def _keep_size(self, z: Tensor) -> None:
        """Keep ‖z‖, once for each tensor that several sites read."""
        if z is self._last_z or not z.is_floating_point():
            return
        self._last_z = z
        wide = torch.promote_types(z.dtype, torch.float32)
        size = torch.linalg.vector_norm(z.flatten(2), dim=-1, dtype=wide)
        self.sizes.append(size.to(self._real.device))

    def add_what_v_adds(self) -> None:
        """Add what updates of v add to u of o, after the pass, as hooks may fire in any order."""
        for slot, added in self._from_v.items():
            rank = self._ranks[slot]
            self.values[:, slot, :, :rank] += added[..., :rank].to(self.values.device)

    def require_finite(self) -> None:
        """Raise NumericsError if a token has an activation that is not finite."""
        for slot, site in enumerate(self._sites):
            u = self.values[:, slot, :, : self._ranks[slot]]
            require_finite(u[self._real], f"u of {self._lens.sites[site].name}")

    def require_all_seen(self) -> None:
        """Raise ModelStateError if a chosen site did not run."""
        missed = [site for site, slot in self._slots.items() if slot not in self._seen_slots]
        if missed:
            name = self._lens.sites[missed[0]].name
            raise ModelStateError(
                f"{name} did not run ({len(missed)} sites in all): a hook or a flag of the model "
                "leaves its module out."
            )


def sinks_among(
    sizes: Sequence[Float[Tensor, "batch pos"]], real: Bool[Tensor, "batch pos"]
) -> Bool[Tensor, "batch pos"]:
    """The sinks: the first token of each row, and tokens whose size is an outlier somewhere.

    Args:
        sizes: ‖z‖ or ‖h‖ at several places of the model.
        real: True for tokens that are not padding.
    """
    sinks = torch.zeros_like(real)
    if sizes and sinks.shape[1] > 2:
        by_place = torch.stack(list(sizes), 1).masked_fill(~real[:, None], torch.nan)
        later_tokens = by_place[..., 1:]
        usual = later_tokens.nanmedian(-1, keepdim=True).values
        sinks = (by_place > SINK_RATIO * usual).any(1)
    sinks[:, 0] = True
    return sinks


def _of_one_input(site: str, z: Tensor, u: Tensor) -> Float[Tensor, "batch pos rank"]:
    """The u that all heads share; an error if the heads read different inputs."""
    if u.ndim < 4:
        return u
    # The inputs are compared, because products of equal rows may differ by rounding.
    if not torch.equal(z, z[:, :, :1].expand_as(z)):
        raise ModelStateError(
            f"{site}: each head has an input of its own here, and these differ, so there is no "
            "single u",
            remedy="remove the hooks that change them, or turn use_split_qkv_input and "
            "use_attn_in off.",
        )
    return u[:, :, 0]
