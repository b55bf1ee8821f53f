"""What did this fine-tune change? Texts that have nothing to do with it, and nothing asked.

1. Base and adapted model read the same texts (`texts/neutral.py`, or the caller's). Every number
   is over the tokens after each text's first, which is a sink; a token with the same tokens before
   it as in an earlier text counts once.
2. Where KL is largest; which tokens are promoted in the mean, by logits and by probability, how
   often each is among the first 20, and which the same texts promote (`promoted_groups`); what the
   mean Δh on the first tokens reads as through the unembedding (arXiv 2510.13900), and which
   blocks add it; how much of Δh is one vector (arXiv 2507.08218); which sites hold the KL, by the
   path integral with two nodes (the quadratic part at the base may rank them at random).
3. The same of null adapters, in random directions, and of unrelated adapters. A null adapter runs
   at the scale ε at which its KL over the texts is the adapter's, so that it is as loud. KL grows
   like ε² from zero, so log KL is nearly linear in log ε, and a secant finds ε in a few steps.
   Where none gives that KL, it runs at the nearest that was tried, and its KL is stated.
4. What the adapted model says of its own accord, as claims with the runs that show them
   (`audit/brief.py`).

Nothing is tested for significance: controls are few, and say how large a chance finding is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.optimize import root_scalar
from scipy.sparse import coo_array
from torch import Tensor

from lens_lora.arguments import is_whole, whole, word
from lens_lora.audit.brief import Brief, Claim, claims_of, repeated
from lens_lora.audit.jacobian import jacobian_of
from lens_lora.audit.text_sums import EARLY, TextSums, text_sums
from lens_lora.compat import without_warnings
from lens_lora.core import (
    Adapter,
    LoraLens,
    OfSites,
    Paged,
    Prompts,
    PromptsLike,
    alone,
    distinct_tokens,
    null_adapters,
    site_labels,
    stored,
)
from lens_lora.core.function.asked import ask_prompts
from lens_lora.core.results import drawing
from lens_lora.core.results.tokens import context_of, held_out_share, rank_of, ranked_tokens
from lens_lora.errors import ArgumentError, TokenError, many
from lens_lora.hidden.stream_reading import read_through
from lens_lora.responses.generate import SideBySide, side_by_side, whole_or_cut
from lens_lora.texts import neutral
from lens_lora.texts.batches import require_second_token
from lens_lora.texts.divergences import text_divergences

# Of a null adapter's scale ε: the secant's last step of log ε, after which KL is within 1 %; its
# most steps; and the farthest log ε, a thousand times the adapter's size.
_NEAR, _STEPS, _FARTHEST = 0.02, 8, 7.0
_SEEN = 5e-4  # of probability: a smaller rise would be written as +0.000
_ANSWER = 40  # tokens that both models say to a question
_BRIEF_MODULES = 5
_FAST = 8  # one of so many texts
# An adapter breaks the model beyond this factor between the entropies, or if so much more than of
# the base's answers repeats. `benchmarks/audit/broken.py` has both of 24 adapters: as trained at
# most 1.3 and 0.23, at eight times their strength up to 8.0 and 0.96.
_APART, _REPEATS = 2.0, 1 / 3
_NOT_TRIED = "system messages, conversations of several turns", "other languages"
_UNRELATED = "adapters trained for something else, as controls"
By = Literal["logit", "probability", "count", "reading"]
BY: tuple[By, ...] = ("logit", "probability", "count", "reading")


@stored
@dataclasses.dataclass(frozen=True, eq=False)
class Changes:
    """What one adapter changes over the texts; every mean is over distinct tokens after first ones.

    Attributes:
        name: the adapter's.
        scale: the strength at which it ran: 1, or of a null adapter what gives the adapter's KL.
        kl: [text, token], KL(base ‖ adapted) in nats; NaN at padding, and at tokens that stand
            after the same tokens in an earlier text.
        entropies: of the next token, the mean over tokens in nats: the base's and the adapted's.
        logit: [vocab], the mean of f(1) − f(0), less its mean over the vocabulary.
        probability: [vocab], the mean of p(1) − p(0).
        count: [vocab], the share of the tokens after which it is among the 20 whose logit rises
            most.
        text_ids, text_shifts: [text, moved], the tokens that a text promotes most, and the sum of
            f(1) − f(0) over its tokens, less its mean over the vocabulary.
        readings: by point of the residual stream [vocab], the mean Δh over the texts' first tokens
            (1 to 5) through the final norm and the unembedding, less its mean; the last one through
            a Jacobian, if one was asked for.
        writers: by attention and MLP of each block, ⟨mean of what it adds, Δh⟩/‖Δh‖², with Δh the
            mean behind the last block: they sum to one, with what else is there ('rest').
        constant: by point, how much of Δh is one vector, on held-out texts.
        places: [place, 2], text and token where KL is largest.
        place_ids, place_changes: [place, promoted], which tokens' probability rises most there.
    """

    name: str
    scale: float
    kl: Float[Tensor, "text token"]
    entropies: tuple[float, float]
    logit: Float[Tensor, " vocab"]
    probability: Float[Tensor, " vocab"]
    count: Float[Tensor, " vocab"]
    text_ids: Int[Tensor, "text moved"]
    text_shifts: Float[Tensor, "text moved"]
    readings: Mapping[str, Float[Tensor, " vocab"]]
    writers: Mapping[str, float]
    constant: Mapping[str, float]
    places: Int[Tensor, "place 2"]
    place_ids: Int[Tensor, "place promoted"]
    place_changes: Float[Tensor, "place promoted"]

    @property
    def mean_kl(self) -> float:
        """Over the tokens after each text's first."""
        return float(self.kl[:, 1:].nanmean())

    @property
    def first_kl(self) -> float:
        """At the texts' first tokens, which are no part of any other mean."""
        return float(self.kl[:, 0].nanmean())

    def of(self, by: By) -> Float[Tensor, " vocab"]:
        """The numbers by which tokens are ranked.

        Args:
            by: 'logit', 'probability', 'count', or 'reading' (the last of them).

        Raises:
            ArgumentError: another word.
        """
        word("by", by, BY)
        return [*self.readings.values()][-1] if by == "reading" else getattr(self, by)


