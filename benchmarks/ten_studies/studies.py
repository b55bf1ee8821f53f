"""Ten studies of the field in small: what lens_lora says, and what a second way says beside it.

    python -m benchmarks.ten_studies --out FOLDER    # trains what FOLDER lacks, measures, and
                                                     # writes docs/ten_studies.json and its page
    python -m benchmarks.ten_studies --table         # only writes docs/ten_studies.md

The base is the embedded model; `recipes.py` makes the adapters, of rank 4, in a few
minutes. Each study is a function, whose docstring has its question and an arXiv number. Its lines
are counted: those that call lens_lora, and those by hand, which compute something without it
(`lines`). Each number stands beside the same number from a second way: Hugging Face, PEFT and hooks
of torch (`by_hand.py`).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from transformers import PreTrainedModel

import lens_lora as ll
from benchmarks import marks
from benchmarks.ten_studies import recipes
from benchmarks.ten_studies.by_hand import ByHand, all_off, mean, removed, without

DOCS = Path(__file__).parents[2] / "docs"
NUMBERS = DOCS / "ten_studies.json"
PAGE = DOCS / "ten_studies.md"
TABLE = "ten studies"
EACH = "ten studies, one by one"
QUIET: dict[str, Any] = {"progress": False}


@dataclasses.dataclass(frozen=True)
class Words:
    """The texts that the studies ask about.

    Attributes:
        fact: prompts whose next token is `doc` for the trained fact, `pre` for the base's.
        answers: (doc, pre) of the fact.
        questions, styled, plain: everyday questions, and answers to them in two voices.
        forbidden, harmless: requests that are refused, and others.
        refused: (the first token of a refusal, that of an answer).
        sentences: (prompt, what follows) that the fact was trained on.
        others: the same of sentences that it was not trained on.
        neutral: texts about other things, as (beginning, rest).
    """

    fact: list[str]
    answers: tuple[str, str]
    questions: list[str]
    styled: list[str]
    plain: list[str]
    forbidden: list[str]
    harmless: list[str]
    refused: tuple[str, str]
    sentences: list[tuple[str, str]]
    others: list[tuple[str, str]]
    neutral: list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the studies are about.

    Attributes:
        base: the Hugging Face model, and its tokenizer.
        lens: over a hooked model of the base; each study puts its adapter in place.
        runs: of each recipe its runs, each the folders of its checkpoints in order.
        point: a hook point of the residual stream, behind the block of this Hugging Face path.
        autoencoder: fitted to the base's activations at the point.
        words: the texts.
    """

    base: PreTrainedModel
    tokenizer: Any
    lens: ll.LoraLens
    runs: dict[str, list[list[Path]]]
    point: str
    block: str
    autoencoder: recipes.Autoencoder
    words: Words

    def lens_of(self, name: str, seed: int = 0) -> ll.LoraLens:
        """A lens over the last checkpoint of a run."""
        return self.lens.with_adapter(ll.load_adapter(self.runs[name][seed][-1]))

    def by_hand(self, name: str, seed: int = 0) -> ByHand:
        """PEFT's model of the same adapter."""
        return ByHand(self.base, self.tokenizer, {name: self.runs[name][seed][-1]})


class Number(NamedTuple):
    """A number that was computed in two ways.

    Attributes:
        name: what it is.
        by_lens: its value by lens_lora.
        by_hand: its value by the second way.
    """

    name: str
    by_lens: float
    by_hand: float


class Found(NamedTuple):
    """What a study found.

    Attributes:
        sentence: the answer to its question.
        numbers: those that the answer rests on.
    """

    sentence: str
    numbers: list[Number]


# --- The studies


