"""Directions taken out of activations for a span of time: h − m V Vᵀh at hook points.

1. V is an orthonormal basis of the directions in the space of each point, m is 1 at the tokens
   where they are removed and 0 elsewhere, whose h stays as it is to the last bit.
2. By default m is 0 at each row's first token alone. It is a sink: its ‖h‖ is hundreds of times the
   others', every later token attends to it, and means that make a direction leave it out. A
   direction removed there changes the model everywhere, whatever the direction says of the tokens
   that one asks about.
3. A hook sees a tensor, and not which of its tokens are which. So the model's own forward pass is
   watched (`_Watched`): what stands in a cache already, and the attention mask that tells padding
   on the left. The lens tells which tokens of its rows are the prompt's (`told`); a pass of the
   caller's does not, and where it matters is refused.
4. A block that runs again on the way back is in no pass; what it was in is kept (`going_on`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lens_lora.compat import (
    SharedForward,
    Temporary,
    cached_mask,
    cached_tokens,
    computing_attribute,
    open_spans,
)
from lens_lora.core import HookFn, Names, Prompts, attached
from lens_lora.core.model.hooks import hold, lock_of
from lens_lora.core.model.sites import few, firing, resolved
from lens_lora.core.readout.positions import Checked, checked, positions_text
from lens_lora.errors import ArgumentError, ModelStateError
from lens_lora.formats.directions import Directions, directions_of, home_points, is_residual

STREAM_POINTS = "blocks.*.hook_resid_*"
_REMEDY = "use lens.logits or lens.generate, or begin the block with sinks=True"


# --- The pass that runs


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which tokens of the rows of a pass are the prompt's.

    Attributes:
        prompts: [row], how many tokens each prompt has.
        has_response: whether what follows them is known to be a response.
    """

    prompts: Int[Tensor, " row"]
    has_response: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass of a model.

    Attributes:
        module: what runs.
        cached: how many tokens of each row stand in a cache, before those of the pass.
        firsts: [row], where each row's first token stands; None where it is 0.
        rows: what the lens knows of the rows; None in a pass of the caller's.
    """

    module: nn.Module
    cached: int
    firsts: Int[Tensor, " row"] | None
    rows: Rows | None


class _Passes(threading.local):
    """The passes that are under way in this thread, and what was told of the next ones."""

    def __init__(self) -> None:
        self.under_way: list[Pass] = []
        self.told: list[tuple[nn.Module, Rows]] = []


_PASSES = _Passes()


@contextlib.contextmanager
def told(model: nn.Module, rows: Rows) -> Generator[None]:
    """Within the block, passes of the model run these rows."""
    _PASSES.told.append((watched_module(model), rows))
    try:
        yield
    finally:
        _PASSES.told.pop()


def rows_of(prompts: Prompts) -> Rows:
    """What is known of rows that a lens runs."""
    asked = torch.tensor(prompts.asked_lengths)
    return Rows(asked, has_response=prompts.holds_responses)


def pass_under_way() -> Pass | None:
    """The innermost pass of this thread; None outside of one, or where none is watched."""
    return _PASSES.under_way[-1] if _PASSES.under_way else None


@contextlib.contextmanager
def going_on(earlier: Pass | None) -> Generator[None]:
    """Within the block, what runs belongs to an earlier pass. Nothing changes without one."""
    if earlier is None:
        yield
        return
    _PASSES.under_way.append(earlier)
    try:
        yield
    finally:
        _PASSES.under_way.pop()


def watched_module(model: Any) -> nn.Module:
    """What a pass runs: the Hugging Face model of a bridge, which may be called by itself."""
    return getattr(model, "original_model", model)


class _Watched(SharedForward):
    """A model's forward pass, listed in `_PASSES` while it runs."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        functools.update_wrapper(self, type(module).forward)
        self.__wrapped__: Any = self.before  # which tells its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with going_on(self._begun(args, kwargs)):
            return self.before(*args, **kwargs)

    def _begun(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        given = inspect.signature(self.before).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {}), **given.get("model_kwargs", {})}
        cache = given.get("past_key_values")
        if cache is None:
            cache = given.get("past_kv_cache")
        count = cached_tokens(cache)
        told_last = _PASSES.told[-1] if _PASSES.told else None
        if told_last is not None and told_last[0] is self.module:
            return Pass(self.module, count, firsts=None, rows=told_last[1])
        return Pass(self.module, count, self._firsts(given, cached_mask(cache)), rows=None)

    def _firsts(
        self, given: dict[str, Any], earlier: Int[Tensor, "row cached"] | None
    ) -> Int[Tensor, " row"] | None:
        """Where each row's first token stands, counted from the first one in the cache.

        Args:
            given: the arguments of the pass.
            earlier: the attention mask of what stands in the cache, where the cache keeps it; that
                of the pass is of its own tokens then.
        """
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelStateError(
                f"the attention mask of this pass is {shape} and not [row, token], so it does not "
                "say where each row's first token stands, at which no direction is removed",
                remedy=f"Pass a mask of ones and zeros, [row, token], or {_REMEDY}.",
            )
        if mask is None and (earlier is None or not earlier.numel()):
            self._require_no_left_padding(given)
            return None
        known = [part for part in (earlier, mask) if part is not None]
        return torch.cat([part.cpu().int() for part in known], 1).argmax(1)

    def _require_no_left_padding(self, given: dict[str, Any]) -> None:
        """A HookedTransformer makes its own mask of pad tokens on the left."""
        side = given.get("padding_side")
        tokenizer = getattr(self.module, "tokenizer", None)
        side = side if isinstance(side, str) else getattr(tokenizer, "padding_side", "right")
        if side == "left" and _may_be_padded(given.get("input"), tokenizer):
            raise ModelStateError(
                "rows of this pass are padded on the left, so it is not known where each one's "
                "first token stands, at which no direction is removed",
                remedy=f"Pad on the right, pass attention_mask=, or {_REMEDY}.",
            )