@final
class WhatChanged(OfSites, Paged):
    """What an adapter changes over texts that have nothing to do with it, nothing asked.

    Attributes:
        found: of the adapter.
        nulls: of adapters in random directions, as loud as the adapter: at the scale that gives
            them its KL.
        unrelated: of the unrelated adapters that were given.
        shares: [site], ∫₀¹ ∂KL/∂ε_l dε in nats a token, with two nodes: they sum to the mean KL but
            for what two nodes leave open; zeros where it was not asked for.
        strings: every token of the vocabulary.
        str_tokens: each text's tokens.
        texts: what the texts are.
        sites, meta: see `OfSites`; all that are adapted.
        answers: both models' to everyday questions and an empty turn, 40 tokens at most, and drawn;
            none unasked, without a tokenizer, or where the context has no room for them.
        claims: what it was taught, the strongest first; none without null adapters, or where
            `answers` has none.
    """

    found: Changes
    nulls: tuple[Changes, ...]
    unrelated: tuple[Changes, ...]
    shares: Float[Tensor, " site"]
    strings: Annotated[tuple[str, ...], "vocab"]
    str_tokens: Annotated[tuple[tuple[str, ...], ...], "text token"]
    texts: str
    answers: tuple[SideBySide, ...] = ()
    claims: tuple[Claim, ...] = ()

    @property
    def controls(self) -> tuple[Changes, ...]:
        """Null adapters, then unrelated ones."""
        return (*self.nulls, *self.unrelated)

    @property
    def _kinds(self) -> dict[str, tuple[Changes, ...]]:
        return {"null": self.nulls, "unrelated": self.unrelated}

    def promoted(self, k: int = 20, by: By = "logit", *, largest: bool = True) -> pd.DataFrame:
        """The k tokens promoted most on average, each beside the controls.

        Args:
            k: how many.
            by: the mean shift of the 'logit', of the 'probability', the 'count' of the tokens after
                which it is among the 20 whose logit rises most (a share), or the 'reading' of mean
                Δh on the first tokens. They differ: rare tokens have large logit shifts and little
                probability.
            largest: False for the tokens suppressed most.

        Returns:
            rank, token, id, value; `null`, `unrelated`: the largest value that any token has under
            such an adapter (the least, of those suppressed); `rank_null`, `rank_unrelated`: the
            best rank of this token there.

        Raises:
            ArgumentError: another `by`, or a k below 0.
        """
        sign = 1 if largest else -1
        frame = ranked_tokens(self.found.of(by), self.strings, k, by, largest=largest)
        for name, others in self._kinds.items():
            values = [sign * other.of(by) for other in others]
            if values:
                frame[name] = sign * max(float(v.max()) for v in values)
                frame[f"rank_{name}"] = [min(rank_of(v, i) for v in values) for i in frame["id"]]
        return frame

    def rank(self, token: str | int, by: By = "logit") -> dict[str, int]:
        """A token's rank among the promoted, 1 for the first: by this adapter, and by each control.

        Args:
            token: its string, of one token, or its id.
            by: as for `promoted`.

        Returns:
            By adapter, this one first; the second of one name is 'name (2)'.

        Raises:
            TokenError: no such token, or several that read alike.
        """
        index, ranks = self._id(token), dict[str, int]()
        for changes in (self.found, *self.controls):
            label, copy = changes.name, 1
            while label in ranks:
                copy += 1
                label = f"{changes.name} ({copy})"
            ranks[label] = rank_of(changes.of(by), index)
        return ranks

    def _id(self, token: str | int) -> int:
        if is_whole(token) and 0 <= token < len(self.strings):
            return int(token)
        ids = [i for i, string in enumerate(self.strings) if string == token]
        if len(ids) > 1:
            raise TokenError(
                f"{len(ids)} tokens of the vocabulary read {token!r}, of the ids {ids[0]}, "
                f"{ids[1]}{', …' if len(ids) > 2 else ''}; give the id."
            )
        if ids:
            return ids[0]
        raise TokenError(
            f"{token!r} is no token of the vocabulary of {len(self.strings)}; give one token with "
            "its leading space, or an id."
        )

    def where(self, k: int = 10, context: int = 8) -> pd.DataFrame:
        """The k tokens after which the two models' next token differs most, by KL.

        What is promoted there by less than 0.0005 of probability is left out.

        Args:
            k: how many, of the 20 that are kept.
            context: how many tokens are shown on either side.
        """
        rows: list[dict[str, Any]] = []
        for place, (text, t) in enumerate(self.found.places.tolist()[: whole("k", k, 0)]):
            tokens = self.str_tokens[text]
            row = {"text": text, "position": t, "token": tokens[t]}
            row |= {"context": context_of(tokens, t, context)}
            ids, changes = self.found.place_ids[place], self.found.place_changes[place]
            pairs = zip(ids.tolist(), changes.tolist(), strict=True)
            words = [f"{self.strings[i]!r} {c:+.3f}" for i, c in pairs if c >= _SEEN]
            row |= {"kl": float(self.found.kl[text, t]), "promoted": ", ".join(words)}
            for name, others in self._kinds.items():
                if others:
                    row[name] = max(float(other.kl[text, t]) for other in others)
            rows.append(row)
        return pd.DataFrame(rows)

    def modules(self, k: int = 10) -> pd.DataFrame:
        """The k sites of largest share of the KL; none where it was not split.

        Args:
            k: how many.
        """
        k = whole("k", k, 0) if bool(self.shares.any()) else 0
        order = self.shares.argsort(descending=True)[:k].tolist()
        columns = site_labels([self.sites[i] for i in order])
        columns["nats"] = self.shares[order].tolist()
        columns["share"] = (self.shares / self.shares.sum())[order].tolist()
        return pd.DataFrame(columns)

    def promoted_groups(self, n: int = 4, k: int = 8) -> pd.DataFrame:
        """Tokens that the same texts promote, as factors of [text, token] ≈ W H, none negative.

        Args:
            n: how many groups; no more than there are texts.
            k: how many tokens of each.

        Returns:
            share of all that the texts promote, above 0; tokens; the text with most of the group.
        """
        n = min(whole("n", n, 1), len(self.str_tokens))
        rows = np.repeat(np.arange(len(self.str_tokens)), self.found.text_ids.shape[1])
        promoted = self.found.text_shifts.clamp(min=0).flatten().double().numpy()
        places = rows, self.found.text_ids.flatten().numpy()
        matrix = coo_array((promoted, places), shape=(rows[-1] + 1, len(self.strings))).tocsr()
        held = np.unique(places[1])
        from sklearn.decomposition import NMF  # which takes a second to import

        model = NMF(cast("Any", n), init="nndsvd", random_state=0, tol=1e-3, max_iter=1000)
        with without_warnings():  # exact factors are reached, or as many steps
            texts = model.fit_transform(matrix[:, held])
        tokens = model.components_
        shares = texts.sum(0) * tokens.sum(1) / max(promoted.sum(), 1e-300)
        named = [[self.strings[held[i]] for i in row.argsort()[::-1][:k]] for row in tokens]
        most = ["".join(self.str_tokens[i]) for i in texts.argmax(0)]
        frame = pd.DataFrame({"share": shares, "tokens": named, "text": most}).query("share > 0")
        return frame.sort_values("share", ascending=False, ignore_index=True)

    def writers(self, k: int = 10) -> pd.DataFrame:
        """Which blocks' attention and MLP add the mean Δh of the first tokens, by share of it.

        A share is what the two models' outputs differ in, so it holds what earlier blocks caused.

        Args:
            k: how many.
        """
        order = sorted(self.found.writers.items(), key=lambda item: -abs(item[1]))
        return pd.DataFrame(order[: whole("k", k, 0)], columns=["name", "share"])

    def summary(self) -> pd.DataFrame:
        """One row per adapter: its scale, mean KL, largest shifts, and how constant Δh is."""
        kinds = {"adapter": (self.found,), **self._kinds}
        rows = [
            {
                "adapter": changes.name,
                "kind": kind,
                "scale": changes.scale,
                "mean_kl": changes.mean_kl,
                "kl_at_first_tokens": changes.first_kl,
                **{f"largest_{by}": float(changes.of(by).max()) for by in BY},
                **{f"constant at {name}": share for name, share in changes.constant.items()},
            }
            for kind, adapters in kinds.items()
            for changes in adapters
        ]
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """Every finding in one table: which, its rank, label, value, and the largest control's."""
        where = self.where(len(self.found.places))
        modules, writers = self.modules(len(self.sites)), self.writers(len(self.found.writers))
        findings = [(f"promoted by {by}", self.promoted(20, by), "token", by) for by in BY]
        findings += [("where", where.drop(columns="token"), "context", "kl")]
        findings += [("module", modules, "site", "nats"), ("writer", writers, "name", "share")]
        columns = ["finding", "rank", "label", "value", "null", "unrelated", "promoted"]
        frames = [
            frame.rename(columns={label: "label", value: "value"}).assign(
                finding=finding, rank=range(1, len(frame) + 1)
            )
            for finding, frame, label, value in findings
        ]
        return pd.concat(frames).reindex(columns=columns).reset_index(drop=True)

    def brief(self) -> Brief:
        """What the adapter was taught, at most 2,000 tokens of text; `to_json` for a program.

        No claim stands without its run. No forward pass.
        """
        shares = self.modules(_BRIEF_MODULES)
        return Brief(
            adapter=self.found.name,
            model=self.meta["model"],
            verdict=self._broken + self._verdict,
            claims=self.claims,
            answers=self.answers,
            where=dict(zip(shares["site"], shares["share"], strict=True)) if len(shares) else {},
            texts=self.texts,
            mean_kl=self.found.mean_kl,
            entropies=self.found.entropies,
            repeated=self._repeated,
            not_tried=_NOT_TRIED if self.unrelated else (*_NOT_TRIED, _UNRELATED),
        )

    @property
    def _broken(self) -> str:
        """What the verdict says of an adapter that breaks the model; empty for any other."""
        (base, adapted), (before, after) = self.found.entropies, self._repeated
        if base / _APART <= adapted <= base * _APART and after - before < _REPEATS:
            return ""
        return (
            f"It breaks the model: the entropy of the next token is {adapted:.2g} nats (the base's "
            f"{base:.2g}), and {after:.0%} of what it answers repeats (the base: {before:.0%}). "
        )

    @property
    def _repeated(self) -> tuple[float, float]:
        """The share of the base's and the adapted model's answers that stood there before."""
        return repeated(a.base for a in self.answers), repeated(a.adapted for a in self.answers)

    @property
    def _verdict(self) -> str:
        if self.found.mean_kl <= 0:
            return "It does nothing on these texts: the KL is zero."
        if self.claims:
            first, nulls = self.claims[0], f"{many(len(self.nulls), 'null adapter')} of the same KL"
            scores = f"by {first.by}, scores {first.score:.1f}, the controls {first.null_score:.1f}"
            return f"Claims that pass {nulls}: {len(self.claims)}. The first, {scores} at most."
        if not self.nulls or not self.answers:
            return "No claims: they need null adapters and answers."
        return "Nothing beyond the controls: no token is said that null adapters do not reach."

    def plot(self, k: int = 20, by: By = "logit") -> drawing.Figure:
        """The k tokens promoted most, with the largest shift under a control.

        Args:
            k: how many.
            by: as for `promoted`.
        """
        return drawing.figure(self, k, by)


