"""An audit is compared with PEFT's logits of each text, with autograd, and with other calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cases
import models
import pytest
import torch
from passes import passes
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
LAST_POINT = f"blocks.{models.LAYERS - 1}.hook_resid_post"
# The width of the residual stream of a tiny model.
WIDTH = 16


def texts() -> ll.results.Prompts:
    """Three texts, of which the second and the third share their first three tokens."""
    tokens = models.tokens(3, 9)
    tokens[2, :3] = tokens[1, :3]
    return ll.results.Prompts(tokens, torch.tensor(LENGTHS))


def counted_positions() -> list[list[int]]:
    """The positions that count in each text: not the first, and a shared beginning only once."""
    return [list(range(1, 9)), [1, 2, 3], [3, 4, 5, 6]]


def early_positions() -> tuple[Tensor, Tensor]:
    """The text and the position of each counted token among a text's tokens 1 to 5."""
    places = [
        (text, position)
        for text, positions in enumerate(counted_positions())
        for position in positions
        if position <= EARLY
    ]
    text, position = torch.tensor(places).T
    return text, position


def llama_case() -> cases.Case:
    return cases.case("llama", CLASSES[0], "raw")


@functools.cache
def audit_of(family: str, cls: str, flags: str, split: bool = False) -> ll.results.WhatChanged:
    """The audit of a case's adapter over `texts()`, fast unless the KL is to be split by site."""
    case = cases.case(family, cls, flags)
    return ll.what_changed(case.lens, texts(), nulls=1, fast=not split, **QUIET)


def llama_audit(split: bool = False) -> ll.results.WhatChanged:
    return audit_of("llama", CLASSES[0], "raw", split)


# --- Sums over the texts are PEFT's


@dataclasses.dataclass(frozen=True)
class Oracle:
    """PEFT's numbers for one text.

    Attributes:
        base: the logits without the adapter, [token, vocab].
        adapted: the logits with the adapter, [token, vocab].
        counted: the positions that count.
    """

    base: Tensor
    adapted: Tensor
    counted: list[int]

    @property
    def shift(self) -> Tensor:
        """f(1) − f(0) at the positions that count, [counted, vocab]."""
        return (self.adapted - self.base)[self.counted]

    @property
    def change(self) -> Tensor:
        """p(1) − p(0) at every position, [token, vocab]."""
        return self.adapted.softmax(-1) - self.base.softmax(-1)

    @property
    def kl(self) -> Tensor:
        """KL(p(0) ‖ p(1)) at every position, [token]."""
        log_p = self.base.log_softmax(-1)
        log_q = self.adapted.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """−Σ_v p log p of each row, in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def peft_oracles(case: cases.Case) -> list[Oracle]:
    """Each text alone through the PEFT model, without and with the adapter."""
    oracles: list[Oracle] = []
    for text, length in enumerate(LENGTHS):
        row = texts().tokens[text : text + 1, :length]
        with torch.no_grad():
            adapted = case.peft(row).logits[0]
            with case.peft.disable_adapter():
                base = case.peft(row).logits[0]
        oracles.append(Oracle(base, adapted, counted_positions()[text]))
    return oracles


on_each_model = pytest.mark.parametrize(
    ("family", "cls", "flags"),
    [
        (family, cls, flags)
        for family in ("gpt2", "llama")
        for cls in CLASSES
        for flags in ("raw", "processed")
    ],
)


@pytest.mark.sample(1)
@on_each_model
def test_kl_is_peft_s_at_each_position(family: str, cls: str, flags: str):
    """At the positions that count and at each text's first one; it is NaN at all others."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    for text, oracle in enumerate(oracles):
        # KL at the first token is kept, but no mean counts it: nothing comes before it.
        kept = [0, *oracle.counted]
        assert found.kl[text].isfinite().nonzero().flatten().tolist() == kept
        assert (found.kl[text, kept] - oracle.kl[kept]).abs().max() < 1e-9


@pytest.mark.sample(1)
@on_each_model
def test_mean_kl_and_mean_entropies_are_peft_s(family: str, cls: str, flags: str):
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    kl = torch.cat([oracle.kl[oracle.counted] for oracle in oracles])
    of_base = torch.cat([entropy(oracle.base[oracle.counted]) for oracle in oracles])
    of_adapted = torch.cat([entropy(oracle.adapted[oracle.counted]) for oracle in oracles])
    assert abs(found.mean_kl - float(kl.mean())) < 1e-9
    base_entropy, adapted_entropy = found.entropies
    assert abs(base_entropy - float(of_base.mean())) < 1e-9
    assert abs(adapted_entropy - float(of_adapted.mean())) < 1e-9


