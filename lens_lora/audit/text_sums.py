"""Sums of what models change over many texts, so that only one batch's logits are held at a time.

    KL_t = Σ_v p₀ log(p₀/p₁)               kept for each token t
    H_t = −Σ_v p log p                     of the base and of the other model
    Σ_t (f₁ − f₀),  Σ_t (p₁ − p₀)          for each token v; f also for each text alone
    Σ_t [v among the first at t]           how often v is among the `PROMOTED` that rise most
    Σ_t Δh and Σ_t ‖Δh‖²                   of each text, at two points of the residual stream
    Σ_t Δh                                 over the texts' first tokens, 1 … `EARLY`, with the part
                                           that each block adds

On request it also computes ∫₀¹ ∂/∂ε_l Σ_t KL_t dε of each site, with two Gauss–Legendre nodes.

Cost: one forward pass of the base and of each model over the texts, and two forward and two
backward passes for the integral.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_lora.audit.jacobian import Jacobian
from lens_lora.compat import float64_device, in_float64
from lens_lora.core import HookFn, LoraLens, Prompts
from lens_lora.stream.stream_reading import over_scale
from lens_lora.texts.batches import (
    TOKENS_AT_ONCE,
    Gated,
    logits_of,
    over_texts,
)
from lens_lora.texts.distribution_shift import DistributionShift, distribution_shift

# The number of first tokens of a text, counted after its very first one.
EARLY = 5
_FIRST = slice(1, 1 + EARLY)
# The two Gauss–Legendre nodes on [0, 1]; each has the weight ½.
_NODES = (0.5 - 12**-0.5, 0.5 + 12**-0.5)
# The number of tokens with the largest KL that are kept as places, and of tokens promoted there.
_PLACES = 20
_PROMOTED_AT_A_PLACE = 3
# The number of tokens whose logit rises most at a position, which count as promoted there.
PROMOTED = 20
_PROMOTED_BY_A_TEXT = 30


@dataclasses.dataclass(frozen=True)
class Points:
    """The hook points that are watched.

    Attributes:
        stream: points of the residual stream, the last one after all blocks.
        writers: the outputs of each block's attention and MLP, which are added to the stream.
        jacobian: the Jacobian from one more point to the last one, or None.
    """

    stream: tuple[str, ...]
    writers: tuple[str, ...]
    jacobian: Jacobian | None = None

    @classmethod
    def of(cls, lens: LoraLens, jacobian: Jacobian | None) -> Points:
        """Watch the stream in the middle and after the last block, and each block's outputs.

        Args:
            lens: the adapter over the model.
            jacobian: the Jacobian of one more point, if a reading there was asked for.
        """
        layers = lens.host.n_layers
        blocks = sorted({(layers - 1) // 2, layers - 1})
        stream = [f"blocks.{i}.hook_resid_post" for i in blocks]
        known = lens.model.hook_dict
        outputs: list[str] = []
        for i in range(layers):
            of_layer = (f"blocks.{i}.hook_attn_out", f"blocks.{i}.hook_mlp_out")
            outputs += [name for name in of_layer if name in known]
        return cls(tuple(stream), tuple(outputs), jacobian)

    @property
    def transported(self) -> tuple[str, ...]:
        """The name of the reading through the Jacobian; () if there is no Jacobian."""
        if self.jacobian is None:
            return ()
        return (f"{self.jacobian.point} through its Jacobian",)


class TextSums:
    """The sums of one model over all texts.

    Attributes:
        lens: the adapter over the model.
        scale: the value of all its gates.
        points: the hook points that are watched.
        kl: [text, token]; NaN at padding, and at tokens that follow the same tokens in an earlier
            text.
        logits, probabilities: [vocab], Σ_t f₁ − f₀ and Σ_t p₁ − p₀.
        entropies: Σ_t H_t in nats, of the base and of this model.
        counts: [vocab], the number of positions at which each token is among the `PROMOTED` first.
        text_ids, text_values: [text, token], the tokens that a text promotes most, and Σ_t f₁ − f₀
            of each, less its mean over the vocabulary.
        stream, squares: [text, point, d] and [text, point], Σ_t Δh and Σ_t ‖Δh‖².
        early: for each hook point [d], Σ_t Δh over the texts' first tokens.
        read: for each point of the stream [d], Σ_t c(Δh)/σ(h) over the first tokens, which is read
            through the unembedding; for a Jacobian Σ_t c(J Δh)/σ(h), with h after the last block.
        places: [place, 2], the text and the position in it where KL is largest.
        place_ids, place_changes: [place, promoted], the tokens whose probability rises most there,
            and by how much.
    """

    def __init__(self, lens: LoraLens, scale: float, texts: Prompts, points: Points) -> None:
        vocab = int(lens.model.cfg.d_vocab_out)
        width = int(lens.model.cfg.d_model)
        self.lens: LoraLens = lens
        self.scale: float = scale
        self.points: Points = points
        self.kl: Tensor = torch.full(texts.tokens.shape, torch.nan, dtype=torch.float64)
        self.logits: Tensor = _zeros(lens, vocab)
        self.probabilities: Tensor = _zeros(lens, vocab)
        self.entropies: Tensor = torch.zeros(2, dtype=torch.float64)
        self.counts: Tensor = torch.zeros(vocab, dtype=torch.long, device=lens.device)
        self.text_ids: Tensor = torch.zeros(
            texts.batch, min(_PROMOTED_BY_A_TEXT, vocab), dtype=torch.long
        )
        self.text_values: Tensor = torch.zeros(self.text_ids.shape, dtype=torch.float32)
        self.stream: Tensor = _zeros(lens, texts.batch, len(points.stream), width)
        self.squares: Tensor = _zeros(lens, texts.batch, len(points.stream))
        self.early: dict[str, Tensor] = {}
        for name in (*points.stream, *points.writers):
            self.early[name] = _zeros(lens, width)
        self.read: dict[str, Tensor] = {}
        for name in (*points.stream, *points.transported):
            self.read[name] = _zeros(lens, width)
        self.places: Tensor = torch.empty(0, 2, dtype=torch.long)
        self.place_ids: Tensor = torch.empty(0, _PROMOTED_AT_A_PLACE, dtype=torch.long)
        self.place_changes: Tensor = torch.empty(0, _PROMOTED_AT_A_PLACE, dtype=torch.float64)

    def add(self, batch: _Batch, adapted: _Run) -> None:
        """Add a batch of texts.

        Args:
            batch: the texts, as the base model reads them.
            adapted: this model's pass over them.
        """
        counted = batch.counted
        base_logits = batch.base.logits
        weights = counted.to(base_logits)
        self._add_entropies(batch, adapted)
        self._add_stream(batch, adapted)

        shift = torch.sub(adapted.logits, base_logits, out=batch.room)
        self._add_logits(batch, torch.einsum("rp,rpv->rv", weights, shift))
        rising = shift.topk(min(PROMOTED, shift.shape[-1])).indices[counted]
        self.counts += torch.bincount(rising.flatten(), minlength=len(self.counts))

        change = distribution_shift(base_logits, batch.p, shift)
        self.probabilities += in_float64(change.weighted(weights.flatten()))
        by_token = change.kl.cpu().double()
        kept = by_token.masked_fill(~counted.cpu(), torch.nan)
        # First tokens have a mean of their own.
        kept[:, 0] = by_token[:, 0]
        self.kl[batch.index, : kept.shape[1]] = kept
        self._note_places(batch, change.kl.masked_fill(~counted, -1.0), change)

    def _add_entropies(self, batch: _Batch, adapted: _Run) -> None:
        for model, p in enumerate((batch.p, adapted.logits.softmax(-1))):
            entropy = torch.special.entr(p).sum(-1)
            self.entropies[model] += float(entropy[batch.counted].double().sum())

    def _add_logits(self, batch: _Batch, by_text: Float[Tensor, "row vocab"]) -> None:
        self.logits += in_float64(by_text.sum(0))
        centred = by_text - by_text.mean(-1, keepdim=True)
        most = centred.topk(self.text_ids.shape[1])
        self.text_ids[batch.index] = most.indices.cpu()
        self.text_values[batch.index] = most.values.to(self.text_values)

    def _note_places(
        self, batch: _Batch, kl: Float[Tensor, "row pos"], change: DistributionShift
    ) -> None:
        """Keep the places with the largest KL among this batch and those kept so far."""
        largest = kl.flatten().topk(min(_PLACES, kl.numel())).indices
        row = largest // kl.shape[1]
        pos = largest % kl.shape[1]
        rising = change.at(row, pos).topk(min(_PROMOTED_AT_A_PLACE, change.p.shape[-1]))
        new_places = torch.stack([batch.index[row.cpu()], pos.cpu()], 1)
        places = torch.cat([self.places, new_places])
        ids = torch.cat([self.place_ids, rising.indices.cpu()])
        changes = torch.cat([self.place_changes, rising.values.cpu().double()])
        values = self.kl[places[:, 0], places[:, 1]]
        # A text's very first token is no place.
        values = values.masked_fill(places[:, 1] == 0, torch.nan)
        order = values.nan_to_num(nan=-1.0).argsort(descending=True, stable=True)
        order = order[values[order].isfinite()][:_PLACES]
        self.places = places[order]
        self.place_ids = ids[order]
        self.place_changes = changes[order]

    def _add_stream(self, batch: _Batch, adapted: _Run) -> None:
        """Add Δh at each watched point."""
        early = batch.counted[:, _FIRST]
        for name, h in batch.base.activations.items():
            before = h.to(self.lens.gate_dtype)
            shift = adapted.activations[name].to(self.lens.gate_dtype) - before
            if name in self.points.writers:
                of_early = shift[early[:, : shift.shape[1]]]
                self.early[name] += in_float64(of_early).sum(0)
            elif name in self.points.transported:
                self._add_transported(name, shift, batch)
            else:
                self._add_point(name, before, shift, batch)

    def _add_point(
        self,
        name: str,
        h: Float[Tensor, "row pos d"],
        shift: Float[Tensor, "row pos d"],
        batch: _Batch,
    ) -> None:
        """Add each text's Σ_t Δh and Σ_t ‖Δh‖², and the sum and the reading of its first tokens."""
        rows = batch.index.to(self.stream.device)
        point = self.points.stream.index(name)
        of_counted = in_float64(shift.masked_fill(~batch.counted[..., None], 0))
        self.stream[rows, point] = of_counted.sum(1)
        self.squares[rows, point] = of_counted.square().sum((1, 2))
        early = batch.counted[:, _FIRST]
        first_shift = shift[:, _FIRST][early]
        first_h = h[:, _FIRST][early]
        self.early[name] += in_float64(first_shift).sum(0)
        self.read[name] += in_float64(over_scale(self.lens, first_shift, first_h)).sum(0)

    def _add_transported(self, name: str, shift: Float[Tensor, "row pos d"], batch: _Batch) -> None:
        """Add c(J Δh)/σ(h) of the first tokens, with h after the last block."""
        assert self.points.jacobian is not None
        early = batch.counted[:, _FIRST]
        last = batch.base.activations[self.points.stream[-1]][:, _FIRST]
        moved = shift[early] @ self.points.jacobian.matrix.to(shift).T
        read = over_scale(self.lens, moved, last[early].to(moved))
        self.read[name] += in_float64(read).sum(0)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch of texts, with the base model's pass over them.

    Attributes:
        index: the index of each text among all texts.
        counted: which tokens count.
        base: the base model's pass.
        p: the base model's probabilities.
        room: a buffer of the size of the logits, which every model's pass overwrites.
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
    activations: dict[str, Tensor]