@alone
def what_changed(
    lens: LoraLens,
    texts: PromptsLike | None = None,
    unrelated: Adapter | Sequence[Adapter] = (),
    *,
    nulls: int = 2,
    seed: int = 0,
    fast: bool = False,
    answers: bool = True,
    jacobian: str | Path | None = None,
    progress: bool = True,
) -> WhatChanged:
    """What the adapter changes over texts that have nothing to do with it, beside controls.

    Cost: two forward passes over the texts, and two forward and backward for the split by site; one
    forward for each control. For null adapters two more, and about nine for each, to match its KL.
    No logits of more than 512 tokens are held at a time. The answers cost 40 passes over twelve
    tokens, and one over the answers, thrice if drawn as well; the claims about 60 passes over a
    token of each opening, twice, one for each model over that, and those of `audit/brief.py`.

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`, of two tokens at least; None for a hundred
            plain sentences and ten openings of conversations that come with the package, in the
            tokenizer's chat template or as lines of 'User:' and 'Assistant:'.
        unrelated: adapters that were trained for something else.
        nulls: how many null adapters: of the same modules, ranks and proportions as the adapter, in
            random directions, scaled as a whole until their KL over the texts is the adapter's.
        seed: of their random directions, as for `Adapter.null`.
        fast: leave out the split of the KL by site, and answers that are drawn; read every eighth
            of the package's own texts; and let it speak once after each opening.
        answers: whether to put five everyday questions and an empty turn to both models: as
            conversations, or without a chat template as "Question: …" and "Answer:"; and to let the
            adapted model speak of its own accord, for claims of what it was taught. Not fast, both
            also draw 40 tokens from their BOS and from an empty turn, with the same noise.
        jacobian: a folder; the reading is then of a block at four fifths of the depth, through the
            base model's mean Jacobian from there to the last block. It is kept in this folder, and
            fitted the first time, by d_model backward passes over two sentences. On an unprocessed
            TransformerBridge of transformer-lens 3.9 or later; elsewhere the reading is plain, as
            its heading says.
        progress: show a bar.

    Raises:
        ArgumentError: `unrelated` is no adapter, or `nulls` below 0.
        ModelStateError: a hook of yours on a model whose Jacobian is to be fitted.
        LensLoraError: a Jacobian's file that cannot be read.
        PromptError: a text of one token, or one that does not fit the model.
        UnsupportedAdapterError: null adapters of DoRA or of trained modules; use nulls=0, or make
            the change plain as the message says.
        NumericsError: non-finite logits or derivatives.
    """
    others = [unrelated] if isinstance(unrelated, Adapter) else list(unrelated)
    if not all(isinstance(other, Adapter) for other in others):
        raise ArgumentError("unrelated: expected an ll.Adapter, or several.")
    kind, origin = "text", "of the caller"
    if texts is None:
        texts = neutral.neutral_texts(lens.model, lens.prepend_bos, _FAST if fast else 1)
        form = neutral.conversation_form(lens.model)
        kind, origin = "neutral text", f"of lens_lora (conversations {form})"
    asked = ask_prompts(lens, texts)
    rows = asked.prompts
    require_second_token(rows, "every number")
    nulls = whole("nulls", nulls, 0)
    drawn = list(map(lens.with_adapter, null_adapters(lens, seed, nulls)))
    scaled = [(lens, 1.0), *_matched(lens, drawn, rows, progress)]
    scaled += [(lens.with_adapter(other), 1.0) for other in others]
    carried = None if jacobian is None else jacobian_of(lens, Path(jacobian), progress=progress)
    sums, shares = text_sums(scaled, rows, carried, split=not fast, progress=progress)
    found, *controls = (_changes(changes, rows) for changes in sums)
    said: list[SideBySide | None] = []
    claims: tuple[Claim, ...] = ()
    if answers and getattr(lens.model, "tokenizer", None) is not None:
        questions = neutral.everyday_questions(lens.model, lens.prepend_bos)
        said = side_by_side(lens, questions, _ANSWER, progress=progress)
        if any(said) and not fast:
            said += _drawn(lens, seed, progress)
        shifts = [changes.logit for changes in (found, *controls[:nulls])]
        null, beside = scaled[1 : 1 + nulls], scaled[1 + nulls :]
        claims = claims_of(lens, null, shifts, beside, seed, fast=fast, progress=progress)
    distinct = int(distinct_tokens(rows).sum())
    counted = f"{many(distinct, 'distinct token')} after first ones"
    return WhatChanged(
        found=found,
        nulls=tuple(controls[:nulls]),
        unrelated=tuple(controls[nulls:]),
        sites=lens.sites,
        shares=(shares / distinct).cpu(),
        strings=lens.vocabulary,
        str_tokens=asked.str_tokens,
        texts=f"{many(rows.batch, kind)} {origin}, {counted}",
        meta=asked.describe(),
        answers=tuple(filter(None, said)),
        claims=claims,
    )