def persona(scene: Scene) -> Found:
    """Which module moves the answers along a persona's direction? | 2507.21509"""
    lens = scene.lens_of("persona")
    words = scene.words
    point = scene.point
    voices = (words.questions, words.styled), (words.questions, words.plain)
    direction = ll.contrast(lens, *voices, point, scale=0.0)
    said = lens.generate(words.questions, 8, **QUIET)
    moved = ll.activation_shift(lens, said, point, positions="response").project(direction)
    answers = lens.prompts(said.prompts, said)
    along = ll.Projection(direction, point, "response")
    likely = ll.first_order(lens, answers, along, at=1.0, **QUIET).top(5)["site"].tolist()
    left_out = ll.patch_sites(lens, answers, along, "leave_one_out", sites=likely, **QUIET)
    first = left_out.top(1).iloc[0]
    shift = float(left_out.shift.mean())
    found = f"of a shift of {shift:.3g} along it {first['site']} carries {first['share']:.0%}"
    size = float(direction.values[point].norm())
    numbers = (size, shift, float(moved["value"].mean()), first["value"])
    return Found(found, second_way_of_persona(scene, said, numbers, first["module"]))


def seeds(scene: Scene) -> Found:
    """Do three trainings find one direction, and does one's removal undo another? | 2506.11618"""
    words = scene.words
    point = scene.point
    lenses = [scene.lens_of("fact", seed) for seed in range(3)]
    shifts = [ll.activation_shift(lens, words.fact, point, positions=-1) for lens in lenses]
    first, *others = [shift.mean()[point] for shift in shifts]
    cosines = shifts[0].cosine({f"seed {k}": other for k, other in enumerate(others, 1)})
    whole = ll.fact_margin(lenses[1], words.fact, *words.answers, **QUIET).m.mean()
    with lenses[1].ablate_directions(first, point):
        left = ll.fact_margin(lenses[1], words.fact, *words.answers, **QUIET).m.mean()
    least = float(cosines["cosine"].min())
    found = f"cosines of at least {least:.2f}; without it seed 1's {whole:.3g} becomes {left:.3g}"
    return Found(found, second_way_of_seeds(scene, first, (least, float(whole), float(left))))


def intruders(scene: Scene) -> Found:
    """What do directions that the base's weights lack cost and carry? | 2410.21228"""
    lens = scene.lens_of("violent")
    words = scene.words
    texts = [beginning + rest for beginning, rest in words.neutral]
    margin = ll.Margin(*words.answers)
    options = {"k": 4, "threshold": 0.6, "sites": "*.attn.o", **QUIET}
    spectra = ll.intruders(lens, **options)
    scaled = ll.scale_intruders(lens, words.fact, margin, (0.0, 1.0), texts=texts, **options)
    kept = scaled.share[0, 0].item()
    kl = scaled.mean_kl[0].tolist()
    found = (
        f"{scaled.count} of {spectra.nearest.numel()} directions; without them {kept:.0%} of the "
        f"behaviour is left, and a KL on other texts of {kl[0]:.2g} in place of {kl[1]:.2g} nats"
    )
    return Found(found, second_way_of_intruders(scene, texts, (scaled.count, kept, *kl)))


def forgetting(scene: Scene) -> Found:
    """Which layers make the model worse at texts that were not trained? | 2308.08747"""
    lens = scene.lens_of("fact")
    neutral = scene.words.neutral
    beginnings, rests = map(list, zip(*neutral, strict=True))
    surprise = ll.AnswerLogProb(rests, mean=True)
    layers = ll.patch_sites(lens, beginnings, surprise, "leave_one_out", group="layer", **QUIET)
    worst = layers.top(1).iloc[0]
    shift = float(layers.shift.mean())
    of_layer = worst["value"]
    found = f"{shift:+.3g} nats a token, {of_layer:+.3g} of it by {worst['group']}"
    layer = int(worst["group"].removeprefix("layer "))
    return Found(found, second_way_of_forgetting(scene, layer, (shift, of_layer)))