@pytest.mark.sample(1)
@on_each_model
def test_mean_shifts_are_peft_s(family: str, cls: str, flags: str):
    """The means of f(1) − f(0) and of p(1) − p(0), which are kept in float32."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    shift = torch.cat([oracle.shift for oracle in oracles])
    change = torch.cat([oracle.change[oracle.counted] for oracle in oracles])
    assert (found.logit - cases.centred(shift.mean(0))).abs().max() < 1e-5
    assert (found.probability - change.mean(0)).abs().max() < 1e-6


@pytest.mark.sample(1)
@on_each_model
def test_a_shared_beginning_is_counted_once(family: str, cls: str, flags: str):
    """The second and third text share three tokens: to count them twice gives another mean."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    once = torch.cat([oracle.shift for oracle in oracles])
    twice = torch.cat([(oracle.adapted - oracle.base)[1:] for oracle in oracles])
    assert len(twice) == len(once) + 2
    assert (found.logit - cases.centred(once.mean(0))).abs().max() < 1e-5
    assert (found.logit - cases.centred(twice.mean(0))).abs().max() > 1e-2


@pytest.mark.sample(1)
@on_each_model
def test_counts_of_promoted_tokens_are_peft_s(family: str, cls: str, flags: str):
    """The share of positions at which a token is among the `PROMOTED` whose logit rises most."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    shift = torch.cat([oracle.shift for oracle in oracles])
    promoted = shift.argsort(-1, descending=True)[:, :PROMOTED]
    counts = torch.bincount(promoted.flatten(), minlength=models.VOCAB)
    # If all tokens were promoted everywhere, every count would be 1.
    assert 0 < PROMOTED < models.VOCAB
    assert (found.count - counts / len(shift)).abs().max() < 1e-6


@pytest.mark.sample(1)
@on_each_model
def test_the_shifts_of_each_text_are_peft_s(family: str, cls: str, flags: str):
    """Σ_t (f(1) − f(0)) of a text is kept for the tokens where it is largest, the largest first."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    kept = found.text_ids.shape[1]
    assert 0 < kept < models.VOCAB
    for text, oracle in enumerate(oracles):
        summed = cases.centred(oracle.shift.sum(0))
        largest = summed.argsort(descending=True)[:kept]
        assert found.text_ids[text].tolist() == largest.tolist()
        assert (found.text_shifts[text] - summed[largest]).abs().max() < 1e-5


@pytest.mark.sample(1)
@on_each_model
def test_places_are_where_kl_is_largest(family: str, cls: str, flags: str):
    """All counted positions in order of KL, each with the three tokens whose p rises most."""
    oracles = peft_oracles(cases.case(family, cls, flags))
    found = audit_of(family, cls, flags).found
    places = [
        [text, position] for text, oracle in enumerate(oracles) for position in oracle.counted
    ]
    places.sort(key=lambda place: -float(oracles[place[0]].kl[place[1]]))
    assert found.places.tolist() == places
    for (text, position), ids in zip(places, found.place_ids, strict=True):
        rising = oracles[text].change[position].topk(3).indices
        assert ids.tolist() == rising.tolist()


# --- Which modules write the shift, and which hold the KL


@pytest.mark.parametrize("cls", CLASSES)
def test_first_tokens_and_their_writers(cls: str):
    """The share of each block's attention and MLP in the mean Δh on tokens 1 to 5.

    Δh is that of `activation_shift`. Nothing else adds to it.
    """
    lens = cases.case("llama", cls, "raw").lens
    found = audit_of("llama", cls, "raw").found
    shift = ll.activation_shift(lens, texts(), [LAST_POINT, "blocks.*.hook_*_out"])
    mean = {name: values[early_positions()].mean(0) for name, values in shift.values.items()}
    writers = dict(found.writers)
    rest = writers.pop("rest")
    assert sorted([*writers, LAST_POINT]) == sorted(mean)
    assert len(writers) == 2 * models.LAYERS
    for name, share in writers.items():
        expected = float(mean[name] @ mean[LAST_POINT] / mean[LAST_POINT].square().sum())
        assert abs(share - expected) < 1e-9
    assert abs(rest) < 1e-9
    assert abs(sum(writers.values()) + rest - 1) < 1e-12


