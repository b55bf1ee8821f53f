"""What an adapter changes over many texts, in sums: no logits of more than one batch are held.

Of every model beside the base, over the tokens after each text's first (`distinct_tokens`):

    KL_t = Σ_v p₀ log(p₀/p₁)                       kept, one number a token
    Σ_t (f₁ − f₀),  Σ_t (p₁ − p₀)                  over the vocabulary
    Σ_t Δh and Σ_t ‖Δh‖² of each text              at two points of the residual stream
    Σ_t Δh, and of what each block adds to it      over the first tokens of texts, 1 … `EARLY`

and on request q_l = ½ v_lᵀ F v of every site (`analyses/kl_shares.py`), summed over tokens.

Cost: one forward pass of the base, one of each further model, and about four for the split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from lens_lora.engine.distribution_shift import DistributionShift, distribution_shift
from lens_lora.engine.final_reading import over_scale
from lens_lora.engine.function import require_finite
from lens_lora.engine.pulled_back import pulled_back
from lens_lora.engine.read import read_logits
from lens_lora.engine.reverse import require_finite_sites
from lens_lora.engine.texts import by_length, distinct_tokens
from lens_lora.float64 import float64_device, in_float64
from lens_lora.hooked.attaching import HookFn, attached
from lens_lora.hooked.gates import ScaleInject
from lens_lora.lens import LoraLens
from lens_lora.readouts.prompts import Prompts
from lens_lora.readouts.rows import Reading

__all__ = ["EARLY", "Points", "TextSums", "text_sums"]

EARLY = 5
_TOKENS, _PLACES, _PROMOTED = 512, 20, 3


@dataclasses.dataclass(frozen=True)
class Points:
    """The hook points that are watched.

    Attributes:
        stream: of the residual stream, the last one behind all blocks.
        writers: of what attention and MLP of each block add to it.
    """

    stream: tuple[str, ...]
    writers: tuple[str, ...]

    @classmethod
    def of(cls, lens: LoraLens) -> Points:
        """In the middle of the model and behind its last block; every block's two outputs."""
        layers = lens.plan.host.n_layers
        names = [f"blocks.{i}.hook_{part}_out" for i in range(layers) for part in ("attn", "mlp")]
        at = sorted({(layers - 1) // 2, layers - 1})
        known = lens.model.hook_dict
        return cls(
            tuple(f"blocks.{i}.hook_resid_post" for i in at),
            tuple(name for name in names if name in known),
        )


class TextSums:
    """The sums of one model over all texts.

    Attributes:
        kl: [text, token], NaN at padding, and at tokens that an earlier text has after the same.
        logits, probabilities: [vocab], Σ_t of the changes.
        places: [place, 2], text and token where KL is largest; with the tokens whose probability
            rises most there, and by how much.
        stream: [text, point, d] and [text, point], Σ_t Δh and Σ_t ‖Δh‖².
        early: by hook point [d], Σ_t Δh over the first tokens.
        read: by point of the stream [d], the same of c(Δh)/σ(h), for its reading.
    """

    def __init__(self, lens: LoraLens, texts: Prompts, points: Points) -> None:
        vocab, d = int(lens.model.cfg.d_vocab_out), int(lens.model.cfg.d_model)
        self.lens: LoraLens = lens
        self.points: Points = points
        self.kl: Tensor = torch.full(texts.tokens.shape, torch.nan, dtype=torch.float64)
        self.logits: Tensor = _zeros(lens, vocab)
        self.probabilities: Tensor = _zeros(lens, vocab)
        self.stream: Tensor = _zeros(lens, texts.batch, len(points.stream), d)
        self.squares: Tensor = _zeros(lens, texts.batch, len(points.stream))
        self.early: dict[str, Tensor] = {
            name: _zeros(lens, d) for name in (*points.stream, *points.writers)
        }
        self.read: dict[str, Tensor] = {name: _zeros(lens, d) for name in points.stream}
        self.places: Tensor = torch.empty(0, 2, dtype=torch.long)
        self.place_ids: Tensor = torch.empty(0, _PROMOTED, dtype=torch.long)
        self.place_changes: Tensor = torch.empty(0, _PROMOTED, dtype=torch.float64)

    def add(
        self,
        index: Sequence[int],
        counted: Bool[Tensor, "row pos"],
        base: _Run,
        p: Float[Tensor, "row pos vocab"],
        moved: _Run,
        room: Float[Tensor, "row pos vocab"],
    ) -> None:
        """A batch of texts: what the two models say and hold; `room` is written over."""
        self._add_stream(index, counted, base, moved)
        weights = counted.flatten().to(base.logits)
        shift = torch.sub(moved.logits, base.logits, out=room)
        self.logits += in_float64(weights @ shift.flatten(0, 1))
        change = distribution_shift(base.logits, p, shift)
        self.probabilities += in_float64(change.weighted(weights))
        kl = change.kl
        own = kl.cpu().double().masked_fill(~counted.cpu(), torch.nan)
        own[:, 0] = kl[:, 0].cpu().double()
        self.kl[torch.tensor(index), : own.shape[1]] = own
        self._note_places(index, kl.masked_fill(~counted, -1.0), change)

    def _note_places(
        self,
        index: Sequence[int],
        kl: Float[Tensor, "row pos"],
        change: DistributionShift,
    ) -> None:
        """Of this batch's and the earlier ones' tokens, those where KL is largest."""
        most = kl.flatten().topk(min(_PLACES, kl.numel())).indices
        row, pos = most // kl.shape[1], most % kl.shape[1]
        up = change.at(row, pos).topk(min(_PROMOTED, change.p.shape[-1]))
        found = torch.stack([torch.tensor(index)[row.cpu()], pos.cpu()], 1)
        every = torch.cat([self.places, found])
        values = self.kl[every[:, 0], every[:, 1]].masked_fill(every[:, 1] == 0, torch.nan)
        order = values.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        order = order[values[order].isfinite()][:_PLACES]
        self.places = every[order]
        self.place_ids = torch.cat([self.place_ids, up.indices.cpu()])[order]
        self.place_changes = torch.cat([self.place_changes, up.values.cpu().double()])[order]

    def _add_stream(
        self, index: Sequence[int], counted: Bool[Tensor, "row pos"], base: _Run, moved: _Run
    ) -> None:
        at, early = torch.tensor(index, device=self.stream.device), counted[:, 1 : 1 + EARLY]
        for name, held in base.held.items():
            shift = moved.held[name].to(self.lens.gate_dtype) - held.to(self.lens.gate_dtype)
            if name in self.points.writers:
                self.early[name] += in_float64(shift[early[:, : shift.shape[1]]]).sum(0)
                continue
            slot, rest = self.points.stream.index(name), shift.masked_fill(~counted[..., None], 0)
            self.stream[at, slot] = in_float64(rest).sum(1)
            self.squares[at, slot] = in_float64(rest).square().sum((1, 2))
            some, h = (x[:, 1 : 1 + EARLY][early] for x in (shift, held.to(shift)))
            self.early[name] += in_float64(some).sum(0)
            self.read[name] += in_float64(over_scale(self.lens, some, h)).sum(0)


def _zeros(lens: LoraLens, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=float64_device(lens.device))


@dataclasses.dataclass
class _Run:
    """One model's pass over a batch: logits at all tokens, and activations at the points."""

    logits: Float[Tensor, "row pos vocab"]
    held: dict[str, Tensor]


def _run(lens: LoraLens, rows: Prompts, gates: Float[Tensor, "site"], points: Points) -> _Run:
    held: dict[str, Tensor] = {}

    def keep(name: str, only: slice) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:
            del hook
            held[name] = tensor[:, only].detach().clone()

        return hook_fn

    hooks = [(name, keep(name, slice(None))) for name in points.stream]
    hooks += [(name, keep(name, slice(1, 1 + EARLY))) for name in points.writers]
    inject = ScaleInject(lens.plan, gates)
    with torch.no_grad(), lens.injected(inject), attached(lens.model, hooks):
        logits = read_logits(lens, rows)
    require_finite(logits.amax(), "a logit")
    return _Run(logits, held)


def text_sums(
    lenses: Sequence[LoraLens], texts: Prompts, *, split: bool, progress: bool
) -> tuple[list[TextSums], Float[Tensor, "site"]]:
    """The sums of every lens, and q_l of the first one's sites in nats; zeros without the split.

    Args:
        lenses: over one model.
        texts: of two tokens at least.
        split: whether to compute q_l.
        progress: show a bar.

    Raises:
        NumericsError: non-finite logits or derivatives.
        ModelStateError: for the split, an operation without a forward-mode derivative.
    """
    points, first = Points.of(lenses[0]), lenses[0]
    found, distinct = [TextSums(lens, texts, points) for lens in lenses], distinct_tokens(texts)
    shares = _zeros(first, len(first.sites))
    with tqdm(total=texts.batch, desc="texts", leave=False, disable=not progress) as bar:
        for index, some in by_length(texts, _TOKENS):
            # Read at every token, so that a slot is a position.
            rows = dataclasses.replace(some, reads=some.lengths)
            counted = distinct[index, : rows.tokens.shape[1]].to(first.device)
            base = _run(first, rows, first.gates(0.0), points)
            p, room = base.logits.softmax(-1), torch.empty_like(base.logits)
            for sums in found:
                moved = _run(sums.lens, rows, sums.lens.gates(1.0), points)
                sums.add(index, counted, base, p, moved, room)
            if split:
                shares += _quadratic(first, rows, counted, p)
            bar.update(len(index))
    return found, shares


def _quadratic(
    lens: LoraLens,
    rows: Prompts,
    counted: Bool[Tensor, "row pos"],
    p: Float[Tensor, "row pos vocab"],
) -> Float[Tensor, "site"]:
    """½ v_lᵀ F v of each site, summed over the counted tokens."""

    def pulled(base: Tensor, v: Tensor) -> Tensor:
        del base
        v = v - (p * v).sum(-1, keepdim=True)
        return v.mul_(p).masked_fill_(~counted[..., None], 0.0)

    owner: Int[Tensor, "row"] = torch.arange(rows.batch)
    doubled, _ = pulled_back(lens, Reading(rows, _unread, owner), (), pulled)
    require_finite_sites(lens, doubled)
    return in_float64(doubled).sum(0) / 2


def _unread(logits: Tensor) -> Tensor:
    """What is pulled back is no readout of the logits."""
    return logits.new_zeros(len(logits))