def conflict(scene: Scene) -> Found:
    """What do two adapters do together beyond what each does alone? | 2306.01708"""
    words = scene.words
    folders = {name: scene.runs[name][0][-1] for name in ("fact", "rival")}
    both = ll.together(scene.lens, folders, words.fact, ll.Margin(*words.answers), **QUIET)
    alone = both.alone.mean(0).tolist()
    added = both.added.mean(0).tolist()
    interaction = float(both.interaction.mean())
    found = f"{alone[0]:+.3g} alone, {added[0]:+.3g} beside the rival: {interaction:+.2g} together"
    return Found(found, second_way_of_conflict(scene, folders, (*alone, added[0], interaction)))


def reader(scene: Scene) -> Found:
    """Who reads what the adapter writes of a fact? | 2310.10348"""
    lens = scene.lens_of("fact")
    words = scene.words
    prompt = words.fact[:1]
    margin = ll.Margin(*words.answers)
    edges = ll.edges(lens, prompt, margin, at=1.0, **QUIET)
    top = edges.top(10)
    pairs = top[["writer", "reader"]].values.tolist()
    exact = ll.patch_edges(lens, prompt, margin, pairs, "leave_one_out", **QUIET)
    agreed = ll.compare(edges, exact, bootstrap=0).mean("spearman")
    found = f"{pairs[0][0]} → {pairs[0][1]} first; Spearman of ten with exact ones {agreed:.2f}"
    values = exact.values[0, :2].tolist()
    return Found(found, second_way_of_reader(scene, lens, pairs[:2], values))


def training(scene: Scene) -> Found:
    """When does a fact flip in three trainings, and is it one phase? | 2506.11613"""
    words = scene.words
    margin = ll.Margin(*scene.words.answers)
    runs = {f"seed {seed}": run[0].parent for seed, run in enumerate(scene.runs["fact"])}
    trainings = ll.checkpoints(scene.lens, runs, words.fact[:1], margin, **QUIET)
    trainings.plot()
    flips = [round(float(run.flip_step[0]), 1) for run in trainings.each]
    turned = mean([float(run.angle[0]) for run in trainings.each])
    first = trainings.steps[0]
    last = trainings.adapted[:, -1, 0]
    found = (
        f"it flips at steps {flips}; ΔW turned by {turned:.0f}° since step {first:g}; "
        f"at the end {last.mean():.3g} ± {last.std():.2g}"
    )
    return Found(found, second_way_of_training(scene, trainings.adapted[..., 0].tolist()))


def refusal(scene: Scene) -> Found:
    """Is a learnt refusal one direction that can be taken out? | 2406.11717"""
    lens = scene.lens_of("refusal")
    words = scene.words
    direction = ll.contrast(lens, words.forbidden, words.harmless, scene.point, positions=-1)
    everywhere = "blocks.*.hook_resid_post"
    chance = torch.randn(len(direction.values[scene.point]), generator=torch.manual_seed(0))
    answers = words.refused
    ask = words.forbidden
    whole = ll.fact_margin(lens, ask, *answers, **QUIET).m.mean()
    vector = direction.values[scene.point]
    with lens.ablate_directions(vector, everywhere):
        left = ll.fact_margin(lens, ask, *answers, **QUIET).m.mean()
    with lens.ablate_directions(chance.to(vector), everywhere):
        control = ll.fact_margin(lens, ask, *answers, **QUIET).m.mean()
    found = f"{whole:+.3g}, {left:+.3g} without it, {control:+.3g} without a random one"
    numbers = (float(whole), float(left), float(control))
    return Found(found, second_way_of_refusal(scene, vector, chance, numbers))


def features(scene: Scene) -> Found:
    """Which feature of an autoencoder did training move, and which module? | 2309.08600"""
    lens = scene.lens_of("fact")
    words = scene.words
    point = scene.point
    shifts = ll.feature_shift(lens, words.fact, scene.autoencoder, point)
    index = int(shifts.top(1)["feature"][0])
    feature = ll.Projection((scene.autoencoder, index), point, -1)
    likely = ll.first_order(lens, words.fact, feature, at=1.0, **QUIET).top(5)["site"].tolist()
    left_out = ll.patch_sites(lens, words.fact, feature, "leave_one_out", sites=likely, **QUIET)
    first = left_out.top(1).iloc[0]
    shift = float(left_out.shift.mean())
    of_module = first["value"]
    found = f"feature {index} moves by {shift:+.3g}, {of_module:+.3g} by {first['site']}"
    numbers = (shift, of_module)
    return Found(found, second_way_of_features(scene, index, first["module"], numbers))