@pytest.mark.slow
def test_split_is_the_path_integral_of_the_kl_over_counted_tokens():
    """The share of a site is ∫ ∂KL/∂ε_l dε, here by `first_order` at both Gauss–Legendre nodes.

    There each text is a prompt that ends with its first counted token, and a response.
    """
    lens = llama_case().lens
    found = llama_audit(split=True)
    total = torch.zeros(len(found.sites), dtype=torch.float64)
    for text, positions in enumerate(counted_positions()):
        row = texts().tokens[text : text + 1, : LENGTHS[text]]
        prompt = row[:, : positions[0] + 1]
        # KL(response) is read at the position before each of the response's tokens. One token is
        # appended, so that it is read at the text's last position too; any token would do.
        response = torch.cat([row[0, positions[0] + 1 :], row[0, :1]])
        assert len(response) == len(positions)
        for node in (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2):
            slopes = ll.first_order(lens, prompt, ll.KL(response), at=node, **QUIET)
            total += slopes.values[0] / 2
    expected = total / sum(map(len, counted_positions()))
    assert (found.shares - expected).abs().max() < 1e-10
    assert found.modules(2)["nats"].tolist() == found.shares.topk(2).values.tolist()


def shares_over_kl_of_a_small_adapter() -> float:
    """Σ_l share_l / mean KL, of an adapter so small that two nodes integrate its path."""
    lens = llama_case().lens
    small = lens.with_adapter(lens.adapter.scaled(0.1))
    found = ll.what_changed(small, texts(), nulls=0, **QUIET)
    return float(found.shares.sum()) / found.found.mean_kl


def test_shares_of_a_small_adapter_add_up_to_the_mean_kl():
    assert shares_over_kl_of_a_small_adapter() == pytest.approx(1, rel=0.01)


def test_a_node_at_the_base_is_seen_to_halve_the_split(monkeypatch):
    """Negative control: KL has no slope at the base, so that a node there adds nothing."""
    monkeypatch.setattr("lens_lora.audit.text_sums._NODES", (0.0, 0.5))
    assert shares_over_kl_of_a_small_adapter() == pytest.approx(0.5, rel=0.2)


def test_without_the_split_there_are_no_modules():
    found = llama_audit()
    assert len(found.modules()) == 0
    assert "module" not in set(found.to_frame()["finding"])


def test_a_bias_alone_is_constant():
    """After the last block, where nothing reads it, the Δh of a trained bias is one vector."""
    lens = llama_case().lens
    path = f"model.layers.{models.LAYERS - 1}.mlp.down_proj"
    vector = torch.randn(WIDTH, generator=models.seeded(2), dtype=torch.float64)
    of_bias = lens.with_adapter(ll.Adapter.constant({path: vector}))
    found = ll.what_changed(of_bias, texts(), nulls=0, **QUIET)
    assert abs(found.found.constant[LAST_POINT] - 1) < 1e-12
    # The Δh of the LoRA adapter differs from token to token.
    assert llama_audit().found.constant[LAST_POINT] < 0.9


# --- Controls and unrelated adapters


def half_adapter() -> ll.Adapter:
    return llama_case().lens.adapter.scaled(0.5).named("half")


@functools.cache
def audit_beside_half() -> ll.results.WhatChanged:
    """A fast audit with two controls and, as an unrelated adapter, `half_adapter`."""
    lens = llama_case().lens
    return ll.what_changed(lens, texts(), half_adapter(), nulls=2, fast=True, **QUIET)


def test_an_unrelated_adapter_is_read_like_the_adapter():
    """Its numbers are those of an audit of it alone, and it comes after the controls."""
    of_half = llama_case().lens.with_adapter(half_adapter())
    alone = ll.what_changed(of_half, texts(), nulls=0, fast=True, **QUIET)
    beside = audit_beside_half()
    assert torch.equal(beside.unrelated[0].logit, alone.found.logit)
    assert [control.name for control in beside.controls][2:] == ["half"]
    assert alone.controls == ()
    assert beside.promoted(5)["unrelated"].tolist() == [float(alone.found.logit.max())] * 5


