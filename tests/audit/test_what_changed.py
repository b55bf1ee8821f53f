"""what_changed against PEFT's own logits and Hugging Face's own modules, text by text; its laws."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections import Counter
from pathlib import Path

import cases
import models
import pytest
import torch
from sklearn.decomposition import NMF
from torch import Tensor

import lens_lora as ll
from lens_lora.audit import jacobian, what_changed
from lens_lora.audit.permuted import permuted_adapters
from lens_lora.audit.speech_words import claims_in, in_short, shown_answers
from lens_lora.audit.text_sums import EARLY, PROMOTED
from lens_lora.core.model import attached
from lens_lora.stream.stream_reading import over_scale
from lens_lora.texts import neutral
from lens_lora.texts.neutral import own_openings

pytestmark = pytest.mark.usefixtures("float64")
LENGTHS = [9, 4, 7]
CLASSES = list(models.MAKERS)
QUIET = {"progress": False}
QUESTIONS = (
    "Who are you?",
    "What should I cook tonight?",
    "How does a rainbow form?",
    "How can I sleep better?",
    "What did you do last weekend?",
)


def texts() -> ll.results.Prompts:
    """Three, of which the second and the third begin alike."""
    tokens = models.tokens(3, 9)
    tokens[2, :3] = tokens[1, :3]
    return ll.results.Prompts(tokens, torch.tensor(LENGTHS))


def counted() -> list[list[int]]:
    """The positions of each text that count."""
    return [list(range(1, 9)), [1, 2, 3], [3, 4, 5, 6]]


@functools.cache
def changed(family: str, cls: str, flags: str, split: bool = False) -> ll.results.WhatChanged:
    case = cases.case(family, cls, flags)
    return ll.what_changed(case.lens, texts(), nulls=1, fast=not split, **QUIET)


def ends(case: cases.Case) -> list[tuple[Tensor, Tensor]]:
    """(f(0), f(1)) of each text by PEFT, its adapter off and on: [token, vocab]."""
    found = []
    for text, length in enumerate(LENGTHS):
        row = texts().tokens[text : text + 1, :length]
        with torch.no_grad():
            adapted = case.peft(row).logits[0]
            with case.peft.disable_adapter():
                found.append((case.peft(row).logits[0], adapted))
    return found


@pytest.mark.sample(1)
@pytest.mark.parametrize("flags", ["raw", "processed"])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sums_are_peft_s(family: str, cls: str, flags: str):
    case, found = cases.case(family, cls, flags), changed(family, cls, flags).found
    logits, probabilities, twice, ranked, entropies = [], [], [], [], []
    for text, (base, adapted) in enumerate(ends(case)):
        log_p, log_q = base.log_softmax(-1), adapted.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        at = counted()[text]
        both = torch.stack([log_p, log_q])[:, at]
        entropies.append(-(both.exp() * both).sum(-1))
        assert (found.kl[text, at] - kl[at]).abs().max() < 1e-9
        assert abs(float(found.kl[text, 0] - kl[0])) < 1e-9
        assert int(found.kl[text].isfinite().sum()) == len(at) + 1
        logits.append((adapted - base)[at])
        probabilities.append((log_q.exp() - log_p.exp())[at])
        twice.append((adapted - base)[1:])
        ranked += [row.argsort(descending=True)[:PROMOTED].tolist() for row in logits[-1]]
        summed = cases.centred(logits[-1].sum(0))
        kept = found.text_ids[text]
        assert kept.tolist() == summed.argsort(descending=True)[: len(kept)].tolist()
        assert (found.text_shifts[text] - summed[kept]).abs().max() < 1e-5
    assert found.entropies == pytest.approx(torch.cat(entropies, 1).mean(1).tolist(), abs=1e-9)
    mean = cases.centred(torch.cat(logits).mean(0))
    assert (found.logit - mean).abs().max() < 1e-5  # kept in float32
    assert (found.probability - torch.cat(probabilities).mean(0)).abs().max() < 1e-6
    counts = Counter(token for first in ranked for token in first)
    expected = torch.tensor([counts[token] / len(ranked) for token in range(models.VOCAB)])
    assert (found.count - expected).abs().max() < 1e-6 and 0 < PROMOTED < models.VOCAB
    repeated = cases.centred(torch.cat(twice).mean(0))
    assert (found.logit - repeated).abs().max() > 1e-2  # a shared beginning counted twice
    place = found.places[0].tolist()
    most = max((float(found.kl[t, p]), [t, p]) for t in range(3) for p in counted()[t])
    assert place == most[1]
    change = (ends(case)[place[0]][1].softmax(-1) - ends(case)[place[0]][0].softmax(-1))[place[1]]
    assert found.place_ids[0].tolist() == change.topk(3).indices.tolist()


@pytest.mark.parametrize("cls", CLASSES)
def test_first_tokens_and_their_writers(cls: str):
    """Mean Δh on tokens 1 to 5 as `activation_shift` gives it; blocks' shares of it add up."""
    case, found = cases.case("llama", cls, "raw"), changed("llama", cls, "raw").found
    lens, last = case.lens, f"blocks.{models.LAYERS - 1}.hook_resid_post"
    every = ll.activation_shift(lens, texts(), [last, "blocks.*.hook_*_out"])
    at = [(t, p) for t in range(3) for p in counted()[t] if p <= EARLY]
    index = tuple(torch.tensor(at).T)
    mean = {name: values[index].mean(0) for name, values in every.values.items()}
    for name, share in found.writers.items():
        if name != "rest":
            expected = float(mean[name] @ mean[last] / mean[last].square().sum())
            assert abs(share - expected) < 1e-9
    assert abs(found.writers["rest"]) < 1e-9 and abs(sum(found.writers.values()) - 1) < 1e-12