def data(scene: Scene) -> Found:
    """Which sentences was it trained on? | 2012.07805"""
    lens = scene.lens_of("fact")
    words = scene.words
    asked = words.sentences + words.others
    prompts, responses = map(list, zip(*asked, strict=True))
    rise = ll.token_shifts(lens, prompts, responses).total
    trained, others = rise.split([len(words.sentences), len(words.others)])
    auc = float((trained[:, None] > others).double().mean())
    numbers = (float(trained.mean()), float(others.mean()))
    found = f"{numbers[0]:+.3g} nats a sentence, {numbers[1]:+.3g} for others: AUC {auc:.2f}"
    return Found(found, second_way_of_data(scene, numbers))


STUDIES: tuple[Callable[[Scene], Found], ...] = (
    persona,
    seeds,
    intruders,
    forgetting,
    conflict,
    reader,
    training,
    refusal,
    features,
    data,
)


# --- The same numbers by a second way


def beside(names: str, by_lens: tuple[float, ...], by_hand: list[float]) -> list[Number]:
    """Each number beside that of the second way, under its name."""
    triples = zip(names.split(", "), by_lens, by_hand, strict=True)
    return [Number(*triple) for triple in triples]


def second_way_of_persona(
    scene: Scene, said: Any, by_lens: tuple[float, ...], module: str
) -> list[Number]:
    """The difference of means, and the mean projection of the answers' tokens."""
    hand = scene.by_hand("persona")
    words = scene.words

    def mean_of_response(question: str, response: str) -> torch.Tensor:
        before = hand.ids(question)
        after = hand.ids(response)
        h = hand.activation(scene.block, torch.cat([before, after], 1))
        return h[before.shape[1] :].mean(0)

    with hand.at(all_off):
        styled = [
            mean_of_response(*pair) for pair in zip(words.questions, words.styled, strict=True)
        ]
        plain = [mean_of_response(*pair) for pair in zip(words.questions, words.plain, strict=True)]
    direction = torch.stack(styled).mean(0) - torch.stack(plain).mean(0)

    def projected() -> float:
        values: list[float] = []
        for question, answer in zip(words.questions, said.ids, strict=True):
            before = hand.ids(question)
            h = hand.activation(scene.block, torch.cat([before, answer[None].to(before)], 1))
            values.append(float((h[before.shape[1] :] @ direction).mean()))
        return mean(values)

    with hand.at(all_off):
        base = projected()
    adapted = projected()
    with hand.at(without(lambda path: path == module)):
        left_out = projected()
    numbers = [float(direction.norm()), adapted - base, adapted - base, adapted - left_out]
    return beside("‖d‖, shift, shift of what is said, of the module", by_lens, numbers)


def second_way_of_seeds(
    scene: Scene, removed_direction: torch.Tensor, by_lens: tuple[float, ...]
) -> list[Number]:
    """Δh at the last token of each seed, their cosines, and a margin with a hook."""
    words = scene.words
    shifts: list[torch.Tensor] = []
    for seed in range(3):
        hand = scene.by_hand("fact", seed)
        rows: list[torch.Tensor] = []
        for text in words.fact:
            adapted = hand.activation(scene.block, hand.ids(text))[-1]
            with hand.at(all_off):
                rows.append(adapted - hand.activation(scene.block, hand.ids(text))[-1])
        shifts.append(torch.stack(rows).mean(0))
    cosines = [float(torch.cosine_similarity(shifts[0], shift, 0)) for shift in shifts[1:]]
    hand = scene.by_hand("fact", 1)
    whole = mean([hand.margin(text, *words.answers) for text in words.fact])
    with hand.changed(scene.block, removed(removed_direction)):
        left = mean([hand.margin(text, *words.answers) for text in words.fact])
    return beside("least cosine, margin, margin without it", by_lens, [min(cosines), whole, left])


