"""Hook points that a caller names: in full, by globs, or by a predicate.

    points = lens.points("blocks.*.hook_resid_post").computed()
    …a pass that notes which points fire…
    names = points.fired(seen)

1. Every name in full must be a hook point of the model, and every glob must match one.
2. Some points exist and never hold the adapted model's value, as they lie between a site's input
   and the point at which its δ is added. A name in full of such a point is refused; globs and
   predicates leave it out (`computed`).
3. Some points exist and never fire, as a flag of the model goes past them. That shows in a pass:
   again a name in full is refused, and globs and predicates leave the point out (`fired`).
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from lens_lora.core.model.host import Host
from lens_lora.core.model.plan import Plan
from lens_lora.core.model.sites import Names, layer_order
from lens_lora.errors import ModelStateError, SiteError, first_few, setting


def known_point(model: Any, name: str) -> str:
    """The name, if the hooked model has such a hook point.

    Raises:
        SiteError: it has none, with the nearest names.
    """
    known = list(model.hook_dict)
    if not isinstance(name, str):
        raise SiteError(f"{name!r} names no hook point; give a string.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise SiteError(f"the model has no hook point {name!r}; the nearest are {near}.")
    return name


@dataclasses.dataclass(frozen=True)
class HookPoints:
    """Hook points of a lens's model, as a caller named them; from `lens.points`.

    Attributes:
        in_full: the names that were given in full, and not by a glob or a predicate.
        wanted: all of them, in the order of layers.
    """

    in_full: tuple[str, ...]
    wanted: tuple[str, ...]
    _plan: Plan = dataclasses.field(repr=False)

    @classmethod
    def of(cls, plan: Plan, names: Names | None) -> HookPoints:
        """Find the hook points that these names mean; None means every one of the model.

        Raises:
            SiteError: a name that the model lacks, a glob or a predicate that matches nothing.
        """
        model = plan.host.model
        if names is None:
            return cls((), tuple(model.hook_dict), plan)
        points = list(model.hook_dict)
        known = [points[i] for i in layer_order(points)]
        if not isinstance(names, Iterable) and not callable(names):
            raise SiteError(f"names={names!r}; give a hook point, several, globs, or a predicate.")
        if not isinstance(names, str) and callable(names):
            return cls((), _that_satisfy(names, known), plan)
        patterns = [names] if isinstance(names, str) else list(names)
        if not patterns:
            raise SiteError("no hook point is named; give a name, a glob, or a predicate.")
        wanted: dict[str, None] = {}
        for pattern in patterns:
            wanted.update(dict.fromkeys(_matching(pattern, known, model)))
        in_full = tuple(name for name in patterns if name in known)
        return cls(in_full, tuple(wanted), plan)

    def computed(self) -> HookPoints:
        """These points, without those whose value the adapted model never computes.

        Raises:
            ModelStateError: such a point was named in full, or all of them are such points.
        """
        never = self._plan.points_without_update
        updated = tuple(name for name in self.wanted if name not in never)
        required = self.in_full if updated else self.wanted
        self._plan.require_update(required)
        return dataclasses.replace(self, wanted=updated)

    def fired(self, seen: Container[str], *, updated: bool = False) -> tuple[str, ...]:
        """The wanted points that fired in a pass.

        Args:
            seen: the points that fired.
            updated: whether each of them must hold what the adapted model computes there.

        Raises:
            ModelStateError: a point that was named in full never fires, or none of them does; with
                `updated`, a point whose value the adapted model never computes.
        """
        silent = [name for name in self.in_full if name not in seen]
        points = tuple(name for name in self.wanted if name in seen)
        if silent or not points:
            raise self._never_fires(silent or self.wanted)
        if updated:
            self._plan.require_update(points)
        return points

    def _never_fires(self, names: Sequence[str]) -> ModelStateError:
        why = (
            "a flag of the model (use_attn_result, use_hook_mlp_in, …) or its class bypasses it. "
            "Name another point, or set the flag before the lens is made."
        )
        if not self._plan.host.keeps_patterns:
            why = (
                f"with {setting('attn', 'sdpa')} no attention scores, patterns or rotated q and k "
                f"are made. Name another point, or load the model with {setting('attn', 'eager')}."
            )
        return ModelStateError(
            f"{first_few(names)}: the hook point exists but never fires in a forward pass; {why}"
        )


def _matching(pattern: Any, known: Sequence[str], model: Any) -> list[str]:
    """The hook points that match a glob, or the one that is named in full.

    Raises:
        SiteError: there is none, with the nearest names.
    """
    if isinstance(pattern, str) and pattern not in known:
        matches = fnmatch.filter(known, pattern)
        if matches:
            return matches
    return [known_point(model, pattern)]


def _that_satisfy(predicate: Callable[[str], bool], known: Sequence[str]) -> tuple[str, ...]:
    wanted = tuple(name for name in known if predicate(name))
    if not wanted:
        raise SiteError(f"the predicate is true of none of the model's {len(known)} points.")
    return wanted


def head_points(host: Host, kinds: Iterable[str]) -> dict[str, str]:
    """The hook points of q, k, v and z, each with the kind of module that it belongs to.

    Where a point has the name that TransformerLens gives it, `blocks.3.attn.hook_q`, that one.
    """
    known = host.model.hook_dict
    points: dict[str, str] = {}
    for layer in range(host.n_layers):
        for kind in kinds:
            ports = host.ports(layer, kind)
            if kind == "o":
                point = ports.read
                usual = f"blocks.{layer}.attn.hook_z"
            else:
                point = ports.write
                usual = f"blocks.{layer}.attn.hook_{kind}"
            if point is None or point not in known:
                continue
            if known.get(usual) is known[point]:
                point = usual
            points[point] = kind
    return points