def _may_be_padded(given: Any, tokenizer: Any) -> bool:
    """Whether rows that a HookedTransformer is given may begin with padding: several, or pad ids.

    A tokenizer whose pad token is its first one, too, has it once before a row without padding.
    """
    if not isinstance(given, Tensor):
        return isinstance(given, list | tuple) and len(given) > 1
    if given.ndim > 1 and len(given) > 1:
        return True
    pad = getattr(tokenizer, "pad_token_id", None)
    begins_alike = pad == getattr(tokenizer, "bos_token_id", None)
    leading = given.flatten()[: 2 if begins_alike else 1]
    return pad is not None and bool((leading == pad).all())


# --- Where directions are removed

_SAID = {
    "all": "every token",
    "prompt": "the prompt's tokens",
    "response": "the response's tokens",
}


@dataclasses.dataclass(frozen=True)
class Where:
    """The tokens at which directions are removed.

    Attributes:
        named: 'all', 'prompt' or 'response'; '' where there are indices or bounds.
        indices: of tokens within each prompt.
        bounds: start, stop and step of a slice of each prompt.
        sinks: whether each row's first token counts, too.
    """

    named: str
    indices: tuple[int, ...] = ()
    bounds: tuple[int | None, int | None, int | None] | None = None
    sinks: bool = False

    @classmethod
    def of(cls, positions: object, sinks: object) -> Where:
        """From what a caller gives.

        Raises:
            ArgumentError: something that means no positions, or first tokens alone without sinks.
        """
        if not isinstance(sinks, bool):
            raise ArgumentError(f"sinks={sinks!r}: expected True or False.")
        plain: Checked = checked(positions)
        if plain is None or plain == "each":
            return cls("all", sinks=sinks)
        if isinstance(plain, str):
            return cls(plain, sinks=sinks)
        if isinstance(plain, slice):
            where = cls("", bounds=(plain.start, plain.stop, plain.step), sinks=sinks)
            is_first = plain in (slice(0, 1), slice(None, 1))
        else:
            where = cls("", indices=plain, sinks=sinks)
            is_first = set(plain) == {0}
        if is_first and not sinks:
            raise ArgumentError(
                f"positions={positions!r} is each text's first token, a sink, which is left as it "
                "is; pass sinks=True to remove directions there."
            )
        return where

    @property
    def is_everywhere(self) -> bool:
        """Whether no token stays as it is."""
        return self.named == "all" and self.sinks

    def __str__(self) -> str:
        if self.named:
            tokens = _SAID[self.named]
        elif self.bounds is not None:
            tokens = f"positions {positions_text(slice(*self.bounds))}"
        else:
            tokens = f"positions {positions_text(self.indices)}"
        return tokens if self.sinks else f"{tokens} but each text's first"

    def among(self, prompts: Prompts) -> Bool[Tensor, "#row pos"]:
        """Which tokens of rows that a lens runs."""
        run = Pass(nn.Identity(), cached=0, firsts=None, rows=rows_of(prompts))
        return self.mask(run, prompts.tokens.shape[1])

    def mask(self, run: Pass, width: int) -> Bool[Tensor, "#row pos"]:
        """Which of the pass's tokens, of each row."""
        at = torch.arange(run.cached, run.cached + width)[None]  # counted as the pass counts
        firsts = torch.zeros(1, 1, dtype=torch.long)
        if run.firsts is not None:
            firsts = run.firsts.cpu()[:, None]
        at = at - firsts
        chosen = self._chosen(at, run.rows)
        return chosen if self.sinks else chosen & (at != 0)

    def _chosen(self, at: Int[Tensor, "#row pos"], rows: Rows | None) -> Bool[Tensor, "#row pos"]:
        if self.named == "all":
            return torch.ones_like(at, dtype=torch.bool)
        if rows is None and self._needs_ends():
            raise ModelStateError(
                f"directions are removed at {self}, and a pass of your own does not say where its "
                "prompts end",
                remedy="Use lens.logits or lens.generate, or begin the block with positions that "
                "count from the start, such as slice(1, 5).",
            )
        end = None if rows is None else rows.prompts.cpu()[:, None]
        if self.named == "prompt":
            assert end is not None
            return at < end
        if self.named == "response":
            assert rows is not None and end is not None
            return (at >= end) & rows.has_response
        return self._within(at, end)

    def _needs_ends(self) -> bool:
        """Whether it depends on the prompts' lengths."""
        if self.bounds is not None:
            start, stop, _ = self.bounds
            return stop is None or stop < 0 or (start or 0) < 0
        return bool(self.named) or min(self.indices) < 0

    def _within(
        self, at: Int[Tensor, "#row pos"], end: Int[Tensor, "row 1"] | None
    ) -> Bool[Tensor, "#row pos"]:
        """Indices, or a slice, of each prompt."""
        # Without ends all bounds count from the start, and no prompt is cut off.
        lengths = [None] if end is None else end[:, 0].tolist()
        furthest = int(at.max()) + 1
        rows = []
        for length in lengths:
            tokens = range(furthest if length is None else length)
            if self.bounds is not None:
                wanted = set(tokens[slice(*self.bounds)])
            else:
                wanted = {i % len(tokens) for i in self.indices if -len(tokens) <= i < len(tokens)}
            rows.append(torch.tensor(sorted(wanted), dtype=torch.long))
        shown = at.expand(max(len(at), len(rows)), -1)
        chosen = [
            torch.isin(row, wanted) for row, wanted in zip(shown, _each(rows, shown), strict=True)
        ]
        return torch.stack(chosen)