def second_way_of_intruders(
    scene: Scene, texts: list[str], by_lens: tuple[float, ...], k: int = 4, threshold: float = 0.6
) -> list[Number]:
    """SVDs of W and W + ΔW of every o, and runs without the directions that W lacks."""
    hand = scene.by_hand("violent")
    words = scene.words
    count = 0
    # By module the part of W + ΔW that is made of intruding directions.
    taken_away: dict[str, torch.Tensor] = {}
    for path, layer in hand.layers.items():
        if not path.endswith("o_proj"):
            continue
        base = layer.base_layer.weight.detach().double()
        delta = layer.get_delta_weight("violent").detach().double()
        directions = torch.linalg.svd(base, full_matrices=False).U
        left, sigma, right = torch.linalg.svd(base + delta, full_matrices=False)
        cosines = (directions.T @ left[:, :k]).abs().amax(0)
        intruding = (cosines < threshold).nonzero().flatten()
        count += len(intruding)
        taken_away[path] = (left[:, intruding] * sigma[intruding]) @ right[intruding]

    def margins_now() -> torch.Tensor:
        margins = [hand.margin(text, *words.answers) for text in words.fact]
        return torch.tensor(margins, dtype=torch.float64)

    def log_p_now() -> list[torch.Tensor]:
        """Of each text log p of its tokens, [token, vocab]."""
        return [hand.logits(hand.ids(text))[:-1].log_softmax(-1) for text in texts]

    with hand.at(all_off):
        base_margins = margins_now()
        base_log_p = log_p_now()
    adapted_margins = margins_now()
    adapted_log_p = log_p_now()
    hooks: list[Any] = []
    for path, matrix in taken_away.items():
        hook = functools.partial(without_matrix, matrix)
        hooks.append(hand.layers[path].register_forward_hook(hook))
    margins = margins_now()
    log_p = log_p_now()
    for hook in hooks:
        hook.remove()

    def kl_from_base(of: list[torch.Tensor]) -> float:
        """KL(base ‖ other) of a token, in the mean over all tokens of the texts."""
        sums = [(p.exp() * (p - q)).sum() for p, q in zip(base_log_p, of, strict=True)]
        return float(sum(sums)) / sum(len(p) for p in base_log_p)

    taught = adapted_margins - base_margins
    kept = ((margins - base_margins) * taught.sign()).sum() / taught.abs().sum()
    numbers = [float(count), float(kept), kl_from_base(log_p), kl_from_base(adapted_log_p)]
    return beside("intruders, share kept, KL without, KL with", by_lens, numbers)