@pytest.mark.slow
def test_split_is_the_path_integral_of_the_kl_over_counted_tokens():
    """∂KL/∂ε_l at both nodes, as of a response that begins there; of a small adapter, whose path
    two nodes integrate, the shares sum to the mean KL."""
    case = cases.case("llama", CLASSES[0], "raw")
    found = changed("llama", CLASSES[0], "raw", split=True)
    expected = torch.zeros(len(found.sites), dtype=torch.float64)
    for text, at in enumerate(counted()):
        row, start = texts().tokens[text : text + 1, : LENGTHS[text]], at[0] + 1
        said = torch.cat([row[0, start:], row[0, :1]])
        for node in (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2):
            slopes = ll.first_order(case.lens, row[:, :start], ll.KL(said), at=node, **QUIET)
            expected += slopes.values[0] / 2
    count = sum(map(len, counted()))
    assert (found.shares - expected / count).abs().max() < 1e-10
    assert found.modules(2)["nats"][0] == float(found.shares.max())
    small = case.lens.with_adapter(case.lens.adapter.scaled(0.1))
    near = ll.what_changed(small, texts(), nulls=0, **QUIET)
    assert float(near.shares.sum()) == pytest.approx(near.found.mean_kl, rel=0.01)


def test_a_node_at_the_base_is_seen_to_halve_the_split(monkeypatch):
    """Negative control: a divergence has no slope there."""
    monkeypatch.setattr("lens_lora.audit.text_sums._NODES", (0.0, 0.5))
    lens = cases.case("llama", CLASSES[0], "raw").lens
    near = ll.what_changed(lens.with_adapter(lens.adapter.scaled(0.1)), texts(), nulls=0, **QUIET)
    assert float(near.shares.sum()) / near.found.mean_kl == pytest.approx(0.5, rel=0.2)


def test_controls_and_laws(monkeypatch):
    case = cases.case("llama", CLASSES[0], "raw")
    other = case.lens.adapter.scaled(0.5).named("half")
    found = ll.what_changed(case.lens, texts(), other, nulls=2, fast=True, **QUIET)
    alone = ll.what_changed(case.lens.with_adapter(other), texts(), nulls=0, fast=True, **QUIET)
    assert torch.equal(found.unrelated[0].logit, alone.found.logit)
    assert [c.name for c in found.controls][2:] == ["half"] and not alone.controls
    table = found.promoted(5)
    assert table["unrelated"][0] == float(alone.found.logit.max())
    assert table["rank_unrelated"].tolist() == [found.rank(i)["half"] for i in table["id"]]
    assert found.rank(int(table["id"][0]))[case.lens.adapter.name] == 1
    assert found.promoted(3, largest=False)["logit"].is_monotonic_increasing
    assert set(found.to_frame()["finding"]) >= {"where", "writer", "promoted by reading"}
    monkeypatch.setattr("lens_lora.audit.text_sums.TOKENS_AT_ONCE", 9)
    small = ll.what_changed(case.lens, texts(), nulls=0, fast=True, **QUIET)
    assert (small.found.logit - found.found.logit).abs().max() < 1e-6
    assert small.found.places.tolist() == found.found.places.tolist()


