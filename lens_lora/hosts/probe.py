"""Whether a lens is exact on a model that nobody tried: a probe of eight tokens.

A family without an entry in `families` has its sites read from the bridge: from the names of its
components, and from how it splits a fused projection. Whether that is right is measured.

1. Every linear module that the adapter names gets random factors of the adapter's rank, and every
   norm a random Δγ: about a third of what is there, so that a mistake shows.
2. The Hugging Face model runs with each update added to its module's output, by a forward hook at
   the path that the adapter names; of a parameter, with W + ΔW in its place for that call.
3. The hooked model runs with the same factors through the lens's own hooks. What each site writes,
   and the logits, must be equal up to the dtype's rounding, and each site must write once, as its
   module runs once.

The Hugging Face model is the base before it is wrapped (`ll.load`), or `hf_model`. Without either
it is the one within the bridge: as good a reference, unless the bridge takes a projection apart.

Cost: two passes over eight tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lens_lora.compat import Temporary, home_of, is_offloaded, replace_forward, temporary
from lens_lora.core import Adapter, HookFn, LoRAFactors, ScaleInject, TrainedModule, attached
from lens_lora.core.adapter import module_path
from lens_lora.core.model import (
    AGREEMENT,
    SKIP,
    TOKENS,
    Plan,
    Shell,
    extensions,
    host_of,
    is_linear,
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
from lens_lora.hosts.experts import each_shape, is_experts, is_router
from lens_lora.hosts.quantised import quantised_name

# ‖ΔW‖ / ‖W‖, and from how many of W's entries its size is estimated.
_SIZE, _ENTRIES = 0.3, 2**16


class _Added:
    """A forward hook that adds a random update, and keeps what the last token then has."""

    def __init__(self, module: nn.Module, rank: int, seed: int) -> None:
        self._module, self.runs, self.last = module, 0, torch.empty(0)
        size = _SIZE * _root_mean_square(module, cast(Tensor, module.weight))
        if is_norm(module):
            gamma = cast(Tensor, module.weight).detach()
            drawn = torch.Generator().manual_seed(seed)
            self._change = size * torch.randn(gamma.shape, generator=drawn).to(gamma)
            self.update: LoRAFactors | TrainedModule = TrainedModule(gamma + self._change)
        else:
            self.update = _random_factors(*shape_of(module), rank, size, seed)

    def at_module(self, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The module's output and the update's."""
        moved = output + self._delta(args[0].to(output.device), output.dtype).to(output.dtype)
        self.runs, self.last = self.runs + 1, moved.flatten(0, -2)[-1].clone()
        return moved

    def _delta(self, z: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self.update, TrainedModule):
            return normalised(self._module, z) * self._change
        dtype = torch.promote_types(dtype, torch.float32)
        return lora_output(self.update, self._module, z, dtype)

    def __call__(self, tensor: Tensor, hook: Any) -> None:
        raise NotImplementedError  # it is put on modules only


def _random_factors(
    out: int, width: int, rank: int, size: float, seed: int, experts: int = 0
) -> LoRAFactors:
    drawn, each = torch.Generator().manual_seed(seed), rank // max(experts, 1)
    A, B = (torch.randn(shape, generator=drawn) for shape in ((rank, width), (out, rank)))
    return LoRAFactors(A, B, scale=size / each**0.5, experts=experts)


class _Changed:
    """A parameter with a random update in it, for as long as its module runs."""

    def __init__(self, module: nn.Module, name: str, rank: int, seed: int) -> None:
        self._module, self._name, self.runs = module, name, 0
        weight = module.get_parameter(name)
        size = _SIZE * _root_mean_square(module, weight)
        shape, experts = each_shape(module, weight), len(weight) if weight.ndim == 3 else 1
        self.update = _random_factors(*shape, rank, size, seed, experts)

    def __call__(self) -> Tensor:
        """W + ΔW, as the module stores it."""
        self.runs += 1
        weight = self._module.get_parameter(self._name).detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A, B = (factor.to(weight.device, dtype) for factor in (self.update.A, self.update.B))
        parts = dataclasses.replace(self.update, A=A, B=B).by_expert()
        changes = torch.stack([part.materialise() for part in parts])
        is_turned = weight.ndim == 3 and bool(cast(Any, self._module).is_transposed)
        return (weight + (changes.mT if is_turned else changes)).to(weight).view(weight.shape)


@temporary
def _changed(span: Temporary, model: nn.Module, weights: Mapping[str, _Changed]) -> None:
    """Each module of these parameters computes with others in their place."""
    by_owner: dict[str, dict[str, _Changed]] = {}
    for name, change in weights.items():
        owner, _, parameter = name.rpartition(".")
        by_owner.setdefault(owner, {})[parameter] = change
    for owner, changes in by_owner.items():
        module = model.get_submodule(owner)
        shell = Shell(module)

        def forward(
            *args: Any, _shell: Shell = shell, _of: Mapping[str, _Changed] = changes, **kwargs: Any
        ) -> Any:
            parameters = {f"module.{name}": change() for name, change in _of.items()}
            return functional_call(_shell, parameters, args, kwargs)

        replace_forward(span, module, forward)