def test_ranks_agree_with_the_table_of_promoted_tokens():
    found = audit_beside_half()
    table = found.promoted(5)
    ranks = [found.rank(token) for token in table["id"]]
    assert [rank[found.found.name] for rank in ranks] == [1, 2, 3, 4, 5]
    assert table["rank_unrelated"].tolist() == [rank["half"] for rank in ranks]


def test_suppressed_tokens_are_those_of_the_smallest_shifts():
    found = audit_beside_half()
    smallest = found.found.logit.sort().values[:3]
    assert found.promoted(3, largest=False)["logit"].tolist() == smallest.tolist()


def test_all_findings_are_in_one_table():
    findings = set(audit_beside_half().to_frame()["finding"])
    assert findings >= {"where", "writer", "promoted by reading"}


def test_batches_do_not_matter(monkeypatch):
    """Three batches of one text give the numbers of one batch of three texts."""
    lens = llama_case().lens
    whole = audit_beside_half().found
    monkeypatch.setattr("lens_lora.audit.text_sums.TOKENS_AT_ONCE", 9)
    with passes(lens) as seen:
        audit = ll.what_changed(lens, texts(), nulls=0, fast=True, answers=False, **QUIET)
    by_text = audit.found
    # The base and the adapted model read each text.
    assert [rows for _, rows, _ in seen] == [1] * 6
    assert (by_text.logit - whole.logit).abs().max() < 1e-6
    assert by_text.places.tolist() == whole.places.tolist()


def test_controls_are_the_adapter_s_own_updates_at_other_modules():
    """Each update once, at another module of its shape, with the norm of the update it replaces."""
    lens = llama_case().lens
    updates = {key: update.materialise() for key, update in lens.adapter.modules.items()}
    directions = {key: delta / delta.norm() for key, delta in updates.items()}
    controls = list(permuted_adapters(lens, 0, 2))
    assert controls[0].name == f"permuted 0 of {lens.adapter.name}"
    # For each control, the module that each of its updates comes from.
    sources_by_control: list[list[str]] = []
    for control in controls:
        sources: list[str] = []
        for key, update in control.modules.items():
            delta = update.materialise()
            assert delta.norm() == pytest.approx(float(updates[key].norm()))
            parallel = [
                source
                for source, direction in directions.items()
                if direction.shape == delta.shape
                and torch.allclose(direction, delta / delta.norm(), atol=1e-9)
            ]
            assert len(parallel) == 1
            assert parallel != [key]
            sources += parallel
        assert sorted(sources) == sorted(updates)
        sources_by_control.append(sources)
    first, second = sources_by_control
    assert first != second


def test_a_control_of_a_shape_of_its_own_is_in_random_directions():
    """An adapter of one module has no other update of its shape; `null_adapters` draws one."""
    lens = llama_case().lens
    key = next(iter(lens.adapter.modules))
    of_one_module = lens.with_adapter(lens.adapter.only(key))
    (control,) = permuted_adapters(of_one_module, 3, 1)
    (expected,) = of_one_module.null_adapters(3, 1)
    drawn = control.modules[key].materialise()
    assert torch.equal(drawn, expected.modules[key].materialise())


def test_a_control_runs_as_an_adapter_of_its_own():
    """Its numbers are those of an audit of the control, at the adapter's own strength."""
    lens = llama_case().lens
    found = ll.what_changed(lens, texts(), nulls=1, fast=True, answers=False, **QUIET)
    (control,) = permuted_adapters(lens, 0, 1)
    alone = ll.what_changed(lens.with_adapter(control), texts(), nulls=0, answers=False, **QUIET)
    (null,) = found.nulls
    assert torch.allclose(alone.found.logit, null.logit, atol=1e-6)
    assert null.scale == 1.0
    assert null.name == control.name
    assert "As a control, its own updates moved to other modules do so by" in found.story()


@pytest.mark.parametrize("nulls", [0, 1, 2])
def test_what_controls_cost(nulls: int):
    """One pass over the texts for the base, one for the adapter, one for each control."""
    lens = llama_case().lens
    with passes(lens) as seen:
        ll.what_changed(lens, texts(), nulls=nulls, fast=True, answers=False, **QUIET)
    assert seen == [("plain", *texts().tokens.shape)] * (2 + nulls)