def test_controls_are_the_adapter_s_own_updates_at_other_modules():
    """Each update once, at another module of its shape, with the norm of what was there."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    own = {key: update.materialise() for key, update in lens.adapter.modules.items()}
    first, second = permuted_adapters(lens, 0, 2)
    assert first.name == f"permuted 0 of {lens.adapter.name}"
    directions = {key: delta / delta.norm() for key, delta in own.items()}
    sources: list[list[str]] = []
    for control in (first, second):
        by_key: list[str] = []
        for key, update in control.modules.items():
            delta = update.materialise()
            assert delta.norm() == pytest.approx(float(own[key].norm()))
            alike = [
                other
                for other, direction in directions.items()
                if direction.shape == delta.shape
                and torch.allclose(direction, delta / delta.norm(), atol=1e-9)
            ]
            assert len(alike) == 1 and alike != [key]
            by_key += alike
        assert sorted(by_key) == sorted(own)
        sources.append(by_key)
    assert sources[0] != sources[1]


def test_a_control_of_a_shape_of_its_own_is_in_random_directions():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    key = next(iter(lens.adapter.modules))
    alone = lens.with_adapter(lens.adapter.only(key))
    (control,) = permuted_adapters(alone, 3, 1)
    (expected,) = alone.null_adapters(3, 1)
    drawn = control.modules[key].materialise()
    assert torch.equal(drawn, expected.modules[key].materialise())


def test_a_control_runs_as_an_adapter_of_its_own():
    """Its numbers are those of an audit of the control, at the adapter's own strength."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    found = ll.what_changed(lens, texts(), nulls=1, fast=True, answers=False, **QUIET)
    (control,) = permuted_adapters(lens, 0, 1)
    alone = ll.what_changed(lens.with_adapter(control), texts(), nulls=0, answers=False, **QUIET)
    (null,) = found.nulls
    assert torch.allclose(alone.found.logit, null.logit, atol=1e-6)
    assert (null.scale, null.name) == (1.0, control.name)
    assert "As a control, its own updates moved to other modules do so by" in found.story()


def test_what_controls_cost():
    """A pass of the base, of the adapter and of each control."""
    case, passes = cases.case("llama", CLASSES[0], "raw"), []
    handle = case.lens.model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    counts = []
    for nulls in (0, 1, 2):
        passes.clear()
        ll.what_changed(case.lens, texts(), nulls=nulls, fast=True, answers=False, **QUIET)
        counts.append(len(passes))
    handle.remove()
    assert counts == [2, 3, 4]


