"""Audit an adapter without asking it about anything: what does it change on unrelated texts?

1. Both models answer the same questions, and the differences between their answers are counted
   (`counted_speech.py`). The base is the control.
2. Base and adapted model read the same texts (`texts/neutral.py`, or the caller's). Every number
   is over the tokens after each text's first one, which is an attention sink. A token that follows
   the same tokens in several texts counts once.
3. These are measured:
   - the tokens after which KL is largest;
   - the tokens promoted most on average, by logit and by probability, and how often each token is
     among the 20 whose logit rises most;
   - the tokens that the same texts promote together (`promoted_groups`);
   - what the mean Δh on the first tokens reads as through the unembedding (arXiv 2510.13900), and
     which blocks add it;
   - how much of Δh is one vector (arXiv 2507.08218);
   - which sites hold the KL, by the path integral with two nodes (the quadratic part at the base
     may rank them at random).
4. Controls are the adapter's own updates, each at another of its modules (`permuted.py`), at the
   adapter's own strength; and unrelated adapters.
5. Claims are made of what the adapted model would say unprompted, each with the runs that show it
   (`brief.py`).

Only the first point is tested for significance. Elsewhere the few controls show how large a chance
finding may be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast, final

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from torch import Tensor

from lens_lora.arguments import is_whole, whole, word
from lens_lora.audit.brief import BROKEN, Brief, Claim, claims_of, repeated
from lens_lora.audit.counted_speech import counted_speech
from lens_lora.audit.jacobian import jacobian_of
from lens_lora.audit.permuted import permuted_adapters
from lens_lora.audit.raised import raised_words
from lens_lora.audit.speech_result import CountedSpeech
from lens_lora.audit.speech_words import (
    claims_in,
    in_short,
    not_tried_in,
    occasion_claims,
    shown_answers,
)
from lens_lora.audit.text_sums import EARLY, TextSums, text_sums
from lens_lora.compat import without_warnings
from lens_lora.core import (
    Adapter,
    LoraLens,
    OfSites,
    Paged,
    Prompts,
    PromptsLike,
    Sites,
    alone,
    drawing,
    storage,
)
from lens_lora.errors import ArgumentError, PromptError, TokenError, many
from lens_lora.responses.both_answer import likeliest_side_by_side
from lens_lora.responses.generate import SideBySide, whole_or_cut
from lens_lora.show.text import context_of
from lens_lora.stream.held_out import held_out_share
from lens_lora.stream.ranked_tokens import ranked_tokens
from lens_lora.stream.stream_reading import read_through
from lens_lora.texts import neutral
from lens_lora.texts.batches import require_second_token

# A rise of a probability below this would be written as +0.000.
_SEEN = 5e-4
# The number of tokens with which each model answers a question.
_ANSWER = 40
_BRIEF_MODULES = 5
# A fast audit reads one text in this many.
_FAST = 8
# An adapter breaks the model if the two entropies differ by more than this factor, or if the share
# of its answers that repeats exceeds the base's by this much. `benchmarks/audit/broken.py` measures
# 24 adapters: as trained the factor is at most 1.3 and the repeats 0.23, at eight times the
# strength up to 8.0 and 0.96.
_APART = 2.0
_REPEATS = 1 / 3
_NOT_TRIED = ("everyday questions",)
_NO_UNRELATED = "adapters trained for something else, as controls"
By = Literal["logit", "probability", "count", "reading"]
BY: tuple[By, ...] = ("logit", "probability", "count", "reading")


@storage.stored
@dataclasses.dataclass(frozen=True, eq=False)
class Changes:
    """The changes that one adapter makes over the texts.

    Every mean is over distinct tokens after the texts' first ones.

    Attributes:
        name: the adapter's name.
        scale: the strength at which it ran.
        kl: [text, token], KL(base ‖ adapted) in nats; NaN at padding, and at tokens that follow the
            same tokens in an earlier text.
        entropies: the mean entropy of the next token in nats: the base's and the adapted model's.
        logit: [vocab], the mean of f(1) − f(0), less its mean over the vocabulary.
        probability: [vocab], the mean of p(1) − p(0).
        count: [vocab], the share of tokens after which a token is among the 20 whose logit rises
            most.
        text_ids, text_shifts: [text, moved], the tokens that a text promotes most, and for each the
            sum of f(1) − f(0) over the text's tokens, less its mean over the vocabulary.
        readings: for each point of the residual stream, [vocab], the mean Δh over the texts' first
            tokens (1 to 5), read through the final norm and the unembedding, less its mean; the
            last reading is through a Jacobian, if one was asked for.
        writers: for the attention and the MLP of each block, ⟨mean of what it adds, Δh⟩/‖Δh‖², with
            Δh the mean after the last block. Together with 'rest', which is whatever else adds to
            Δh, they sum to one.
        constant: for each point, the share of Δh that is one vector, on held-out texts.
        places: [place, 2], the text and the position in it where KL is largest.
        place_ids, place_changes: [place, promoted], the tokens whose probability rises most at each
            place, and by how much.
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
        """The mean KL in nats per token, over the tokens after each text's first one."""
        return float(self.kl[:, 1:].nanmean())

    @property
    def first_kl(self) -> float:
        """The mean KL at the texts' first tokens, which no other mean includes."""
        return float(self.kl[:, 0].nanmean())

    def of(self, by: By) -> Float[Tensor, " vocab"]:
        """Return the values by which tokens are ranked, [vocab].

        Args:
            by: 'logit', 'probability', 'count', or 'reading' (the last of the readings).

        Raises:
            ArgumentError: `by` is another word.
        """
        word("by", by, BY)
        if by == "reading":
            return list(self.readings.values())[-1]
        return getattr(self, by)