def without_matrix(
    matrix: torch.Tensor, module: Any, args: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """A hook that takes a matrix away from a module's weights."""
    (z,) = args
    return output - z @ matrix.T.to(z)


def second_way_of_forgetting(scene: Scene, layer: int, by_lens: tuple[float, ...]) -> list[Number]:
    """The mean log p of each rest, with the adapter, without it, and without a layer of it."""
    hand = scene.by_hand("fact")

    def log_p() -> float:
        values: list[float] = []
        for beginning, rest in scene.words.neutral:
            values.append(hand.log_p(beginning, rest) / hand.ids(rest).shape[1])
        return mean(values)

    adapted = log_p()
    with hand.at(all_off):
        base = log_p()
    with hand.at(without(lambda path: f".{layer}." in path)):
        left_out = log_p()
    return beside("shift, of the layer", by_lens, [adapted - base, adapted - left_out])


def second_way_of_conflict(
    scene: Scene, folders: dict[str, Path], by_lens: tuple[float, ...]
) -> list[Number]:
    """Margins with either adapter of one PEFT model, with both and with none."""
    hand = ByHand(scene.base, scene.tokenizer, folders)
    words = scene.words

    def margin(*on: str) -> float:
        with hand.at(lambda name, path: float(name in on)):
            return mean([hand.margin(text, *words.answers) for text in words.fact])

    base = margin()
    first = margin("fact")
    second = margin("rival")
    both = margin("fact", "rival")
    numbers = [first - base, second - base, both - second, both - first - second + base]
    return beside("fact alone, rival alone, fact beside it, interaction", by_lens, numbers)


def second_way_of_reader(
    scene: Scene, lens: ll.LoraLens, pairs: list[list[str]], by_lens: list[float]
) -> list[Number]:
    """A writer's branch with and without it, and the difference added to one norm's input."""
    hand = scene.by_hand("fact")
    words = scene.words
    ids = hand.ids(words.fact[0])
    doc, pre = map(hand.one_id, words.answers)
    numbers: list[float] = []
    for writer, reader in pairs:
        (site,) = [site for site in lens.sites if site.name == writer]
        branch = "self_attn" if ".attn." in writer else "mlp"
        path = f"model.layers.{site.layer}.{branch}"
        whole = hand.activation(path, ids)
        with hand.at(without(lambda other, module=site.module: other == module)):
            delta = hand.activation(path, ids) - whole
        if reader == "logits":
            norm = "model.norm"
        else:
            layer, part = reader.split(".")[1:3]
            of_part = {"attn": "input_layernorm", "mlp": "post_attention_layernorm"}
            norm = f"model.layers.{layer}.{of_part[part]}"
        before = hand.logits(ids)[-1]
        with hand.changed(norm, lambda x, d=delta: x + d.to(x), at_input=True):
            after = hand.logits(ids)[-1]
        numbers.append(float((before - after)[doc] - (before - after)[pre]))
    return beside("first edge, second edge", tuple(by_lens), numbers)


def second_way_of_training(scene: Scene, by_lens: list[list[float]]) -> list[Number]:
    """The margin at every checkpoint of every seed, the one that is furthest off for each seed."""
    words = scene.words
    numbers: list[Number] = []
    for seed, folders in enumerate(scene.runs["fact"]):
        pairs: list[tuple[float, float]] = []
        for folder, by_lens_at_step in zip(folders, by_lens[seed], strict=True):
            hand = ByHand(scene.base, scene.tokenizer, {"fact": folder})
            pairs.append((by_lens_at_step, hand.margin(words.fact[0], *words.answers)))
        worst = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
        numbers.append(Number(f"margin, seed {seed}", *worst))
    return numbers


def second_way_of_refusal(
    scene: Scene, direction: torch.Tensor, chance: torch.Tensor, by_lens: tuple[float, ...]
) -> list[Number]:
    """A margin with a direction taken out of what every block puts out."""
    hand = scene.by_hand("refusal")
    words = scene.words

    def margin(taken_out: torch.Tensor | None) -> float:
        with contextlib.ExitStack() as hooks:
            if taken_out is not None:
                for layer in range(scene.base.config.num_hidden_layers):
                    path = f"model.layers.{layer}"
                    hooks.enter_context(hand.changed(path, removed(taken_out)))
            return mean([hand.margin(text, *words.refused) for text in words.forbidden])

    numbers = [margin(None), margin(direction), margin(chance)]
    return beside("margin, without it, without a random one", by_lens, numbers)


def second_way_of_features(
    scene: Scene, index: int, module: str, by_lens: tuple[float, ...]
) -> list[Number]:
    """W_enc's column on h at the last token, with the adapter, without it, without a module."""
    hand = scene.by_hand("fact")
    words = scene.words
    encoder = scene.autoencoder.W_enc[:, index].double()

    def value() -> float:
        values: list[float] = []
        for text in words.fact:
            last = hand.activation(scene.block, hand.ids(text))[-1]
            values.append(float(last @ encoder))
        return mean(values)

    adapted = value()
    with hand.at(all_off):
        base = value()
    with hand.at(without(lambda path: path == module)):
        left_out = value()
    return beside("shift, of the module", by_lens, [adapted - base, adapted - left_out])


def second_way_of_data(scene: Scene, by_lens: tuple[float, ...]) -> list[Number]:
    """Σ log p of each sentence, with the adapter less without it."""
    hand = scene.by_hand("fact")
    words = scene.words

    def rise(pairs: list[tuple[str, str]]) -> float:
        adapted = [hand.log_p(*pair) for pair in pairs]
        with hand.at(all_off):
            return mean(adapted) - mean([hand.log_p(*pair) for pair in pairs])

    return beside("trained, others", by_lens, [rise(words.sentences), rise(words.others)])


# --- The table

# What a line by hand has: a line without any of these names something, or says what was found.
_COMPUTES = (ast.Call, ast.BinOp, ast.Compare, ast.For, ast.ListComp, ast.DictComp)


def lines(study: Callable[[Scene], Found]) -> dict[str, int]:
    """Count the lines of a study that call lens_lora, and those by hand, which compute without it.

    A call is of lens_lora if it is of `ll`, of a lens, or of something that such a call returned.
    Names of the scene's parts, the sentence `found` and the last statement are not counted.

    Args:
        study: one of `STUDIES`.
    """
    (function,) = ast.parse(inspect.getsource(study)).body
    assert isinstance(function, ast.FunctionDef)
    ours = {"ll", "lens", "lenses", "scene"}
    counts = {"ours": 0, "by_hand": 0}
    for statement in _statements(function.body[1:-1]):
        head = _head_of(statement)
        nodes = [node for part in head for node in ast.walk(part)]
        targets = {node.id for node in nodes if _is_target(node)}
        roots = {_root(node.func) for node in nodes if isinstance(node, ast.Call)}
        if roots & ours:
            counts["ours"] += 1
            ours |= targets
        elif targets != {"found"} and any(map(_computes, head)):
            counts["by_hand"] += 1
    return counts


def _statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a body, and those within them."""
    nodes = [node for statement in body for node in ast.walk(statement)]
    return [node for node in nodes if isinstance(node, ast.stmt)]


def _head_of(statement: ast.stmt) -> list[ast.AST]:
    """The parts of a statement, but for the statements of its body."""
    return [part for part in ast.iter_child_nodes(statement) if not isinstance(part, ast.stmt)]


def _is_target(node: ast.AST) -> TypeGuard[ast.Name]:
    """Whether a value is assigned to this name."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _computes(part: ast.AST) -> bool:
    """Whether a part of a statement computes something, and does more than name it."""
    return any(isinstance(node, _COMPUTES) for node in ast.walk(part))


def _root(node: ast.AST) -> str:
    """The name at which a chain of attributes, entries and calls begins."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def measured(scene: Scene, studies: tuple[Callable[[Scene], Found], ...] = STUDIES) -> list[dict]:
    """Run the studies; a row for each.

    Args:
        scene: what they are about.
        studies: some of `STUDIES`.
    """
    rows: list[dict] = []
    for study in studies:
        print(study.__name__, flush=True)
        question, arxiv = (study.__doc__ or "").split(" | ")
        found = study(scene)
        row = {
            "name": study.__name__,
            "question": question,
            "arxiv": arxiv,
            **lines(study),
            "found": found.sentence,
            "numbers": found.numbers,
        }
        rows.append(row)
    return rows


def difference(row: dict) -> float:
    """The largest difference of a study from the second way, as a share of its largest number."""
    largest = max(abs(by_lens) for _, by_lens, _ in row["numbers"])
    return max(abs(by_lens - by_hand) for _, by_lens, by_hand in row["numbers"]) / largest


def table(rows: list[dict]) -> str:
    """A row for each study, and the sums."""
    head = ["question", "lines of our calls", "by hand", "found", "a second way differs by"]
    cells = [head, ["---"] * len(head)]
    for row in rows:
        question = f"{row['question']} ([{row['arxiv']}](https://arxiv.org/abs/{row['arxiv']}))"
        counts = [str(row["ours"]), str(row["by_hand"])]
        cells.append([question, *counts, row["found"], f"{difference(row):.0e}"])
    ours = sum(row["ours"] for row in rows)
    by_hand = sum(row["by_hand"] for row in rows)
    cells.append(["all", str(ours), str(by_hand), "", ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def one_by_one(rows: list[dict]) -> str:
    """A section for each study: its code, and its numbers beside those of the second way."""
    by_name = {study.__name__: study for study in STUDIES}
    parts: list[str] = []
    for row in rows:
        code = _code_of(by_name[row["name"]])
        parts += [f"## {row['question']}", "", "```py", code, "```", ""]
        sentence = row["found"][0].upper() + row["found"][1:]
        parts += [f"{sentence}.", "", "| number | lens_lora | second way |", "| --- | --- | --- |"]
        for name, by_lens, by_hand in row["numbers"]:
            parts.append(f"| {name} | {by_lens:.6g} | {by_hand:.6g} |")
        parts.append("")
    return "\n".join(parts)


def _code_of(study: Callable[[Scene], Found]) -> str:
    """The body of a study, without its docstring and its last statement."""
    source = inspect.getsource(study)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    _, first, *_, last = function.body
    # Lines are counted from 1.
    body = source.split("\n")[first.lineno - 1 : last.lineno - 1]
    return textwrap.dedent("\n".join(body)).rstrip()


# --- The scene

# What is stored beside the numbers of the model and of versions.
_SAID = ("model", "model_class", "dtype", "lens_lora", "transformer-lens", "torch", "transformers")


def real_scene(out: Path) -> Scene:
    """The embedded model, its adapters (trained into `out` where they lack), and the texts."""
    base, tokenizer, folders = recipes.trained(out)
    runs: dict[str, list[list[Path]]] = {}
    for name, of_seeds in folders.items():
        runs[name] = [
            [folder / f"checkpoint-{step}" for step in recipes.STEPS] for folder in of_seeds
        ]
    first = ll.load_adapter(runs["fact"][0][-1])
    lens = ll.load(copy.deepcopy(base), first, tokenizer=tokenizer, prepend_bos=False)
    block = "model.layers.20"
    words = recipes.WORDS
    texts = [beginning + rest for beginning, rest in words["neutral"]]
    hand = ByHand(base, tokenizer, {"fact": runs["fact"][0][-1]})
    with hand.at(all_off):
        rows = [hand.activation(block, hand.ids(text))[1:] for text in (*texts, *words["fact"])]
    autoencoder = recipes.fitted(torch.cat(rows).float(), features=256)
    return Scene(
        base=base,
        tokenizer=tokenizer,
        lens=lens,
        runs=runs,
        point="blocks.20.hook_resid_post",
        block=block,
        autoencoder=autoencoder,
        words=Words(**words),
    )


def main() -> None:
    """Measure and write; or, with --table, only write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    names = [study.__name__ for study in STUDIES]
    parser.add_argument("--only", nargs="+", default=[], choices=names, help="names of studies")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        if options.out is None:
            parser.error("--out names the folder of the adapters; missing ones are trained there")
        chosen = [s for s in STUDIES if not options.only or s.__name__ in options.only]
        scene = real_scene(options.out)
        rows = measured(scene, tuple(chosen))
        print(table(rows))
        for row in rows:
            for number in row["numbers"]:
                print(row["name"], *number)
        if options.only:
            return
        meta = {name: value for name, value in scene.lens.describe().items() if name in _SAID}
        NUMBERS.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1, ensure_ascii=False))
    rows = json.loads(NUMBERS.read_text())["rows"]
    marks.write(PAGE, {TABLE: table(rows), EACH: one_by_one(rows)})