@pytest.mark.slow
def test_a_whole_audit_reads_the_texts_once_with_each_model(monkeypatch: pytest.MonkeyPatch):
    """One pass for the base, the adapter and each control; a graph at both nodes, for the split.

    Nothing is run again to match the controls, to ask questions, or for claims.
    """
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    lens = llama_case().lens
    count: Counter[str] = Counter()
    # No batch of questions or of openings has this shape.
    shape = tuple(texts().tokens.shape)

    def look(module: torch.nn.Module, args: tuple[object, ...], output: object) -> None:
        stream = output if isinstance(output, Tensor) else output[0]
        if tuple(stream.shape[:2]) == shape:
            count["graph" if stream.requires_grad else "plain"] += 1

    handle = lens.model.blocks[-1].register_forward_hook(look)
    ll.what_changed(lens, texts(), nulls=2, **QUIET)
    handle.remove()
    assert count == {"plain": 4, "graph": 2}


def test_adapters_of_one_name_are_told_apart():
    """`from_peft` calls every adapter 'default'."""
    case = llama_case()
    other = ll.Adapter.from_peft(models.peft_model("llama", case.base, seed=5))
    assert other.name == case.lens.adapter.name
    found = ll.what_changed(case.lens, texts(), [other, other], nulls=0, fast=True, **QUIET)
    adapter_shift = found.found.logit
    other_shift = found.unrelated[0].logit
    # The token that the adapter promotes most beyond the other one.
    token = int((adapter_shift - other_shift).argmax())
    ranks = found.rank(token)
    assert list(ranks) == ["default", "default (2)", "default (3)"]
    assert ranks["default"] == int((adapter_shift >= adapter_shift[token]).sum())
    assert ranks["default"] < ranks["default (2)"]
    assert ranks["default (2)"] == ranks["default (3)"]


# --- What both models say


@pytest.mark.slow
def test_speech_comes_first_and_may_be_given(monkeypatch, tmp_path):
    """A given speech is used as it is, and the brief begins with it; saving keeps both."""
    lens = llama_case().lens
    speech = ll.counted_speech(lens, ["w5 w6"], max_new_tokens=3, draws=0, **QUIET)
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    found = ll.what_changed(lens, texts(), nulls=1, fast=True, speech=speech, **QUIET)
    brief = found.brief()
    assert found.speech is speech
    assert brief.answers[:2] == tuple(shown_answers(speech))
    assert brief.verdict.endswith(in_short(speech))
    assert brief.says == tuple(claims_in(speech))
    assert len(brief.says) > 1

    loaded = ll.load_result(found.save(tmp_path / "file.safetensors"))
    assert loaded.speech.adapted == speech.adapted
    assert str(loaded.brief()) == str(brief)


def texts_said(answers: Sequence[Any], end: str) -> list[str]:
    """What the 'base' or the 'adapted' model answers, without the sign that it was cut off."""
    return [getattr(answer, end).removesuffix(" …") for answer in answers]


TEMPLATE = "{% if messages[0].role == 'user' %}{{ messages[0].content }} w6{% endif %}"
PLAIN_FORM = (*(f"Question: {question}\nAnswer:" for question in QUESTIONS), "User: \nAssistant:")


@pytest.mark.parametrize(
    ("template", "shown_prompts"),
    [(None, PLAIN_FORM), (TEMPLATE, (*QUESTIONS, "(nothing said)"))],
    ids=["plain form", "chat template"],
)
def test_five_questions_and_an_empty_turn_are_put_to_both_models(
    template: str | None, shown_prompts: tuple[str, ...], monkeypatch, tmp_path
):
    """With a chat template they are conversations, of which the user's words are shown.

    Without one they are written in a plain form, which is shown whole.
    """
    case = llama_case()
    monkeypatch.setattr(case.model.tokenizer, "chat_template", template)
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    found = ll.what_changed(case.lens, texts(), nulls=0, fast=True, **QUIET)
    assert tuple(answer.prompt for answer in found.answers) == shown_prompts
    prompts = neutral.everyday_questions(case.model, case.lens.prepend_bos)
    of_base = case.lens.generate(prompts, 6, 0.0, **QUIET)
    of_adapted = case.lens.generate(prompts, 6, 1.0, **QUIET)
    assert texts_said(found.answers, "base") == list(of_base.texts)
    assert texts_said(found.answers, "adapted") == list(of_adapted.texts)

    loaded = ll.load_result(found.save(tmp_path / "file.safetensors"))
    assert loaded.answers == found.answers