class Probe:
    """Random updates of an adapter's modules, and what the Hugging Face model makes of them.

    Args:
        reference: the Hugging Face model; or a bridge, for the model within it.
        adapter: names the modules and their ranks.
        done: modules that were probed before, and are left out.
    """

    def __init__(self, reference: Any, adapter: Adapter, done: Collection[str] = ()) -> None:
        names = names_by_path(reference)
        paths = {module_path(key): update for key, update in adapter.modules.items()}
        self.added: dict[str, _Added | _Changed] = {}
        hooks: list[tuple[str, HookFn]] = []
        weights: dict[str, _Changed] = {}
        for seed, (path, update) in enumerate(paths.items()):
            if path in done:
                continue
            rank = update.rank if isinstance(update, LoRAFactors) else 1
            held = _parameter_at(reference, names, path)
            if held is not None:
                module, name = held
                weights[name] = _Changed(module, name.rpartition(".")[2], rank, seed)
                self.added[path] = weights[name]
                continue
            name = names.get(f"{path}.base_layer", names.get(path))  # of a PEFT layer
            module = None if name is None else reference.get_submodule(name)
            if name is not None and module is not None and (is_linear(module) or is_norm(module)):
                added = self.added[path] = _Added(module, rank, seed)
                hooks.append((name, added))
        with attached(reference, hooks, {}), _changed(reference, weights):
            self.logits: Tensor = plain_logits(getattr(reference, "original_model", reference))


def _parameter_at(
    reference: nn.Module, names: Mapping[str, str], path: str
) -> tuple[nn.Module, str] | None:
    """(module, name of its parameter) where the path is that of a stack of experts or a router."""
    owner, _, leaf = path.rpartition(".")
    for place, parameter, is_held in ((owner, leaf, is_experts), (path, "weight", is_router)):
        module = reference.get_submodule(names[place]) if place in names else None
        if module is not None and is_held(module):
            return module, f"{names[place]}.{parameter}"
    return None


@extensions.probed.provide
def probed(
    model: Any,
    hf_model: nn.Module | None,
    adapter: Adapter,
    done: frozenset[str],
    *,
    eps: Callable[[], float],
    probe: extensions.Probe | None,
) -> frozenset[str]:
    """`done` and the adapter's modules, once they are seen to be exact on this bridge.

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
    for path in paths:
        place = family.place(path)
        if place is not None and place.rows:
            raise ModelStateError(
                f"{path}: this TransformerBridge takes the projection apart into "
                f"{', '.join(place.kinds)}, and only the base can tell whether its rows were read "
                "right.",
                remedy="Pass it: LoraLens(model, adapter, "
                f"hf_model=AutoModelForCausalLM.from_pretrained(base)), or use ll.load. {SKIP}",
            )


def require_exact(model: Any, hf_model: nn.Module | None, probe: Probe, eps: float) -> None:
    """Check that a lens over this bridge does what the probe's forward hooks did. One pass.

    `eps` is the precision in which the bridge computes.

    Raises:
        ModelStateError: a site that does not write as often as its module runs, or more than once;
            another output of a site, or other logits.
    """
    if not probe.added:
        return
    random = Adapter({path: added.update for path, added in probe.added.items()}, name="random")
    plan = make_plan(model, random, hf_model)
    inject, points = _Seen(plan), model.hook_dict
    with torch.no_grad(), attached(model, site_hooks(plan, inject, points), points):
        logits = model(TOKENS.to(home_of(model)), return_type="logits")
    for index, site in enumerate(plan.sites):
        added, writes = probe.added[site.module], len(inject.last[index])
        if not writes == added.runs == 1:
            raise ModelStateError(
                f"{site.name} ({site.module}): in one pass this module runs {added.runs} times and "
                f"the site at {site.write} writes {writes} times; once is expected of both. Either "
                "the bridge computes past its hook point, or the model runs the module several "
                "times.",
                remedy=f"Leave it out: adapter.without({site.module!r}). {SKIP}",
                in_shell=f"In Python, leave it out: adapter.without({site.module!r}).save(folder).",
            )
        if isinstance(added, _Changed):
            continue
        rows = plan.updates[index].site.rows
        expected = added.last if rows is None else added.last[rows.to(added.last.device)]
        if site.kind != "embed":  # whose hook point may show a multiple
            claim = f"{site.name} ({site.module}) writes"
            _require_near(inject.last[index][0], expected, claim, eps)
    _require_near(logits, probe.logits, "the logits are", eps)


class _Seen:
    """An injection at gates of 1 that keeps what the last token has at each site."""

    def __init__(self, plan: Plan) -> None:
        self._inject = ScaleInject(plan, torch.ones(len(plan.sites), device=plan.maps[0].device))
        self._widths = [len(delta.sB) for delta in plan.maps]
        self.last: list[list[Tensor]] = [[] for _ in plan.sites]

    def __call__(self, index: int, out: Tensor, z: Tensor) -> Tensor | None:
        moved = self._inject(index, out, z)
        kept = out if moved is None else moved
        self.last[index].append(kept.reshape(-1, self._widths[index])[-1].clone())
        return moved


def _require_near(ours: Tensor, expected: Tensor, claim: str, eps: float) -> None:
    off = float((ours.to(expected) - expected).abs().max())
    size = float(expected.abs().max())
    if not off <= max(AGREEMENT, eps**0.5) * size:
        raise ModelStateError(
            f"with random updates of the adapter's modules, {claim} up to {off:.2g} off, of "
            f"{size:.2g}, from the Hugging Face model with the same updates: this "
            "TransformerBridge computes another function, or orders a module's rows otherwise. "
            "Another version of transformer-lens may not.",
            remedy=SKIP,
            in_shell="",
        )


def _root_mean_square(module: nn.Module, weight: Tensor) -> float:
    """Of the first entries of W; where they are out of reach, that of a usual start."""
    if quantised_name(module) is not None:
        return shape_of(module)[1] ** -0.5
    if is_offloaded(module) or weight.is_meta:
        return max(weight.shape) ** -0.5
    return float(weight.detach().flatten()[:_ENTRIES].float().square().mean().sqrt())