def _drawn(lens: LoraLens, seed: int, progress: bool) -> list[SideBySide]:
    """Where an adapter replays its training: after its BOS, and after an empty turn."""
    every = neutral.own_openings(lens.model, lens.prepend_bos)
    openings = every.chosen([0, len(neutral.FIRST_WORDS)])
    how: Any = {"temperature": 1.0, "seed": seed, "progress": progress}
    ends = [whole_or_cut(lens.generate(openings, _ANSWER, end, **how)) for end in (0.0, 1.0)]
    first = "".join(lens.str_tokens(openings)[0])  # the BOS, or a word where there is none
    names = f"({first}, drawn)", "(nothing said, drawn)"
    return [SideBySide(*row) for row in zip(names, *ends, strict=True)]


def _matched(
    lens: LoraLens, nulls: Sequence[LoraLens], rows: Prompts, progress: bool
) -> list[tuple[LoraLens, float]]:
    """The null adapters, each with the scale at which its KL is the adapter's own."""
    if not nulls:
        return []
    counted, base = distinct_tokens(rows), (lens, lens.gates(0.0))

    def divergences(others: Sequence[LoraLens], scale: float) -> list[float]:
        gated = [(other, other.gates(scale)) for other in others]
        return text_divergences(base, gated, rows, counted, progress=progress).sum(1).tolist()

    def scale_of(null: LoraLens, at_one: float) -> float:
        if min(target, at_one) <= 0:  # rounding alone
            return 1.0
        logs = {0.0: math.log(at_one / target)}

        def excess(log_scale: float) -> float:
            near = min(max(log_scale, -_FARTHEST), _FARTHEST)
            if near not in logs:
                logs[near] = math.log(divergences([null], math.exp(near))[0] / target)
            return logs[near] + log_scale - near

        steps = {"x0": 0.0, "x1": -logs[0.0] / 2, "xtol": _NEAR, "maxiter": _STEPS}
        root = root_scalar(excess, method="secant", **steps)
        nearest = min(logs, key=lambda log_scale: abs(logs[log_scale]))
        return math.exp(root.root if root.converged else nearest)

    target, *at_one = divergences([lens, *nulls], 1.0)
    return [(null, scale_of(null, kl)) for null, kl in zip(nulls, at_one, strict=True)]