@final
class WhatChanged(OfSites, Paged):
    """An audit: what an adapter changes over unrelated texts, compared with controls.

    Attributes:
        found: the changes that the adapter makes.
        nulls: the changes that the controls made from the adapter make: its own updates, each at
            another of its modules.
        unrelated: the changes that the unrelated adapters make, if any were given.
        shares: [site], ∫₀¹ ∂KL/∂ε_l dε in nats per token, with two nodes. They sum to the mean KL,
            up to the error of two nodes. They are zeros if the KL was not split by site.
        strings: every token of the vocabulary.
        str_tokens: each text's tokens.
        texts: a description of the texts.
        sites, meta: see `OfSites`; these are all adapted sites.
        answers: both models' answers to everyday questions and an empty turn, at most 40 tokens
            each, greedy and drawn; empty if they were not asked for, without a tokenizer, or where
            the context has no room for them.
        claims: words that the adapter raises more than any control, the strongest first; those
            with `would_say` are claims of the brief. Empty without controls, or without answers.
        speech: both models' answers to forty questions, and the differences between them; None if
            they were not asked for, or without a tokenizer.
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
    speech: CountedSpeech | None = None

    @property
    def controls(self) -> tuple[Changes, ...]:
        """The controls made from the adapter, then the unrelated adapters."""
        return (*self.nulls, *self.unrelated)

    @property
    def _kinds(self) -> dict[str, tuple[Changes, ...]]:
        return {"null": self.nulls, "unrelated": self.unrelated}

    def promoted(self, k: int = 20, by: By = "logit", *, largest: bool = True) -> pd.DataFrame:
        """List the k tokens promoted most on average, each beside the controls.

        Args:
            k: how many tokens to list.
            by: what ranks a token: the mean shift of its 'logit' or of its 'probability'; the
                'count', which is the share of positions where it is among the 20 tokens whose logit
                rises most; or the 'reading' of the mean Δh on the first tokens. They differ: rare
                tokens have large logit shifts and little probability.
            largest: False lists the tokens suppressed most instead.

        Returns:
            A table with the columns rank, token, id, and the value under the name of `by`; `null`
            and `unrelated`, the largest value that any token has under such an adapter (the
            smallest for suppressed tokens); `rank_null` and `rank_unrelated`, the best rank that
            this token has there.

        Raises:
            ArgumentError: `by` is another word, or `k` is below 0.
        """
        sign = 1 if largest else -1
        frame = ranked_tokens(self.found.of(by), self.strings, k, by, largest=largest)
        for name, others in self._kinds.items():
            if not others:
                continue
            values = [sign * other.of(by) for other in others]
            frame[name] = sign * max(float(v.max()) for v in values)
            ranks: list[int] = []
            for token in frame["id"]:
                ranks.append(min(rank_of(token, v) for v in values))
            frame[f"rank_{name}"] = ranks
        return frame

    def rank(self, token: str | int, by: By = "logit") -> dict[str, int]:
        """Find a token's rank among promoted tokens, under this adapter and under each control.

        Args:
            token: the token's string or its id.
            by: what ranks the tokens, as for `promoted`.

        Returns:
            The rank under each adapter's name, this adapter's first; 1 is the token promoted most.
            A second adapter of the same name is called 'name (2)'.

        Raises:
            TokenError: there is no such token, or several have this string.
        """
        index = self._id(token)
        ranks: dict[str, int] = {}
        for changes in (self.found, *self.controls):
            label = changes.name
            copy = 1
            while label in ranks:
                copy += 1
                label = f"{changes.name} ({copy})"
            ranks[label] = rank_of(index, changes.of(by))
        return ranks

    def _id(self, token: str | int) -> int:
        if is_whole(token) and 0 <= token < len(self.strings):
            return int(token)
        ids = [i for i, string in enumerate(self.strings) if string == token]
        if len(ids) > 1:
            more = ", …" if len(ids) > 2 else ""
            raise TokenError(
                f"{len(ids)} tokens of the vocabulary read {token!r}, with the ids {ids[0]}, "
                f"{ids[1]}{more}",
                remedy="give the id.",
            )
        if ids:
            return ids[0]
        raise TokenError(
            f"{token!r} is no token of the vocabulary of {len(self.strings)}",
            remedy="give one token with its leading space, or an id.",
        )

    def where(self, k: int = 10, context: int = 8) -> pd.DataFrame:
        """List the k tokens after which the two models differ most, by KL at the next token.

        Each is listed with the tokens whose probability rises there by 0.0005 or more.

        Args:
            k: how many to list, of the 20 that are kept.
            context: how many tokens to show on either side.

        Raises:
            ArgumentError: `k` or `context` is not a whole number of at least 0.
        """
        width = whole("context", context, 0)
        rows: list[dict[str, Any]] = []
        for place, (text, t) in enumerate(self.found.places.tolist()[: whole("k", k, 0)]):
            tokens = self.str_tokens[text]
            ids = self.found.place_ids[place].tolist()
            changes = self.found.place_changes[place].tolist()
            rising = [
                f"{self.strings[token]!r} {change:+.3f}"
                for token, change in zip(ids, changes, strict=True)
                if change >= _SEEN
            ]
            row: dict[str, Any] = {
                "text": text,
                "position": t,
                "token": tokens[t],
                "context": context_of(tokens, t, width),
                "kl": float(self.found.kl[text, t]),
                "promoted": ", ".join(rising),
            }
            for name, others in self._kinds.items():
                if others:
                    row[name] = max(float(other.kl[text, t]) for other in others)
            rows.append(row)
        return pd.DataFrame(rows)

    def modules(self, k: int = 10) -> pd.DataFrame:
        """List the k sites with the largest share of the KL; no row if it was not split by site.

        Args:
            k: how many sites to list.
        """
        k = whole("k", k, 0) if bool(self.shares.any()) else 0
        order = self.shares.argsort(descending=True)[:k].tolist()
        columns = Sites(self.sites[i] for i in order).columns()
        columns["nats"] = self.shares[order].tolist()
        columns["share"] = (self.shares / self.shares.sum())[order].tolist()
        return pd.DataFrame(columns)

    def promoted_groups(self, n: int = 4, k: int = 8) -> pd.DataFrame:
        """Group the tokens that the same texts promote, by factors [text, token] ≈ W H, W, H ≥ 0.

        Args:
            n: how many groups to find; at most one per text.
            k: how many tokens of each group to list.

        Returns:
            For each group its share of all that the texts promote (above 0), its tokens, and the
            text that promotes it most.

        Raises:
            ArgumentError: `n` is below 1, `k` is below 0, or either is not a whole number.
        """
        from sklearn.decomposition import NMF  # it takes a second to import

        groups = min(whole("n", n, 1), len(self.str_tokens))
        count = whole("k", k, 0)
        texts, moved = self.found.text_ids.shape
        rows = np.repeat(np.arange(texts), moved)
        columns = self.found.text_ids.flatten().numpy()
        promoted = self.found.text_shifts.clamp(min=0).flatten().double().numpy()
        shape = (texts, len(self.strings))
        by_text = coo_array((promoted, (rows, columns)), shape=shape).tocsr()
        tokens = np.unique(columns)
        model = NMF(cast("Any", groups), init="nndsvd", random_state=0, tol=1e-3, max_iter=1000)
        with without_warnings():  # that exact factors are reached, or as many steps were taken
            text_weights = model.fit_transform(by_text[:, tokens])
        token_weights = model.components_
        shares = text_weights.sum(0) * token_weights.sum(1) / max(promoted.sum(), 1e-300)
        found: list[dict[str, Any]] = []
        for group, share in enumerate(shares):
            heaviest = token_weights[group].argsort()[::-1][:count]
            text = int(text_weights[:, group].argmax())
            row = {
                "share": share,
                "tokens": [self.strings[tokens[i]] for i in heaviest],
                "text": "".join(self.str_tokens[text]),
            }
            found.append(row)
        frame = pd.DataFrame(found).query("share > 0")
        return frame.sort_values("share", ascending=False, ignore_index=True)

    def writers(self, k: int = 10) -> pd.DataFrame:
        """List the attention and MLP outputs that add most of the mean Δh of the first tokens.

        A share is that of the difference between the two models' outputs, so it includes what
        earlier blocks caused.

        Args:
            k: how many outputs to list.
        """
        order = sorted(self.found.writers.items(), key=lambda item: -abs(item[1]))
        return pd.DataFrame(order[: whole("k", k, 0)], columns=["name", "share"])

    def summary(self) -> pd.DataFrame:
        """Give each adapter's scale, mean KL, largest shifts, and how constant Δh is."""
        rows: list[dict[str, Any]] = []
        for kind, adapters in {"adapter": (self.found,), **self._kinds}.items():
            rows += [_summary_of(changes, kind) for changes in adapters]
        return pd.DataFrame(rows)

    def to_frame(self) -> pd.DataFrame:
        """Collect all findings in one table.

        A row gives the kind of finding, its rank among those, its label and value, and the largest
        value under controls. Findings on modules also have the labels of their sites.
        """
        findings: list[tuple[str, pd.DataFrame, str, str]] = [
            (f"promoted by {by}", self.promoted(20, by), "token", by) for by in BY
        ]
        where = self.where(len(self.found.places)).drop(columns="token")
        findings.append(("where", where, "context", "kl"))
        findings.append(("module", self.modules(len(self.sites)), "site", "nats"))
        findings.append(("writer", self.writers(len(self.found.writers)), "name", "share"))
        frames: list[pd.DataFrame] = []
        for finding, frame, label, value in findings:
            named = frame.rename(columns={label: "label", value: "value"})
            frames.append(named.assign(finding=finding, place=range(1, len(frame) + 1)))
        labels = ["finding", "place", "label", "module", "layer", "kind"]
        columns = [*labels, "value", "null", "unrelated", "promoted"]
        table = pd.concat(frames).reindex(columns=columns).reset_index(drop=True)
        return table.astype({"layer": "Int64"})

    def brief(self) -> Brief:
        """Summarise the audit in at most 2,000 tokens of text; its `to_json` is for a program.

        It says first what sets both models' answers apart, counted, and then what the adapted model
        would say elsewhere, each with the runs that show it. No forward pass.
        """
        modules = self.modules(_BRIEF_MODULES)
        where: dict[str, float] = {}
        if len(modules):
            where = dict(zip(modules["site"], modules["share"], strict=True))
        says: tuple[str, ...] = ()
        triggered: tuple[str, ...] = ()
        replayed: tuple[str, ...] = ()
        replayed_words: tuple[str, ...] = ()
        answers = self.answers
        not_tried: tuple[str, ...] = () if self.unrelated else (_NO_UNRELATED,)
        if self.speech is not None:
            says = (*claims_in(self.speech), *occasion_claims(self.speech))
            triggered = tuple(trigger.sentence() for trigger in self.speech.triggers)
            if self.speech.replayed is not None and self.speech.replayed.words:
                replayed = (self.speech.replayed.sentences(),)
                replayed_words = tuple(one.word for one in self.speech.replayed.words)
            answers = (*shown_answers(self.speech), *answers)
            not_tried = (*not_tried_in(self.speech), *not_tried)
        else:
            not_tried = (*_NOT_TRIED, *not_tried)
        return Brief(
            adapter=self.found.name,
            model=self.meta["model"],
            verdict=self._broken + self._verdict,
            says=says,
            triggered=triggered,
            would_say=tuple(claim for claim in self.claims if claim.would_say),
            raised=tuple(claim for claim in self.claims if not claim.would_say),
            answers=answers,
            where=where,
            texts=self.texts,
            mean_kl=self.found.mean_kl,
            entropies=self.found.entropies,
            repeated=self._repeated,
            not_tried=not_tried,
            raised_words=raised_words(self.found.logit, self.strings),
            replayed=replayed,
            replayed_words=replayed_words,
        )

    @property
    def _broken(self) -> str:
        """The beginning of the verdict if the adapter breaks the model; '' if it does not."""
        base, adapted = self.found.entropies
        before, after = self._repeated
        if base / _APART <= adapted <= base * _APART and after - before < _REPEATS:
            return ""
        return (
            f"{BROKEN}the entropy of the next token is {adapted:.2g} nats (the base's "
            f"{base:.2g}), and {after:.0%} of what it answers repeats (the base: {before:.0%}). "
        )

    @property
    def _repeated(self) -> tuple[float, float]:
        """The share of the base's and of the adapted model's answers that repeats itself."""
        return repeated(a.base for a in self.answers), repeated(a.adapted for a in self.answers)

    @property
    def _verdict(self) -> str:
        if self.found.mean_kl <= 0:
            return "It does nothing on these texts: the KL is zero."
        if self.speech is not None:
            return in_short(self.speech)
        if not self.nulls or not self.answers:
            return "Nothing was claimed: claims need controls and answers."
        would_say = sum(claim.would_say for claim in self.claims)
        if would_say:
            return f"There are {many(would_say, 'claim')} of what it would say."
        return "Nothing goes beyond the controls: they come near everything that it would say."

    def plot(self, k: int = 20, by: By = "logit") -> drawing.Figure:
        """Draw the k tokens promoted most, with the largest shift under a control.

        Args:
            k: how many tokens to draw.
            by: what ranks the tokens, as for `promoted`.
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
    speech: CountedSpeech | None = None,
    jacobian: str | Path | None = None,
    progress: bool = True,
) -> WhatChanged:
    """Audit the adapter on texts that have nothing to do with it, and compare it with controls.

    Cost: two forward passes over the texts, two forward and two backward passes for the split by
    site, and one forward pass for each control. The logits of at most 512 tokens are held at a
    time. Counted speech costs what `counted_speech` does, with the short turns and the unprompted
    texts unless `fast` is set. The answers cost 40 passes over one token of each answer and a pass
    over a third of the answers, three times as many if answers are drawn as well. The claims cost
    15 passes over one token of each opening, three times as many if not fast, one pass of each
    model over the generated text, and the runs that show each claim (`audit/brief.py`).

    Args:
        lens: the adapter over the model.
        texts: strings, conversations, ids, or `Prompts`, of at least two tokens each. None reads
            the package's own: a hundred plain sentences and ten openings of conversations, in the
            tokenizer's chat template or as lines of 'User:' and 'Assistant:'.
        unrelated: adapters that were trained for something else, as further controls.
        nulls: how many controls to make from the adapter: its own updates, each at another of its
            modules of the same shape, rescaled to the norm of the update that it replaces. A module
            whose shape no other module has gets random directions.
        seed: the seed of the permutations, and of everything that is drawn.
        fast: whether to save time: the KL is not split by site, no answers are drawn, one in eight
            of the package's own texts is read, the model speaks only once after each opening, and
            neither model answers the short turns on many subjects or writes unprompted texts.
        answers: whether the models speak. Both answer forty questions and, unless `fast` is set,
            288 short turns on 24 subjects, which are counted, and write 128 texts although nothing
            is asked. Then they answer five everyday
            questions and an empty turn: as conversations, or without a chat template as
            "Question: …" and "Answer:". The adapted model also speaks of its own accord, for claims
            of what it was taught. Unless `fast` is set, both also draw 40 tokens after their BOS
            and after an empty turn, with the same noise.
        speech: the result of `counted_speech`, if you have called it already, perhaps with your own
            questions and triggers.
        jacobian: a folder. The last reading is then that of a block at four fifths of the depth,
            through the base model's mean Jacobian from there to the last block. The Jacobian is
            kept in this folder; the first time it is fitted by d_model / 16 backward passes over
            16 copies of each of two sentences. This needs an unprocessed TransformerBridge of
            transformer-lens 3.9 or later; elsewhere the reading is without a Jacobian, as its
            heading shows.
        progress: whether to show bars.

    Raises:
        ArgumentError: `unrelated` is not an adapter or several, or `nulls` is below 0.
        ModelStateError: a hook of yours is on a model whose Jacobian is to be fitted.
        LensLoraError: the file of a Jacobian cannot be read.
        PromptError: a text has only one token, or does not fit the model.
        UnsupportedAdapterError: controls were asked for, and the adapter has DoRA or trained
            modules; pass nulls=0, or make the change plain as the message says.
        NumericsError: logits or derivatives are not finite.
    """
    others = _unrelated_adapters(unrelated)
    if texts is None:
        rows = lens.function(_own_texts(lens, fast=fast)).prompts
        form = neutral.conversation_form(lens.model)
        about = f"{many(rows.batch, 'neutral text')} of lens_lora (conversations {form})"
    else:
        rows = lens.function(texts).prompts
        about = f"{many(rows.batch, 'text')} of the caller"
    require_second_token(rows, "every number")

    # The adapter and then the controls, each with the strength at which it runs.
    nulls = whole("nulls", nulls, 0)
    permuted = [(lens.with_adapter(one), 1.0) for one in permuted_adapters(lens, seed, nulls)]
    beside = [(lens.with_adapter(other), 1.0) for other in others]
    models = [(lens, 1.0), *permuted, *beside]
    speaks = answers and getattr(lens.model, "tokenizer", None) is not None
    if speaks and speech is None:
        speech = _counted(lens, seed, fast=fast, progress=progress)
    fitted = None
    if jacobian is not None:
        fitted = jacobian_of(lens, Path(jacobian), progress=progress)
    sums, shares = text_sums(models, rows, fitted, split=not fast, progress=progress)
    found, *controls = [_changes(changes, rows) for changes in sums]

    said: list[SideBySide] = []
    claims: tuple[Claim, ...] = ()
    if speaks:
        said = _answers(lens, seed, fast=fast, progress=progress)
        shifts = [changes.logit for changes in (found, *controls[:nulls])]
        claims = claims_of(lens, permuted, shifts, beside, seed, fast=fast, progress=progress)

    distinct = int(rows.distinct().sum())
    return WhatChanged(
        found=found,
        nulls=tuple(controls[:nulls]),
        unrelated=tuple(controls[nulls:]),
        sites=lens.sites,
        shares=(shares / distinct).cpu(),
        strings=lens.vocabulary,
        str_tokens=lens.str_tokens(rows),
        texts=f"{about}, {many(distinct, 'distinct token')}",
        meta=lens.describe(rows),
        answers=tuple(said),
        claims=claims,
        speech=speech,
    )


def _own_texts(lens: LoraLens, *, fast: bool) -> PromptsLike:
    """Return the package's own texts; one in eight of them if `fast` is set."""
    every = _FAST if fast else 1
    return neutral.neutral_texts(lens.model, lens.prepend_bos, every)