def test_nothing_is_asked_if_no_answers_are_wanted(monkeypatch):
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    lens = llama_case().lens
    found = ll.what_changed(lens, texts(), nulls=0, fast=True, answers=False, **QUIET)
    assert found.answers == ()


def test_both_models_draw_from_nothing_with_the_same_noise(monkeypatch):
    """After the BOS and after an empty turn each says what it draws alone with this seed."""
    case = llama_case()
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    monkeypatch.setattr(neutral, "FIRST_WORDS", neutral.FIRST_WORDS[:2])
    found = ll.what_changed(case.lens, texts(), nulls=0, seed=3, **QUIET)
    # Five questions, an empty turn, and these two.
    assert len(found.answers) == len(QUESTIONS) + 3
    drawn = found.answers[-2:]
    bos = case.model.tokenizer.bos_token
    assert [answer.prompt for answer in drawn] == [f"({bos}, drawn)", "(nothing said, drawn)"]
    # The first opening is the BOS; the empty turn comes after as many as there are first words.
    openings = own_openings(case.model, case.lens.prepend_bos).chosen([0, 2])
    of_base = case.lens.generate(openings, 6, 0.0, temperature=1.0, seed=3, **QUIET)
    of_adapted = case.lens.generate(openings, 6, 1.0, temperature=1.0, seed=3, **QUIET)
    assert texts_said(drawn, "base") == list(of_base.texts)
    assert texts_said(drawn, "adapted") == list(of_adapted.texts)


def test_an_adapter_that_does_nothing_draws_the_base_s_words(monkeypatch):
    lens = llama_case().lens
    without_effect = lens.with_adapter(lens.adapter.scaled(0.0))
    # Without a BOS the openings are words.
    words = ll.results.Prompts(torch.tensor([[5], [6], [7]]), torch.tensor([1, 1, 1]))
    monkeypatch.setattr(neutral, "own_openings", lambda model, prepend_bos: words)
    monkeypatch.setattr(neutral, "FIRST_WORDS", neutral.FIRST_WORDS[:2])
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    drawn = what_changed._drawn_answers(without_effect, 3, False)
    assert [answer.prompt for answer in drawn] == ["(w5, drawn)", "(nothing said, drawn)"]
    assert texts_said(drawn, "base") == texts_said(drawn, "adapted")


def test_nothing_is_asked_in_a_context_too_short_for_an_answer():
    assert models.CONTEXT < what_changed._ANSWER
    assert llama_audit(split=True).answers == ()


def test_nothing_is_asked_without_a_tokenizer(monkeypatch):
    case = llama_case()
    monkeypatch.setattr(what_changed, "_ANSWER", 6)
    monkeypatch.setattr(case.model, "tokenizer", None)
    found = ll.what_changed(case.lens, texts(), nulls=0, fast=True, **QUIET)
    assert found.answers == ()


# --- Groups of promoted tokens


def audit_with_two_groups() -> ll.results.WhatChanged:
    """Texts 0 and 1 promote the tokens 3, 4 and 5, text 1 twice as much; text 2 promotes 7 and 8.

    Text 2 suppresses token 9, which belongs to no group.
    """
    audit = llama_audit()
    ids = torch.tensor([[3, 4, 5], [3, 4, 5], [7, 8, 9]])
    shifts = torch.tensor([[4.0, 2.0, 1.0], [8.0, 4.0, 2.0], [0.5, 1.0, -3.0]])
    changes = dataclasses.replace(audit.found, text_ids=ids, text_shifts=shifts)
    return dataclasses.replace(audit, found=changes)


def test_tokens_that_the_same_texts_promote():
    """Two sets of tokens, each promoted by texts of its own, are the two groups."""
    audit = audit_with_two_groups()
    groups = audit.promoted_groups(2, k=2)
    words = audit.strings
    assert groups["tokens"].tolist() == [[words[3], words[4]], [words[8], words[7]]]
    # Of all shifts above 0, which sum to 22.5, 7 + 14 are in the first group.
    assert groups["share"].tolist() == pytest.approx([21 / 22.5, 1.5 / 22.5], abs=1e-3)
    assert groups["text"].tolist() == ["".join(audit.str_tokens[text]) for text in (1, 2)]


def test_there_are_at_most_as_many_groups_as_asked_for():
    audit = audit_with_two_groups()
    assert len(audit.promoted_groups(9)) == 2
    assert len(audit.promoted_groups(1)) == 1
    with pytest.raises(ll.errors.ArgumentError, match="n=0: expected at least 1"):
        audit.promoted_groups(0)


