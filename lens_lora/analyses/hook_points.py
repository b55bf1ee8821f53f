"""Hook points by name, glob or predicate: what `names` means wherever it is an argument."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence

import torch

from lens_lora.engine.recording import Recording, record
from lens_lora.errors import ModelStateError, SiteError
from lens_lora.hooked.sites import points_without_update
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.results.choosing import layer_order

__all__ = ["Names", "few", "firing", "known_point", "require_positions", "resolved"]

Names = str | Sequence[str] | Callable[[str], bool]
_NAMED = 5


def resolved(lens: LoraLens, names: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names given in full, and all that are wanted, in order.

    Args:
        lens: the adapter over the model.
        names: a hook point, several, globs, or a predicate.

    Raises:
        SiteError: a name or glob that matches nothing, with the nearest names; no name at all.
    """
    points = list(lens.model.hook_dict)
    known = [points[i] for i in layer_order(points)]
    if not isinstance(names, Iterable) and not callable(names):
        raise SiteError(f"names={names!r}; give a hook point, several, globs, or a predicate.")
    if not isinstance(names, str) and callable(names):
        wanted = [name for name in known if names(name)]
        if not wanted:
            raise SiteError(f"the predicate is true of none of the model's {len(known)} points.")
        return (), tuple(wanted)
    given = [names] if isinstance(names, str) else list(names)
    if not given:
        raise SiteError("no hook point is named; give a name, a glob, or a predicate.")
    found: dict[str, None] = {}
    for pattern in given:
        is_glob = isinstance(pattern, str) and pattern not in known
        hits = fnmatch.filter(known, pattern) if is_glob else []
        found.update(dict.fromkeys(hits or [known_point(lens, pattern)]))
    return tuple(name for name in given if name in known), tuple(found)


def known_point(lens: LoraLens, name: str) -> str:
    """The name, if the model has such a hook point.

    Args:
        lens: the adapter over the model.
        name: of the hook point, in full.

    Raises:
        SiteError: it has none, with the nearest names.
    """
    known = list(lens.model.hook_dict)
    if not isinstance(name, str):
        raise SiteError(f"{name!r} names no hook point; give a string.")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
        raise SiteError(f"the model has no hook point {name!r}; the nearest are {near}.")
    return name


def firing(
    lens: LoraLens, donor: Recording, in_full: Sequence[str], wanted: Sequence[str]
) -> tuple[str, ...]:
    """The wanted points that fire and hold what the adapted model computes there.

    Args:
        lens: the adapter over the model.
        donor: a run's activations at the wanted points.
        in_full: names that were given in full, each of which must fire.
        wanted: all.

    Raises:
        ModelStateError: a point that never fires, or whose value the adapted model never computes.
    """
    dead = [name for name in in_full if name not in donor.firings]
    points = tuple(name for name in wanted if name in donor.firings)
    if dead or not points:
        why = (
            "a flag of the model (use_attn_result, use_hook_mlp_in, …) or its class bypasses it. "
            "Name another point, or set the flag before the lens is made."
        )
        if not lens.plan.host.keeps_patterns:
            why = (
                "with attn='sdpa' no attention scores, patterns or rotated q and k are made. Name "
                "another point, or load the model with attn='eager'."
            )
        raise ModelStateError(
            f"{few(dead or wanted)}: the hook point exists but never fires in a forward pass; {why}"
        )
    between = points_without_update(lens.sites) & set(points)
    if between:
        raise ModelStateError(
            f"{few(sorted(between))}: lies between a site's input and the point at which its "
            "update is added, so it never holds the adapted model's value. Patch the site's input "
            "or output instead (lens.sites: read, write)."
        )
    return points


def require_positions(
    lens: LoraLens, prompts: Prompts, donor: Recording, points: Sequence[str], scale: float
) -> None:
    """Refuse points whose second axis is not the position, of which one token has one entry.

    Args:
        lens: the adapter over the model.
        prompts: what was run.
        donor: their activations.
        points: of the recording.
        scale: the adapter's strength.

    Raises:
        ModelStateError: naming the point and its shape.
    """
    token = Prompts(prompts.tokens[:1, :1], torch.ones_like(prompts.lengths[:1]))
    short, count = record(lens, token, scale, points), prompts.tokens.shape[1]
    for name in points:
        both = zip(donor.firings[name], short.firings[name], strict=True)
        if any(long.shape[1] != count or one.shape[1] != 1 for long, one in both):
            shape = tuple(donor.firings[name][0].shape)
            raise ModelStateError(
                f"{name} holds a tensor {shape} for {count} positions: its second axis is not the "
                "position (attention patterns have the heads there), so a position of it cannot be "
                "told apart; leave this point out, or where it is patched use positions=None."
            )


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are.

    Args:
        names: of hook points.
    """
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