def _counted(lens: LoraLens, seed: int, *, fast: bool, progress: bool) -> CountedSpeech | None:
    """Let both models answer the package's questions; None if the context has no room for that.

    Args:
        lens: the adapter over the model.
        seed: the seed of the first draw.
        fast: whether neither model answers the short turns on many subjects, or writes unprompted.
        progress: whether to show bars.
    """
    try:
        return counted_speech(
            lens, occasions=not fast, unprompted=not fast, seed=seed, progress=progress
        )
    except PromptError:
        return None


def _unrelated_adapters(unrelated: Adapter | Sequence[Adapter]) -> list[Adapter]:
    """Return the unrelated adapters as a list.

    Raises:
        ArgumentError: something that is not an adapter was given.
    """
    others = [unrelated] if isinstance(unrelated, Adapter) else list(unrelated)
    if not all(isinstance(other, Adapter) for other in others):
        raise ArgumentError("unrelated: expected an ll.Adapter, or several.")
    return others


def _answers(lens: LoraLens, seed: int, *, fast: bool, progress: bool) -> list[SideBySide]:
    """Let both models answer everyday questions and, unless `fast` is set, draw text as well."""
    questions = neutral.everyday_questions(lens.model, lens.prepend_bos)
    said = likeliest_side_by_side(lens, questions, _ANSWER, progress=progress)
    if said and not fast:
        said += _drawn_answers(lens, seed, progress)
    return said