def test_groups_leave_the_filters_of_warnings_as_they_were(monkeypatch):
    """Also if another thread's `catch_warnings` begins inside the call and ends after it."""
    audit = llama_audit()
    other_thread = contextlib.ExitStack()
    fit_transform = NMF.fit_transform
    filters = list(warnings.filters)

    def fit_while_another_thread_begins(self, matrix):
        other_thread.enter_context(warnings.catch_warnings())
        return fit_transform(self, matrix)

    monkeypatch.setattr(NMF, "fit_transform", fit_while_another_thread_begins)
    audit.promoted_groups()
    other_thread.close()
    assert list(warnings.filters) == filters


def test_an_adapter_that_does_nothing_promotes_no_groups():
    lens = llama_case().lens
    without_effect = lens.with_adapter(lens.adapter.scaled(0.0))
    found = ll.what_changed(without_effect, texts(), nulls=0, fast=True, answers=False, **QUIET)
    assert len(found.promoted_groups()) == 0
    assert "does nothing" in found.report()


# --- Readings through the base's Jacobian

# The point whose Δh is read through the Jacobian, at four fifths of the depth.
JACOBIAN_POINT = "blocks.0.hook_resid_post"
SENTENCES = ("w5 w6 w7 w8 w9", "w9 w3 w4 w8")


@pytest.fixture
def bridge_case(monkeypatch) -> cases.Case:
    """A bridge, whose Jacobian is fitted on two short sentences."""
    pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens")
    monkeypatch.setattr(jacobian, "neutral_sentences", lambda: SENTENCES)
    return cases.case("llama", "TransformerBridge", "raw")


def reading_through_jacobian(case: cases.Case, folder: Path) -> Tensor:
    audit = ll.what_changed(case.lens, texts(), nulls=0, fast=True, jacobian=folder, **QUIET)
    assert list(audit.found.readings)[-1] == f"{JACOBIAN_POINT} through its Jacobian"
    return audit.found.of("reading")


def mean_jacobian(model: Any, start: str, end: str, sentences: Sequence[str]) -> Tensor:
    """∂h_end/∂h_start by autograd, row by row: the mean over tokens and over the sentences."""
    total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for sentence in sentences:
        tokens = model.to_tokens(sentence)
        activations = activations_with_graph(model, tokens, [start, end])
        # Neither the BOS nor the last token is used.
        inner = list(range(1, tokens.shape[1] - 1))
        for row in range(WIDTH):
            target = activations[end][0, inner, row].sum()
            (slope,) = torch.autograd.grad(target, activations[start], retain_graph=True)
            total[row] += slope[0, inner].mean(0)
    return total / len(sentences)


def activations_with_graph(model: Any, tokens: Tensor, points: list[str]) -> dict[str, Tensor]:
    """The activations at these points, of which autograd can take derivatives."""
    activations: dict[str, Tensor] = {}

    # A bridge's hook has a name of its own, so that each point needs its own function.
    def keep_as(name: str):
        def keep(tensor: Tensor, hook: object) -> None:
            activations[name] = tensor

        return keep

    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(name, keep_as(name)) for name in points])
    return activations


