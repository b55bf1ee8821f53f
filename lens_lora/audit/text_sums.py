"""What models change over many texts, as sums: no logits of more than one batch are held.

    KL_t = Σ_v p₀ log(p₀/p₁)                       kept, one number a token
    H_t = −Σ_v p log p                             of either model
    Σ_t (f₁ − f₀),  Σ_t (p₁ − p₀)                  over the vocabulary; f also of each text
    how often a token is among the `PROMOTED` whose logit rises most
    Σ_t Δh and Σ_t ‖Δh‖² of each text              at two points of the residual stream
    Σ_t Δh, and of what each block adds to it      over the first tokens of texts, 1 … `EARLY`

and on request the path integral of Σ_t KL_t, split by site.

Cost: one forward pass of each model, and two forward and backward for the split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.audit.jacobian import Jacobian
from lens_lora.compat import float64_device, in_float64
from lens_lora.core import (
    HookFn,
    LoraLens,
    Prompts,
    Reading,
    attached,
    distinct_tokens,
)
from lens_lora.core.function.reverse import require_finite_sites, site_slopes
from lens_lora.hidden.stream_reading import over_scale
from lens_lora.texts.batches import (
    TOKENS_AT_ONCE,
    Gated,
    logits_of,
    over_texts,
)
from lens_lora.texts.distribution_shift import DistributionShift, distribution_shift

EARLY = 5  # tokens after the first
_FIRST = slice(1, 1 + EARLY)
_NODES = (0.5 - 12**-0.5, 0.5 + 12**-0.5)  # Gauss–Legendre's two on [0, 1], of equal weight
_PLACES, _PROMOTED = 20, 3  # tokens where KL is largest, and the promoted ones that are named
PROMOTED, _OF_TEXT = 20, 30  # at a token, and by the mean over a text


@dataclasses.dataclass(frozen=True)
class Points:
    """The hook points that are watched.

    Attributes:
        stream: points of the residual stream, the last one behind all blocks.
        writers: points of what attention and MLP of each block add to it.
        jacobian: of one more point, from there to the last.
    """

    stream: tuple[str, ...]
    writers: tuple[str, ...]
    jacobian: Jacobian | None = None

    @classmethod
    def of(cls, lens: LoraLens, jacobian: Jacobian | None) -> Points:
        """In the middle of the model and behind its last block; every block's two outputs."""
        layers = lens.plan.host.n_layers
        names = [f"blocks.{i}.hook_{part}_out" for i in range(layers) for part in ("attn", "mlp")]
        blocks = sorted({(layers - 1) // 2, layers - 1})
        known, stream = lens.model.hook_dict, [f"blocks.{i}.hook_resid_post" for i in blocks]
        return cls(tuple(stream), tuple(name for name in names if name in known), jacobian)

    @property
    def through(self) -> tuple[str, ...]:
        """What the Jacobian's reading is called."""
        return () if self.jacobian is None else (f"{self.jacobian.point} through its Jacobian",)


class TextSums:
    """The sums of one model over all texts.

    Attributes:
        scale: all its gates.
        kl: [text, token], NaN at padding, and at tokens that an earlier text has after the same.
        logits, probabilities: [vocab], Σ_t of the changes.
        entropies: Σ_t of the base's and of this model's, in nats.
        counts: [vocab], at how many tokens it is among the `PROMOTED` first.
        text_ids, text_values: [text, token], those that a text promotes most, and Σ_t f₁ − f₀ of
            it, less its mean over the vocabulary.
        places: [place, 2], text and token where KL is largest; with the tokens whose probability
            rises most there, and by how much.
        stream: [text, point, d] and [text, point], Σ_t Δh and Σ_t ‖Δh‖².
        early: Σ_t Δh over the first tokens, [d] by hook point.
        read: the same of c(Δh)/σ(h), for its reading, [d] by point of the stream; and through a
            Jacobian as c(J Δh)/σ(h), h behind the last block.
    """

    def __init__(self, lens: LoraLens, scale: float, texts: Prompts, points: Points) -> None:
        vocab, d = int(lens.model.cfg.d_vocab_out), int(lens.model.cfg.d_model)
        self.lens: LoraLens = lens
        self.scale: float = scale
        self.points: Points = points
        self.kl: Tensor = torch.full(texts.tokens.shape, torch.nan, dtype=torch.float64)
        self.logits: Tensor = _zeros(lens, vocab)
        self.probabilities: Tensor = _zeros(lens, vocab)
        self.entropies: Tensor = torch.zeros(2, dtype=torch.float64)
        self.counts: Tensor = torch.zeros(vocab, dtype=torch.long, device=lens.device)
        self.text_ids: Tensor = torch.zeros(texts.batch, min(_OF_TEXT, vocab), dtype=torch.long)
        self.text_values: Tensor = torch.zeros(self.text_ids.shape, dtype=torch.float32)
        self.stream: Tensor = _zeros(lens, texts.batch, len(points.stream), d)
        self.squares: Tensor = _zeros(lens, texts.batch, len(points.stream))
        early, read = (*points.stream, *points.writers), (*points.stream, *points.through)
        self.early: dict[str, Tensor] = {name: _zeros(lens, d) for name in early}
        self.read: dict[str, Tensor] = {name: _zeros(lens, d) for name in read}
        self.places: Tensor = torch.empty(0, 2, dtype=torch.long)
        self.place_ids: Tensor = torch.empty(0, _PROMOTED, dtype=torch.long)
        self.place_changes: Tensor = torch.empty(0, _PROMOTED, dtype=torch.float64)

    def add(self, batch: _Batch, moved: _Run) -> None:
        """What the two models say of a batch of texts, and hold there."""
        self._add_stream(batch, moved)
        counted, base = batch.counted, batch.base.logits
        weights = counted.to(base)
        for i, p in enumerate((batch.p, moved.logits.softmax(-1))):
            self.entropies[i] += float(torch.special.entr(p).sum(-1)[counted].double().sum())
        shift = torch.sub(moved.logits, base, out=batch.room)
        self._add_logits(batch, torch.einsum("rp,rpv->rv", weights, shift))
        first = shift.topk(min(PROMOTED, shift.shape[-1])).indices[counted]
        self.counts += torch.bincount(first.flatten(), minlength=len(self.counts))
        change = distribution_shift(base, batch.p, shift)
        self.probabilities += in_float64(change.weighted(weights.flatten()))
        kl = change.kl
        by_token = kl.cpu().double().masked_fill(~counted.cpu(), torch.nan)
        by_token[:, 0] = kl[:, 0].cpu().double()
        self.kl[batch.index, : by_token.shape[1]] = by_token
        self._note(batch, kl.masked_fill(~counted, -1.0), change)

    def _add_logits(self, batch: _Batch, by_text: Float[Tensor, "row vocab"]) -> None:
        self.logits += in_float64(by_text.sum(0))
        most = (by_text - by_text.mean(-1, keepdim=True)).topk(self.text_ids.shape[1])
        self.text_ids[batch.index] = most.indices.cpu()
        self.text_values[batch.index] = most.values.to(self.text_values)

    def _note(self, batch: _Batch, kl: Float[Tensor, "row pos"], change: DistributionShift) -> None:
        """Of this batch's and the earlier ones' tokens, those where KL is largest."""
        most = kl.flatten().topk(min(_PLACES, kl.numel())).indices
        row, pos = most // kl.shape[1], most % kl.shape[1]
        up = change.at(row, pos).topk(min(_PROMOTED, change.p.shape[-1]))
        places = torch.cat([self.places, torch.stack([batch.index[row.cpu()], pos.cpu()], 1)])
        values = self.kl[places[:, 0], places[:, 1]].masked_fill(places[:, 1] == 0, torch.nan)
        order = values.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        order = order[values[order].isfinite()][:_PLACES]
        self.places = places[order]
        self.place_ids = torch.cat([self.place_ids, up.indices.cpu()])[order]
        self.place_changes = torch.cat([self.place_changes, up.values.cpu().double()])[order]

    def _add_stream(self, batch: _Batch, moved: _Run) -> None:
        rows, counted = batch.index.to(self.stream.device), batch.counted
        early = counted[:, _FIRST]
        for name, held in batch.base.held.items():
            shift = moved.held[name].to(self.lens.gate_dtype) - held.to(self.lens.gate_dtype)
            if name in self.points.writers:
                self.early[name] += in_float64(shift[early[:, : shift.shape[1]]]).sum(0)
                continue
            if name in self.points.through:
                self._add_transported(name, shift, batch)
                continue
            slot, rest = self.points.stream.index(name), shift.masked_fill(~counted[..., None], 0)
            self.stream[rows, slot] = in_float64(rest).sum(1)
            self.squares[rows, slot] = in_float64(rest).square().sum((1, 2))
            first, h = (x[:, _FIRST][early] for x in (shift, held.to(shift)))
            self.early[name] += in_float64(first).sum(0)
            self.read[name] += in_float64(over_scale(self.lens, first, h)).sum(0)

    def _add_transported(self, name: str, shift: Float[Tensor, "row pos d"], batch: _Batch) -> None:
        """c(J Δh)/σ(h) of the first tokens, h behind the last block."""
        last, kept = batch.base.held[self.points.stream[-1]][:, _FIRST], batch.counted[:, _FIRST]
        moved = shift[kept] @ cast("Jacobian", self.points.jacobian).matrix.to(shift).T
        self.read[name] += in_float64(over_scale(self.lens, moved, last[kept].to(moved))).sum(0)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Some texts as the base model reads them.

    Attributes:
        index: their places among all texts.
        counted: the tokens that count.
        base: its pass over them.
        p: its probabilities.
        room: a tensor of the size of its logits, to be written over.
    """

    index: Int[Tensor, " row"]
    counted: Bool[Tensor, "row pos"]
    base: _Run
    p: Float[Tensor, "row pos vocab"]
    room: Float[Tensor, "row pos vocab"]


def _zeros(lens: LoraLens, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64, device=float64_device(lens.device))


@dataclasses.dataclass
class _Run:
    """One model's pass over a batch: logits at all tokens, and activations at the points."""

    logits: Float[Tensor, "row pos vocab"]
    held: dict[str, Tensor]


_NOWHERE = Points((), ())


def _run(gated: Gated, rows: Prompts, points: Points = _NOWHERE) -> _Run:
    lens, _ = gated
    held: dict[str, Tensor] = {}

    def keep(name: str, only: slice) -> HookFn:
        return lambda tensor, hook: held.update({name: tensor[:, only].detach().clone()})

    hooks = [(name, keep(name, slice(None))) for name in points.stream]
    hooks += [(name, keep(name, _FIRST)) for name in points.writers]
    if points.jacobian is not None:
        hooks += [(points.jacobian.point, keep(name, _FIRST)) for name in points.through]
    with attached(lens.model, hooks):
        return _Run(logits_of(gated, rows), held)


def text_sums(
    scaled: Sequence[tuple[LoraLens, float]],
    texts: Prompts,
    jacobian: Jacobian | None = None,
    *,
    split: bool,
    progress: bool,
) -> tuple[list[TextSums], Float[Tensor, " site"]]:
    """The sums of every lens at its scale, and the first one's KL split by site, or zeros."""
    first, distinct = scaled[0][0], distinct_tokens(texts)
    points = Points.of(first, jacobian)
    models = [TextSums(lens, scale, texts, points) for lens, scale in scaled]
    shares = _zeros(first, len(first.sites))

    def visit(index: list[int], rows: Prompts) -> None:
        counted = distinct[index, : rows.tokens.shape[1]].to(first.device)
        base = _run((first, first.gates(0.0)), rows, points)
        p, room = base.logits.softmax(-1), torch.empty_like(base.logits)
        batch = _Batch(torch.tensor(index), counted, base, p, room)
        for sums in models:
            sums.add(batch, _run((sums.lens, sums.lens.gates(sums.scale)), rows, points))
        if split:
            shares.add_(_divergence_split(first, rows, counted, p))

    over_texts(
        first, texts, TOKENS_AT_ONCE, visit, "texts", progress, "graph" if split else "plain"
    )
    return models, shares


def _divergence_split(
    lens: LoraLens,
    rows: Prompts,
    counted: Bool[Tensor, "row pos"],
    p: Float[Tensor, "row pos vocab"],
) -> Float[Tensor, " site"]:
    """∫₀¹ ∂/∂ε_l Σ_t KL(p₀ ‖ p_ε) dε of each site over the counted tokens, by two nodes.

    ∂KL/∂f = p_ε − p₀, so the derivative is that of (p_ε − p₀)ᵀ f with p_ε held.
    """

    def read(logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        covector = logits.detach().softmax(-1).sub_(p).masked_fill_(~counted[..., None], 0.0)
        return torch.linalg.vecdot(covector, logits).sum(1)

    owner: Int[Tensor, " row"] = torch.arange(rows.batch)
    total = _zeros(lens, len(lens.sites))
    for node in _NODES:
        slopes = site_slopes(lens, Reading(rows, read, owner), lens.gates(node))
        require_finite_sites(lens, slopes)
        total += in_float64(slopes).sum(0) / len(_NODES)
    return total