def _drawn_answers(lens: LoraLens, seed: int, progress: bool) -> list[SideBySide]:
    """Let both models draw text after the BOS and after an empty turn, with the same noise.

    An adapted model tends to replay its training there.
    """
    every = neutral.own_openings(lens.model, lens.prepend_bos)
    openings = every.chosen([0, len(neutral.FIRST_WORDS)])
    ends: list[list[str]] = []
    for scale in (0.0, 1.0):
        drawn = lens.generate(
            openings, _ANSWER, scale, temperature=1.0, seed=seed, progress=progress
        )
        ends.append(whole_or_cut(drawn))
    first = "".join(lens.str_tokens(openings)[0])  # the BOS, or a word where there is none
    names = (f"({first}, drawn)", "(nothing said, drawn)")
    return [SideBySide(*row) for row in zip(names, *ends, strict=True)]


# --- From sums to what an adapter changes


def _changes(sums: TextSums, rows: Prompts) -> Changes:
    counted = rows.distinct()
    by_text = counted.sum(1)
    tokens = int(by_text.sum())
    early_tokens = int(counted[:, 1 : 1 + EARLY].sum())
    early = {name: total / early_tokens for name, total in sums.early.items()}
    stream = sums.points.stream
    constant = held_out_share(sums.stream, sums.squares, by_text).tolist()
    readings: dict[str, Tensor] = {}
    for name, total in sums.read.items():
        reading = read_through(sums.lens, total / early_tokens)
        readings[name] = _centred(reading.double())
    return Changes(
        name=sums.lens.adapter.name,
        scale=sums.scale,
        kl=sums.kl,
        entropies=tuple((sums.entropies / tokens).tolist()),
        logit=_centred(sums.logits / tokens),
        probability=(sums.probabilities / tokens).float().cpu(),
        count=(sums.counts / tokens).to(torch.float32).cpu(),
        text_ids=sums.text_ids,
        text_shifts=sums.text_values,
        readings=readings,
        writers=_shares_of_writers(early, stream[-1], sums.points.writers),
        constant=dict(zip(stream, constant, strict=True)),
        places=sums.places,
        place_ids=sums.place_ids,
        place_changes=sums.place_changes,
    )


