"""A probe that shows, on eight tokens, whether a lens is exact on a model of an unlisted family.

For a family without an entry in `families`, the sites are read from the bridge: from the names of
its components, and from how it splits a fused projection. The probe measures whether that is right.

1. Every linear module that the adapter names gets random factors of the adapter's rank, and every
   norm a random Δγ. Their size is about a third of the weight's, so that a mistake shows.
2. The Hugging Face model runs with each update added to its module's output, by a forward hook at
   the path that the adapter names. For a parameter, W + ΔW replaces W in that pass.
3. The hooked model runs with the same factors through the lens's own hooks. What each site writes,
   and the logits, must be equal up to the dtype's rounding. Each site must write once, as its
   module runs once.

The Hugging Face model is the base before it is wrapped (`ll.load`), or `hf_model`. Without either,
it is the model inside the bridge, which serves as well unless the bridge takes a projection apart.

Cost: two passes over eight tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lens_lora.compat import home_of, is_linear, is_offloaded, replace_forward
from lens_lora.core import Adapter, HookFn, LoRAFactors, ScaleInject, TrainedModule
from lens_lora.core.adapter import module_path
from lens_lora.core.model import (
    AGREEMENT,
    SKIP,
    TOKENS,
    Plan,
    Shell,
    attached,
    extensions,
    host_of,
    is_norm,
    make_plan,
    names_by_path,
    normalised,
    plain_logits,
    shape_of,
    site_hooks,
)
from lens_lora.errors import ModelStateError
from lens_lora.families import Family
from lens_lora.formats.measured import lora_output
from lens_lora.hosts.experts import expert_shape, is_experts, is_router
from lens_lora.hosts.quantised import quantised_name
from lens_lora.hosts.quirks import TEACH
from lens_lora.spans import Temporary, temporary

# ‖ΔW‖ / ‖W‖ of the random updates.
_SIZE = 0.3
# The size of W is estimated from this many of its entries.
_ENTRIES = 2**16


class _Added:
    """A forward hook that adds a random update, and keeps the output at the last token.

    Args:
        module: a linear module, an embedding or a norm.
        rank: the rank of the update; a norm has none.
        seed: the seed of the draw.

    Attributes:
        update: the update that is added.
        runs: how often the module ran.
        last: the output of the module at the last token, including the update.
    """

    def __init__(self, module: nn.Module, rank: int, seed: int) -> None:
        self.runs: int = 0
        self.last: Tensor = torch.empty(0)
        self._module = module
        weight = cast(Tensor, module.weight)
        size = _SIZE * _root_mean_square(module, weight)
        if is_norm(module):
            gamma = weight.detach()
            generator = torch.Generator().manual_seed(seed)
            self._change = size * torch.randn(gamma.shape, generator=generator).to(gamma)
            self.update: LoRAFactors | TrainedModule = TrainedModule(gamma + self._change)
        else:
            self.update = _random_factors(*shape_of(module), rank, size, seed)

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the update's output to the module's."""
        delta = self._delta(args[0].to(output.device), output.dtype)
        changed = output + delta.to(output.dtype)
        self.runs += 1
        self.last = changed.flatten(0, -2)[-1].clone()
        return changed

    def _delta(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        """The update's output at the input z."""
        if isinstance(self.update, TrainedModule):
            return normalised(self._module, z) * self._change
        dtype = torch.promote_types(dtype, torch.float32)
        return lora_output(self.update, self._module, z, dtype)

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        raise NotImplementedError  # This hook is only put on modules, never on hook points.


def _random_factors(
    out: int, width: int, rank: int, size: float, seed: int, experts: int = 0
) -> LoRAFactors:
    """Draw factors whose product has entries with this root mean square."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn((rank, width), generator=generator)
    B = torch.randn((out, rank), generator=generator)
    rank_of_each = rank // max(experts, 1)
    return LoRAFactors(A, B, scale=size / rank_of_each**0.5, experts=experts)


class _Changed:
    """A parameter to which a random update is added while its module runs.

    Args:
        module: a stack of experts or a router.
        name: the name of the parameter.
        rank: the rank of the update.
        seed: the seed of the draw.

    Attributes:
        update: what is added to the parameter.
        runs: how often the module ran.
    """

    def __init__(self, module: nn.Module, name: str, rank: int, seed: int) -> None:
        self.runs: int = 0
        self._module = module
        self._name = name
        weight = module.get_parameter(name)
        out, width = expert_shape(module, weight)
        size = _SIZE * _root_mean_square(module, weight)
        experts = len(weight) if weight.ndim == 3 else 1
        self.update = _random_factors(out, width, rank, size, seed, experts)

    def __call__(self) -> Tensor:
        """Compute W + ΔW, in the layout in which the module stores W."""
        self.runs += 1
        weight = self._module.get_parameter(self._name).detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        update = dataclasses.replace(
            self.update,
            A=self.update.A.to(weight.device, dtype),
            B=self.update.B.to(weight.device, dtype),
        )
        changes = torch.stack([part.materialise() for part in update.by_expert()])
        if weight.ndim == 3 and bool(cast(Any, self._module).is_transposed):
            changes = changes.mT
        return (weight + changes).to(weight).view(weight.shape)


@temporary
def _changed(span: Temporary, model: nn.Module, weights: Mapping[str, _Changed]) -> None:
    """Within the block, the modules of these parameters compute with the changed ones."""
    by_owner: dict[str, dict[str, _Changed]] = {}
    for name, change in weights.items():
        owner, _, parameter = name.rpartition(".")
        by_owner.setdefault(owner, {})[parameter] = change
    for owner, changes in by_owner.items():
        module = model.get_submodule(owner)
        replace_forward(span, module, functools.partial(_run_changed, Shell(module), changes))


def _run_changed(shell: Shell, changes: Mapping[str, _Changed], *args: Any, **kwargs: Any) -> Any:
    """Run a module with changed parameters."""
    parameters = {f"module.{name}": change() for name, change in changes.items()}
    return functional_call(shell, parameters, args, kwargs)


class Probe:
    """Random updates of an adapter's modules, and the Hugging Face model's logits with them.

    Args:
        reference: the Hugging Face model; or a bridge, for the model inside it.
        adapter: the adapter, whose modules and ranks are probed.
        done: modules that were probed before and are left out.
    """

    def __init__(self, reference: Any, adapter: Adapter, done: Collection[str] = ()) -> None:
        names = names_by_path(reference)
        updates = {module_path(key): update for key, update in adapter.modules.items()}
        self.added: dict[str, _Added | _Changed] = {}
        hooks: list[tuple[str, HookFn]] = []
        weights: dict[str, _Changed] = {}
        for seed, (path, update) in enumerate(updates.items()):
            if path in done:
                continue
            rank = update.rank if isinstance(update, LoRAFactors) else 1
            parameter = _parameter_at(reference, names, path)
            if parameter is not None:
                changed = _Changed(parameter.owner, parameter.name, rank, seed)
                weights[parameter.path] = changed
                self.added[path] = changed
                continue
            # If a layer of PEFT wraps the module, the module inside the layer is meant.
            name = names.get(f"{path}.base_layer", names.get(path))
            if name is None:
                continue
            module = reference.get_submodule(name)
            if is_linear(module) or is_norm(module):
                added = _Added(module, rank, seed)
                self.added[path] = added
                hooks.append((name, added))
        with attached(reference, hooks, {}), _changed(reference, weights):
            self.logits: Tensor = plain_logits(getattr(reference, "original_model", reference))


class _Parameter(NamedTuple):
    """A parameter that an adapter names in place of a module.

    Attributes:
        owner: the module that holds it: a stack of experts, or a router.
        name: its name there.
        path: its path in the model that is probed.
    """

    owner: nn.Module
    name: str
    path: str


def _parameter_at(reference: nn.Module, names: Mapping[str, str], path: str) -> _Parameter | None:
    """The parameter of experts or of a router at an adapter's path; None for any other path."""
    owner, _, name = path.rpartition(".")
    if owner in names:
        module = reference.get_submodule(names[owner])
        if is_experts(module):
            return _Parameter(module, name, f"{names[owner]}.{name}")
    if path in names:
        module = reference.get_submodule(names[path])
        if is_router(module):
            return _Parameter(module, "weight", f"{names[path]}.weight")
    return None


@extensions.check_modules.provide
def check_modules(
    model: Any,
    hf_model: nn.Module | None,
    adapter: Adapter,
    done: frozenset[str],
    *,
    eps: Callable[[], float],
    probe: extensions.Probe | None,
) -> frozenset[str]:
    """Check that the adapter's modules are exact on this bridge, and return all that were checked.

    Raises:
        ModelStateError: see `require_exact`; or the bridge takes a projection apart, and there is
            nothing to compare with.
    """
    paths = {module_path(key) for key in adapter.modules} - done
    if paths and probe is None:
        if hf_model is None:
            _refuse_parts(host_of(model).family, paths)
        probe = Probe(hf_model or model, adapter, done)
    if isinstance(probe, Probe):
        require_exact(model, hf_model, probe, eps())
    return done | paths


def _refuse_parts(family: Family, paths: Collection[str]) -> None:
    """Refuse projections that the bridge takes apart, as there is nothing to compare with."""
    for path in paths:
        place = family.place(path)
        if place is not None and place.rows:
            raise ModelStateError(
                f"{path}: this TransformerBridge takes the projection apart into "
                f"{', '.join(place.kinds)}, and only the base can tell whether its rows were read "
                "correctly.",
                remedy="Pass it: LoraLens(model, adapter, "
                f"hf_model=AutoModelForCausalLM.from_pretrained(base)), or use ll.load. {SKIP}",
            )


def require_exact(model: Any, hf_model: nn.Module | None, probe: Probe, eps: float) -> None:
    """Check that a lens over this bridge does what the probe's forward hooks did. One pass.

    Args:
        model: the bridge.
        hf_model: the unprocessed base, if it is given.
        probe: random updates, and the Hugging Face model's logits with them.
        eps: the precision in which the bridge computes.

    Raises:
        ModelStateError: a site or its module does not run exactly once, or the output of a site or
            the logits differ.
    """
    if not probe.added:
        return
    random = Adapter({path: added.update for path, added in probe.added.items()}, name="random")
    plan = make_plan(model, random, hf_model)
    inject = _Seen(plan)
    points = model.hook_dict
    with torch.no_grad(), attached(model, site_hooks(plan, inject, points), points):
        logits = model(TOKENS.to(home_of(model)), return_type="logits")
    for index, site in enumerate(plan.sites):
        added = probe.added[site.module]
        writes = len(inject.last[index])
        if not writes == added.runs == 1:
            left_out = f"adapter.without_modules({site.module!r})"
            raise ModelStateError(
                f"{site.name} ({site.module}): in one pass this module runs {added.runs} times and "
                f"the site at {site.write} writes {writes} times; once is expected of both. Either "
                "the bridge computes past its hook point, or the model runs the module several "
                "times.",
                remedy=f"Leave it out: {left_out}. {SKIP}",
                in_shell=f"In Python, leave it out: {left_out}.save(folder).",
            )
        if isinstance(added, _Changed):
            continue
        rows = plan.updates[index].site.rows
        expected = added.last
        if rows is not None:
            expected = expected[rows.to(expected.device)]
        if site.kind != "embed":  # The hook point of an embedding may show a multiple.
            claim = f"{site.name} ({site.module}) writes"
            (written,) = inject.last[index]
            _require_near(written, expected, claim, eps)
    _require_near(logits, probe.logits, "the logits are", eps)


class _Seen:
    """An injection at gates of 1 that keeps the output of each site at the last token.

    Attributes:
        last: the output of each site at the last token, each time that it wrote.
    """

    def __init__(self, plan: Plan) -> None:
        gates = torch.ones(len(plan.sites), device=plan.maps[0].device)
        self._inject = ScaleInject(plan, gates)
        self._widths = [len(delta.sB) for delta in plan.maps]
        self.last: list[list[Tensor]] = [[] for _ in plan.sites]

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        changed = self._inject(index, out, z)
        written = out if changed is None else changed
        at_last_token = written.reshape(-1, self._widths[index])[-1]
        self.last[index].append(at_last_token.clone())
        return changed


def _require_near(ours: Tensor, expected: Tensor, claim: str, eps: float) -> None:
    """Check that two results are equal up to rounding."""
    difference = float((ours.to(expected) - expected).abs().max())
    size = float(expected.abs().max())
    if not difference <= max(AGREEMENT, eps**0.5) * size:
        raise ModelStateError(
            f"with random updates of the adapter's modules, {claim} up to {difference:.2g} off, of "
            f"{size:.2g}, from the Hugging Face model with the same updates: this "
            "TransformerBridge computes another function, or orders a module's rows differently. "
            f"Another version of transformer-lens may compute it correctly; or {TEACH}.",
            remedy=SKIP,
            in_shell="",
        )


def _root_mean_square(module: nn.Module, weight: Tensor) -> float:
    """The root mean square of W's first entries, or of a usual initialisation if W is not here."""
    if quantised_name(module) is not None:
        _, width = shape_of(module)
        return width**-0.5
    if is_offloaded(module) or weight.is_meta:
        return max(weight.shape) ** -0.5
    return float(weight.detach().flatten()[:_ENTRIES].float().square().mean().sqrt())