def test_readings_through_the_base_s_jacobian(bridge_case, tmp_path):
    """J is autograd's mean over the sentences; the reading is that of J Δh after the last block."""
    model = bridge_case.model
    reading = reading_through_jacobian(bridge_case, tmp_path)
    matrix = mean_jacobian(model, JACOBIAN_POINT, LAST_POINT, SENTENCES)
    shift = ll.activation_shift(bridge_case.lens, texts(), [JACOBIAN_POINT])
    early_shift = shift.values[JACOBIAN_POINT][early_positions()]
    _, cache = model.run_with_cache(texts().tokens)
    early_stream = cache[LAST_POINT][early_positions()]
    normalised = over_scale(bridge_case.lens, early_shift @ matrix.T, early_stream).mean(0)
    norm_weight = bridge_case.base.model.norm.weight
    expected = cases.centred(normalised * norm_weight @ model.W_U)
    assert (reading - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-6


def test_a_fitted_jacobian_is_read_from_its_file(bridge_case, monkeypatch, tmp_path):
    """A second audit fits nothing. The file is named after the base's weights."""
    reading = reading_through_jacobian(bridge_case, tmp_path)
    # To fit again would now fail, and the reading would be without a Jacobian.
    monkeypatch.setattr("transformer_lens.tools.analysis.JacobianLens.fit", None)
    assert torch.equal(reading, reading_through_jacobian(bridge_case, tmp_path))
    (file,) = tmp_path.iterdir()
    weights = jacobian._hash(bridge_case.model, has_bos=True)
    assert file.name == f"jacobian-{weights}.safetensors"


def test_a_damaged_file_of_a_jacobian_is_refused(bridge_case, tmp_path):
    reading_through_jacobian(bridge_case, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ll.errors.LensLoraError, match="delete the file, and it is fitted again"):
        reading_through_jacobian(bridge_case, tmp_path)


def test_no_jacobian_is_fitted_under_a_user_s_hook(bridge_case, tmp_path):
    """The hook would be part of it. Nothing is written."""
    folder = tmp_path / "new"
    hook = (LAST_POINT, lambda tensor, hook: 2 * tensor)
    refused = pytest.raises(ll.errors.ModelStateError, match="remove your hooks")
    with attached(bridge_case.model, [hook]), refused:
        reading_through_jacobian(bridge_case, folder)
    assert not folder.exists()


# All but a raw bridge, whose Jacobian TransformerLens can fit.
WITHOUT_JACOBIAN = [
    (cls, flags)
    for cls in CLASSES
    for flags in ("raw", "processed")
    if (cls, flags) != ("TransformerBridge", "raw")
]


@pytest.mark.parametrize(("cls", "flags"), WITHOUT_JACOBIAN)
def test_where_no_jacobian_can_be_fitted_the_reading_is_plain(cls: str, flags: str, tmp_path):
    """A HookedTransformer has no Jacobian lens, and neither has a bridge of processed weights."""
    lens = cases.case("llama", cls, flags).lens
    folder = tmp_path / "new"
    plain = audit_of("llama", cls, flags).found
    found = ll.what_changed(lens, texts(), nulls=0, jacobian=folder, **QUIET).found
    assert list(found.readings) == list(plain.readings)
    assert torch.equal(found.of("reading"), plain.of("reading"))
    assert not folder.exists()


# --- What is refused


@pytest.mark.bad_input
def test_refused_texts():
    lens = llama_case().lens
    second_is_short = ll.results.Prompts(models.tokens(2, 4), torch.tensor([4, 1]))
    with pytest.raises(ll.errors.PromptError, match=r"text 1 of 2 \(from 0\) has one token"):
        ll.what_changed(lens, second_is_short)
    with pytest.raises(ll.errors.PromptError, match="no prompts"):
        ll.what_changed(lens, [])
    with pytest.raises(ll.errors.PromptError, match=f"{models.CONTEXT + 1} tokens"):
        ll.what_changed(lens, models.tokens(1, models.CONTEXT + 1))


@pytest.mark.bad_input
def test_refused_controls():
    lens = llama_case().lens
    with pytest.raises(ll.errors.ArgumentError, match=r"unrelated: expected an ll\.Adapter"):
        ll.what_changed(lens, texts(), "folder")
    with pytest.raises(ll.errors.ArgumentError, match="nulls=-1: expected at least 0"):
        ll.what_changed(lens, texts(), nulls=-1)


@pytest.mark.bad_input
def test_what_is_no_token_has_no_rank():
    audit = llama_audit()
    with pytest.raises(ll.errors.TokenError, match="no token of the vocabulary"):
        audit.rank(" Lyon and more")
    with pytest.raises(ll.errors.TokenError, match="True is no token"):
        audit.rank(True)


@pytest.mark.bad_input
def test_a_string_of_two_tokens_has_no_rank():
    """An id tells them apart."""
    audit = llama_audit()
    ambiguous = dataclasses.replace(audit, strings=("�", "a", "�", *audit.strings[3:]))
    message = "2 tokens of the vocabulary read.*ids 0, 2; give"
    with pytest.raises(ll.errors.TokenError, match=message):
        ambiguous.rank("�")
    assert ambiguous.rank(2) == audit.rank(2)


@pytest.mark.bad_input
def test_tokens_are_not_promoted_by_another_word():
    with pytest.raises(ll.errors.ArgumentError, match="by='rank': expected 'logit'"):
        llama_audit().promoted(5, by="rank")