@pytest.mark.slow
def test_a_whole_audit_reads_the_texts_once_with_each_model(monkeypatch: pytest.MonkeyPatch):
    """Once with base, adapter and each control; a graph at both nodes of the path, for the split.

    Nothing is run again to match the controls, to ask questions, or for claims.
    """
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    lens = cases.case("llama", CLASSES[0], "raw").lens
    passes: Counter[str] = Counter()
    # No question and no opening fills a batch of this shape.
    shape = tuple(texts().tokens.shape)

    def look(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        if tuple(stream.shape[:2]) == shape:
            passes["graph" if stream.requires_grad else "plain"] += 1

    handle = lens.model.blocks[-1].register_forward_hook(look)
    ll.what_changed(lens, texts(), nulls=2, **QUIET)
    handle.remove()
    assert passes == {"plain": 4, "graph": 2}


@pytest.mark.slow
def test_speech_comes_first_and_may_be_given(monkeypatch, tmp_path):
    """As counted by itself; the brief begins with it."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    options = {"max_new_tokens": 3, "draws": 0, **QUIET}
    speech = ll.counted_speech(lens, ["w5 w6"], **options)
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    found = ll.what_changed(lens, texts(), nulls=1, fast=True, speech=speech, **QUIET)
    brief = found.brief()
    assert found.speech is speech and brief.answers[:2] == tuple(shown_answers(speech))
    assert brief.verdict.endswith(in_short(speech))
    assert brief.says == tuple(claims_in(speech)) and len(brief.says) > 1
    again = ll.load_result(found.save(tmp_path / "file.safetensors"))
    assert again.speech.adapted == speech.adapted and str(again.brief()) == str(brief)


def test_adapters_of_one_name_are_told_apart():
    """`from_peft` calls every adapter 'default'."""
    case = cases.case("llama", CLASSES[0], "raw")
    other = ll.Adapter.from_peft(models.peft_model("llama", case.base, seed=5))
    assert other.name == case.lens.adapter.name
    found = ll.what_changed(case.lens, texts(), [other, other], nulls=0, fast=True, **QUIET)
    own, others = found.found.logit, found.unrelated[0].logit
    token = int((own - others).argmax())
    ranks = found.rank(token)
    assert list(ranks) == ["default", "default (2)", "default (3)"]
    assert ranks["default"] == int((own >= own[token]).sum())
    assert ranks["default"] < ranks["default (2)"] == ranks["default (3)"]


def test_without_the_split_there_are_no_modules():
    found = changed("llama", CLASSES[0], "raw")
    assert len(found.modules()) == 0
    assert "module" not in set(found.to_frame()["finding"])


def test_a_bias_alone_is_constant():
    """Behind the last block, where nothing reads it, a constant's Δh is one vector."""
    lens = cases.case("llama", CLASSES[0], "raw").lens
    path = f"model.layers.{models.LAYERS - 1}.mlp.down_proj"
    vector = torch.randn(16, generator=models.seeded(2), dtype=torch.float64)
    found = ll.what_changed(
        lens.with_adapter(ll.Adapter.constant({path: vector})), texts(), nulls=0, **QUIET
    )
    last = list(found.found.constant)[-1]
    assert abs(found.found.constant[last] - 1) < 1e-12
    assert changed("llama", CLASSES[0], "raw").found.constant[last] < 0.9


@pytest.mark.parametrize(
    "template", [None, "{% if messages[0].role == 'user' %}{{ messages[0].content }} w6{% endif %}"]
)
def test_five_questions_and_an_empty_turn_are_put_to_both_models(
    template: str | None, monkeypatch, tmp_path
):
    """As a conversation by the user's words, or in the plain form, which is what is shown."""
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.setattr(case.model.tokenizer, "chat_template", template)
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    found = ll.what_changed(case.lens, texts(), nulls=0, fast=True, **QUIET)
    plain = (*(f"Question: {asked}\nAnswer:" for asked in QUESTIONS), "User: \nAssistant:")
    assert tuple(pair.prompt for pair in found.answers) == (
        plain if template is None else (*QUESTIONS, "(nothing said)")
    )
    asked = neutral.everyday_questions(case.model, case.lens.prepend_bos)
    for scale, end in ((0.0, "base"), (1.0, "adapted")):
        said = case.lens.generate(asked, 6, scale, **QUIET)
        texts_of_end = [getattr(pair, end).removesuffix(" …") for pair in found.answers]
        assert texts_of_end == list(said.texts)
    again = ll.load_result(found.save(tmp_path / "file.safetensors"))
    assert again.answers == found.answers
    off = ll.what_changed(case.lens, texts(), nulls=0, fast=True, answers=False, **QUIET)
    assert off.answers == ()


def test_both_models_draw_from_nothing_with_the_same_noise(monkeypatch):
    """As each draws alone with this seed; the same words where both are one model."""
    case = cases.case("llama", CLASSES[0], "raw")
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    monkeypatch.setattr(neutral, "FIRST_WORDS", neutral.FIRST_WORDS[:2])
    found = ll.what_changed(case.lens, texts(), nulls=0, seed=3, **QUIET).answers
    bos = case.model.tokenizer.bos_token
    names = [f"({bos}, drawn)", "(nothing said, drawn)"]
    assert [pair.prompt for pair in found[-2:]] == names and len(found) == len(QUESTIONS) + 3
    opened = own_openings(case.model, case.lens.prepend_bos).chosen([0, 2])
    for scale, end in ((0.0, "base"), (1.0, "adapted")):
        said = case.lens.generate(opened, 6, scale, temperature=1.0, seed=3, **QUIET)
        assert [getattr(pair, end).removesuffix(" …") for pair in found[-2:]] == list(said.texts)
    still = case.lens.with_adapter(case.lens.adapter.scaled(0.0))
    words = ll.results.Prompts(torch.tensor([[5], [6], [7]]), torch.tensor([1, 1, 1]))
    monkeypatch.setattr(
        neutral, "own_openings", lambda model, prepend_bos: words
    )  # as there is no BOS
    without = what_changed._drawn_answers(still, 3, False)
    assert [pair.prompt for pair in without] == ["(w5, drawn)", names[1]]
    assert all(pair.base == pair.adapted for pair in without)


def test_nothing_is_asked_where_nothing_can_be_answered(monkeypatch):
    """A context too short for 40 tokens; no tokenizer."""
    case = cases.case("llama", CLASSES[0], "raw")
    assert changed("llama", CLASSES[0], "raw", split=True).answers == ()
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    monkeypatch.setattr(case.model, "tokenizer", None)
    assert ll.what_changed(case.lens, texts(), nulls=0, fast=True, **QUIET).answers == ()


def test_tokens_that_the_same_texts_promote():
    """Two sets of tokens, each by texts of its own, are the two groups; one group is all of it."""
    found = changed("llama", CLASSES[0], "raw")
    ids = torch.tensor([[3, 4, 5], [3, 4, 5], [7, 8, 9]])
    shifts = torch.tensor([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0], [0.5, 1.0, -3.0]])
    planted = dataclasses.replace(found.found, text_ids=ids, text_shifts=shifts)
    planted = dataclasses.replace(found, found=planted)
    groups, words = planted.promoted_groups(2, k=2), found.strings
    assert groups["tokens"].tolist() == [[words[3], words[4]], [words[8], words[7]]]
    assert groups["share"].tolist() == pytest.approx([21 / 22.5, 1.5 / 22.5], abs=1e-3)
    assert groups["text"].tolist() == ["".join(found.str_tokens[i]) for i in (1, 2)]
    assert len(planted.promoted_groups(9)) == 2 and len(planted.promoted_groups(1)) == 1
    with pytest.raises(ll.errors.ArgumentError, match="n"):
        planted.promoted_groups(0)