def _run(gated: Gated, rows: Prompts, points: Points) -> _Run:
    """Run one forward pass that keeps the logits and the activations at the watched points."""
    activations: dict[str, Tensor] = {}

    def keep(name: str, positions: slice) -> HookFn:
        def hook(tensor: Tensor, hook: object) -> None:
            del hook
            activations[name] = tensor[:, positions].detach().clone()

        return hook

    hooks = [(name, keep(name, slice(None))) for name in points.stream]
    hooks += [(name, keep(name, _FIRST)) for name in points.writers]
    if points.jacobian is not None:
        hooks += [(points.jacobian.point, keep(name, _FIRST)) for name in points.transported]
    logits = logits_of(gated, rows, hooks)
    return _Run(logits, activations)


def text_sums(
    scaled: Sequence[tuple[LoraLens, float]],
    texts: Prompts,
    jacobian: Jacobian | None = None,
    *,
    split: bool,
    progress: bool,
) -> tuple[list[TextSums], Float[Tensor, " site"]]:
    """Compute the sums of each lens at its scale, and split the first one's KL by site.

    Args:
        scaled: lenses over the same model, each with the strength at which its adapter runs.
        texts: the texts that all of them read.
        jacobian: the Jacobian through which the Δh of one more point is read.
        split: whether the KL is split by site; without the split the parts are zeros.
        progress: whether to show a bar.
    """
    first, _ = scaled[0]
    distinct = texts.distinct()
    points = Points.of(first, jacobian)
    models = [TextSums(lens, scale, texts, points) for lens, scale in scaled]
    shares = _zeros(first, len(first.sites))

    def visit(index: list[int], rows: Prompts) -> None:
        counted = distinct[index, : rows.tokens.shape[1]].to(first.device)
        base = _run((first, first.gates(0.0)), rows, points)
        p = base.logits.softmax(-1)
        room = torch.empty_like(base.logits)
        batch = _Batch(torch.tensor(index), counted, base, p, room)
        for sums in models:
            adapted = _run((sums.lens, sums.lens.gates(sums.scale)), rows, points)
            sums.add(batch, adapted)
        if split:
            shares.add_(_divergence_by_site(first, rows, counted, p))

    kind = "graph" if split else "plain"
    over_texts(first, texts, TOKENS_AT_ONCE, visit, "texts", progress, kind)
    return models, shares


def _divergence_by_site(
    lens: LoraLens,
    rows: Prompts,
    counted: Bool[Tensor, "row pos"],
    p: Float[Tensor, "row pos vocab"],
) -> Float[Tensor, " site"]:
    """Compute ∫₀¹ ∂/∂ε_l Σ_t KL(p₀ ‖ p_ε) dε of each site over the counted tokens, with two nodes.

    ∂KL/∂f = p_ε − p₀, so the derivative is that of (p_ε − p₀)ᵀ f with p_ε − p₀ held constant.
    """

    def read(logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, " row"]:
        covector = logits.detach().softmax(-1).sub_(p).masked_fill_(~counted[..., None], 0.0)
        return torch.linalg.vecdot(covector, logits).sum(1)

    g = lens.function(rows).about(read)
    total = _zeros(lens, len(lens.sites))
    for node in _NODES:
        total += in_float64(g.slopes(node)).sum(0) / len(_NODES)
    return total