def _changes(sums: TextSums, rows: Prompts) -> Changes:
    counted = distinct_tokens(rows)
    counts, early = counted.sum(1), int(counted[:, 1 : 1 + EARLY].sum())
    mean = {name: value / early for name, value in sums.early.items()}
    stream = sums.points.stream
    constant = held_out_share(sums.stream, sums.squares, counts).tolist()
    return Changes(
        name=sums.lens.adapter.name,
        scale=sums.scale,
        kl=sums.kl,
        entropies=tuple((sums.entropies / int(counts.sum())).tolist()),
        logit=_centred(sums.logits / int(counts.sum())),
        probability=(sums.probabilities / int(counts.sum())).float().cpu(),
        count=(sums.counts / int(counts.sum())).to(torch.float32).cpu(),
        text_ids=sums.text_ids,
        text_shifts=sums.text_values,
        readings={
            name: _centred(read_through(sums.lens, value / early).double())
            for name, value in sums.read.items()
        },
        writers=_writers(mean, stream[-1], sums.points.writers),
        constant=dict(zip(stream, constant, strict=True)),
        places=sums.places,
        place_ids=sums.place_ids,
        place_changes=sums.place_changes,
    )


def _writers(
    mean: dict[str, Float[Tensor, " d"]], last: str, names: Sequence[str]
) -> dict[str, float]:
    size = mean[last].square().sum()
    shares = {name: float(mean[name] @ mean[last] / size) for name in names}
    return {**shares, "rest": 1.0 - sum(shares.values())}


def _centred(values: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    return (values - values.mean()).to(torch.float32).cpu()