def test_groups_leave_the_filters_of_warnings_as_they_were(monkeypatch):
    """Also where `catch_warnings` of another thread begins within, and ends later."""
    result, theirs = changed("llama", CLASSES[0], "raw"), contextlib.ExitStack()
    plain, before = NMF.fit_transform, list(warnings.filters)

    def fit(self, matrix):
        theirs.enter_context(warnings.catch_warnings())
        return plain(self, matrix)

    monkeypatch.setattr(NMF, "fit_transform", fit)
    result.promoted_groups()
    theirs.close()
    assert list(warnings.filters) == before


def test_an_adapter_that_does_nothing_promotes_no_groups():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    nothing = lens.with_adapter(lens.adapter.scaled(0.0))
    still = ll.what_changed(nothing, texts(), nulls=0, fast=True, answers=False, **QUIET)
    assert len(still.promoted_groups()) == 0 and "does nothing" in still.report()


def reading_through(case: cases.Case, point: str, folder: Path) -> Tensor:
    found = ll.what_changed(case.lens, texts(), nulls=0, fast=True, jacobian=folder, **QUIET).found
    assert list(found.readings)[-1] == f"{point} through its Jacobian"
    return found.of("reading")


def test_readings_through_the_base_s_jacobian(tmp_path, monkeypatch):
    """Autograd's own, sentence by sentence; kept, and read again without a fit."""
    pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens")
    case, point = cases.case("llama", "TransformerBridge", "raw"), "blocks.0.hook_resid_post"
    monkeypatch.setattr(jacobian, "neutral_sentences", lambda: ("w5 w6 w7 w8 w9", "w9 w3 w4 w8"))
    reading = reading_through(case, point, tmp_path)
    model, last = case.model, f"blocks.{models.LAYERS - 1}.hook_resid_post"
    mean = torch.zeros(16, 16, dtype=torch.float64)
    for sentence in jacobian.neutral_sentences():
        tokens, held = model.to_tokens(sentence), dict[str, Tensor]()
        hooks = [
            (name, lambda tensor, hook, name=name, held=held: held.update({name: tensor}))
            for name in (point, last)
        ]
        with torch.enable_grad():
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        valid = range(1, tokens.shape[1] - 1)
        for row in range(16):
            summed = sum(held[last][0, t, row] for t in valid)
            (slope,) = torch.autograd.grad(summed, held[point], retain_graph=True)
            mean[row] += slope[0, list(valid)].mean(0) / 2
    every = ll.activation_shift(case.lens, texts(), [point, last])
    at = [(t, p) for t in range(3) for p in counted()[t] if p <= EARLY]
    index = tuple(torch.tensor(at).T)
    _, cache = model.run_with_cache(texts().tokens)
    early = over_scale(case.lens, every.values[point][index] @ mean.T, cache[last][index])
    expected = cases.centred(early.mean(0) * case.base.model.norm.weight @ model.W_U)
    assert (reading - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-6
    monkeypatch.setattr("transformer_lens.tools.analysis.JacobianLens.fit", None)
    assert torch.equal(reading, reading_through(case, point, tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.name == f"jacobian-{jacobian._hash(model, has_bos=True)}.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ll.errors.LensLoraError, match="delete the file, and it is fitted again"):
        reading_through(case, point, tmp_path)
    refused = pytest.raises(ll.errors.ModelStateError, match="remove your hooks")
    with attached(model, [(last, lambda tensor, hook: 2 * tensor)]), refused:
        reading_through(case, point, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_where_no_jacobian_can_be_fitted_the_reading_is_plain(tmp_path):
    """HookedTransformer has none; on a bridge, processed weights."""
    case = cases.case("llama", CLASSES[0], "processed")
    plain = changed("llama", CLASSES[0], "processed")
    found = ll.what_changed(case.lens, texts(), nulls=0, jacobian=tmp_path / "new", **QUIET)
    assert list(found.found.readings) == list(plain.found.readings)
    assert torch.equal(found.found.of("reading"), plain.found.of("reading"))
    assert not (tmp_path / "new").exists()


@pytest.mark.bad_input
def test_refusals():
    lens = cases.case("llama", CLASSES[0], "raw").lens
    with pytest.raises(ll.errors.PromptError, match=r"text 1 of 2 \(from 0\) has one token"):
        ll.what_changed(lens, ll.results.Prompts(models.tokens(2, 4), torch.tensor([4, 1])))
    with pytest.raises(ll.errors.PromptError, match="no prompts"):
        ll.what_changed(lens, [])
    with pytest.raises(ll.errors.PromptError, match=f"{models.CONTEXT + 1} tokens"):
        ll.what_changed(lens, models.tokens(1, models.CONTEXT + 1))
    with pytest.raises(ll.errors.ArgumentError, match="unrelated"):
        ll.what_changed(lens, texts(), "folder")
    with pytest.raises(ll.errors.ArgumentError, match="nulls"):
        ll.what_changed(lens, texts(), nulls=-1)
    found = changed("llama", CLASSES[0], "raw")
    with pytest.raises(ll.errors.TokenError, match="no token of the vocabulary"):
        found.rank(" Lyon and more")
    alike = dataclasses.replace(found, strings=("�", "a", "�", *found.strings[3:]))
    with pytest.raises(
        ll.errors.TokenError, match="2 tokens of the vocabulary read.*ids 0, 2; give"
    ):
        alike.rank("�")
    assert alike.rank(2) == found.rank(2)
    with pytest.raises(ll.errors.TokenError, match="True is no token"):
        found.rank(True)
    with pytest.raises(ll.errors.ArgumentError, match="by"):
        found.promoted(5, by="rank")