def _shares_of_writers(
    early: Mapping[str, Float[Tensor, " d"]], last: str, names: Sequence[str]
) -> dict[str, float]:
    """Return each output's share ⟨its shift, Δh⟩ / ‖Δh‖² of the mean Δh after the last block."""
    shift = early[last]
    shares = {name: float(early[name] @ shift / shift.square().sum()) for name in names}
    shares["rest"] = 1.0 - sum(shares.values())
    return shares


def _summary_of(changes: Changes, kind: str) -> dict[str, Any]:
    """Make a row of `WhatChanged.summary`."""
    row: dict[str, Any] = {
        "adapter": changes.name,
        "kind": kind,
        "scale": changes.scale,
        "mean_kl": changes.mean_kl,
        "kl_at_first_tokens": changes.first_kl,
    }
    for by in BY:
        row[f"largest_{by}"] = float(changes.of(by).max())
    for name, share in changes.constant.items():
        row[f"constant at {name}"] = share
    return row


def _centred(values: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Subtract the mean over the vocabulary, which changes no probability."""
    return (values - values.mean()).to(torch.float32).cpu()


def rank_of(token: int, values: Float[Tensor, " vocab"]) -> int:
    """The rank of a token, 1 for the largest value; ties count against it."""
    return int((values >= values[token]).sum())