def _each(rows: list[Tensor], shown: Tensor) -> list[Tensor]:
    return rows * len(shown) if len(rows) == 1 else rows


# --- The block


class Switch:
    """Whether the hooks of a block remove anything at the moment."""

    is_on = True


@dataclasses.dataclass(frozen=True, eq=False)
class Removed:
    """What an open block of `lens.without` takes from a model.

    Attributes:
        model: the hooked model.
        says: what is removed where, for people.
        where: the tokens.
        switch: of the block's hooks.
    """

    model: nn.Module
    says: str
    where: Where
    switch: Switch


def removed_from(model: nn.Module) -> list[Removed]:
    """What the open blocks of this thread take from a model, the innermost last."""
    spans = [span.about for span in open_spans()]
    return [about for about in spans if isinstance(about, Removed) and about.model is model]


@contextlib.contextmanager
def put_back(model: nn.Module) -> Generator[None]:
    """Within the block, nothing is removed from the model."""
    switches = [removed.switch for removed in removed_from(model) if removed.switch.is_on]
    try:
        for switch in switches:
            switch.is_on = False
        yield
    finally:
        for switch in switches:
            switch.is_on = True


def take_away(
    span: Temporary, lens: Any, source: Any, names: Names | None, positions: object, sinks: object
) -> Any:
    """h − m V Vᵀh at hook points, until the span ends. One forward pass of one token.

    The hooks are a user's own for every call: they see the adapted model's h, and what reads h
    sees what they leave of it.
    """
    where = Where.of(positions, sinks)
    hold(span, lock_of(lens.model))
    points, widths = _points(lens, _names(source) if names is None else names)
    switch = Switch()
    by_point = {name: directions_of(source, name).at(name, widths[name]) for name in points}
    taken = [
        (name, _take(lens, directions, name, where, switch))
        for name, directions in by_point.items()
    ]
    if not where.is_everywhere:
        module = watched_module(lens.model)
        _Watched.until(span, module, object(), computing_attribute(module))
    span.enter_context(attached(lens.model, taken))
    count, kind = len(by_point[points[0]].rows), type(source).__name__
    says = f"{count} of {kind} at {few(points)}, {where}"
    span.about = Removed(lens.model, says, where, switch)
    return lens.model


def _names(source: Any) -> Names:
    """Where directions are removed if no points are named.

    A single direction of the residual stream at all of it; several points of a Contrast, and
    directions of another space, at their own.
    """
    own = home_points(source)
    if len(own) > 1 or (own and not is_residual(own[0])):
        return list(own)
    return STREAM_POINTS


def _points(lens: Any, names: Names) -> tuple[tuple[str, ...], dict[str, int]]:
    """The named points that fire and hold activations by position, and how wide they are.

    Globs leave out what holds none.
    """
    in_full, wanted = resolved(lens, names)
    widths: dict[str, int] = {}
    others: list[str] = []

    def measure(name: str, tensor: Any, hook: Any) -> None:
        del hook
        is_activation = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if is_activation and tensor.ndim > 2 and tensor.shape[:2] == (1, 1):
            widths[name] = tensor.shape[2:].numel()
            return
        if name in in_full:
            raise ModelStateError(f"{name} holds no activations by position; leave this point out.")
        others.append(name)

    hooks = [(name, functools.partial(measure, name)) for name in wanted]
    with torch.no_grad(), attached(lens.model, hooks):
        lens.run(lens.prompts(torch.zeros(1, 1, dtype=torch.long, device=lens.device)))
    if others and not widths:
        raise ModelStateError(
            f"{few(others)}: no activations by position; name points such as {STREAM_POINTS!r}."
        )
    return firing(lens, widths, in_full, [name for name in wanted if name not in others]), widths


def _take(lens: Any, directions: Directions, name: str, where: Where, switch: Switch) -> HookFn:
    is_own = directions.hook_name is None and directions.rows.shape[1] == lens.model.cfg.d_model
    if is_own and not is_residual(name):
        raise ArgumentError(
            f"{name} is as wide as the residual stream and holds another space (heads, a norm's "
            "output, or what comes before one), so a direction of the stream means nothing there. "
            "Name points such as 'blocks.*.hook_resid_pre' or 'blocks.*.hook_attn_out', or pass a "
            "Contrast of this point."
        )
    V = directions.basis(centred=is_residual(name) and lens.plan.host.centres_stream)
    module = watched_module(lens.model)
    # A sweep's fingerprint hashes what a partial holds.
    return functools.partial(_projected, V, where, name, _Place(module, switch))


class _Place:
    """What belongs to the block of a hook, and decides none of its numbers."""

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        self.module = module
        self.switch = switch


def _projected(
    V: Tensor, where: Where, name: str, place: _Place, tensor: Tensor, hook: Any
) -> Tensor | None:
    del hook
    if not place.switch.is_on:
        return None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    basis, h = V.to(tensor.device, wide), tensor.flatten(2).to(wide)
    along = h @ basis
    if not where.is_everywhere:
        along = along * _mask_of(where, name, place.module, h)[..., None].to(along)
    return (h - along @ basis.T).to(tensor.dtype).reshape(tensor.shape)


def _mask_of(where: Where, name: str, module: nn.Module, h: Tensor) -> Bool[Tensor, "#row pos"]:
    """The tokens at which directions are removed, of each row of an activation."""
    run = pass_under_way()
    if run is None or run.module is not module:
        raise ModelStateError(
            f"{name}: this part of the model runs outside of a pass of the whole model, so it is "
            f"not known which token is which, and directions are removed at {where}",
            remedy="Call the model itself, or begin the block with sinks=True and no positions.",
        )
    rows, width = h.shape[:2]
    mask = where.mask(run, width)
    if len(mask) in (1, rows):
        return mask
    if bool((mask == mask[:1]).all()):
        return mask[:1]
    raise ModelStateError(
        f"{name} holds {rows} rows for {len(mask)} prompts whose tokens differ; leave this point "
        "out of the block."
    )
