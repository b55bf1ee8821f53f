"""What was asked is what is quoted: the prompt, and no answer that follows it in the same row."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import cases
import models
import pytest
from every_result import every_result

import lens_lora as ll
from lens_lora.core import Paged, PromptTokens, Ranked, Result
from lens_lora.show.text import prompt_text, short_prompt

ANSWER = "«what is said»"
BRIDGE = list(models.MAKERS)[-1]


def with_answer(value: Any) -> Any:
    """The same result, each of whose rows ends with an answer; positions keep their count."""
    if isinstance(value, Result) or dataclasses.is_dataclass(value):
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            if field.name in ("str_tokens", "made_on", "ranked_on"):
                fields[field.name] = tuple(map(answered, held))
            elif isinstance(held, Result) or type(held).__module__.startswith("lens_lora.results"):
                fields[field.name] = with_answer(held)
            elif isinstance(held, tuple) and held and isinstance(held[0], Result):
                fields[field.name] = tuple(map(with_answer, held))
        return dataclasses.replace(value, **fields) if fields else value
    return value


def answered(tokens: tuple[str, ...]) -> tuple[str, ...]:
    if len(tokens) < 2:
        return tokens
    return PromptTokens((*tokens[:-1], ANSWER), None, len(tokens) - 1)


EVERY = [with_answer(result) for result in every_result()]


def quoted(text: str) -> list[str]:
    """What stands between “ and ” in a text."""
    return re.findall(r"“([^”]*)”", text)


@pytest.mark.parametrize("result", EVERY, ids=lambda result: type(result).__name__)
def test_no_text_quotes_an_answer_as_asked(result: Result):
    """Reprs, stories and tables of every class of result."""
    said = [repr(result)]
    if isinstance(result, Paged):
        said.append(result.story())
    for text in said:
        assert not [words for words in quoted(text) if ANSWER in words]
    if isinstance(result, ll.results.Attribution):  # whose table of prompts has no quotes
        assert ANSWER not in repr(result)
        assert ANSWER not in result._repr_html_()


@pytest.mark.parametrize(
    "result",
    [result for result in EVERY if hasattr(result, "plot")],
    ids=lambda result: type(result).__name__,
)
def test_no_title_quotes_an_answer_as_asked(result: Any):
    takes_prompt = "prompt" in inspect.signature(result.plot).parameters
    count = len(getattr(result, "str_tokens", ()))
    asked = [{"prompt": 0}] if takes_prompt else [{}]
    if isinstance(result, Ranked) and count > 1 and not _by_position(result):
        asked.append({})
    for options in asked:
        figure = result.plot(**options)
        assert ANSWER not in (figure.layout.title.text or "")
        for legend in (trace.name or "" for trace in figure.data):
            assert ANSWER not in legend


def _by_position(result: Any) -> bool:
    by = getattr(result, "by", ())
    return not {"position", "token"}.isdisjoint(by) or bool(getattr(result, "by_position", False))


@pytest.mark.slow
def test_a_page_quotes_no_answer_as_asked():
    for result in EVERY:
        if isinstance(result, Paged):
            page = re.sub(r"<script.*?</script>", "", result.report(), flags=re.DOTALL)
            assert not [words for words in quoted(page) if ANSWER in words]
            assert ANSWER not in page.partition("</title>")[0]


def test_what_is_asked_is_cut_from_the_row():
    row = PromptTokens(("<bos>", "The", " capital", " is", " Paris"), None, 4)
    assert (prompt_text(row), short_prompt(row)) == ("The capital is", "The capital is")
    assert PromptTokens.of(row).asked == ("<bos>", "The", " capital", " is")
    assert PromptTokens.of(("a", "b")).asked == ("a", "b")
    assert PromptTokens(("a", "b")).length == 2


# --- Of a model


@pytest.fixture
def lens(float64) -> ll.LoraLens:
    return cases.case("llama", BRIDGE, "raw").lens


TEXT = "w20 w21 w22"
DOC = "w41 w42 w43"
PRE = "w51 w52"
RESPONSE = "w44 w45 w46"
ANSWERS = ("w41", "w42", "w51", "w44", "w45")


def results_of(lens: ll.LoraLens) -> dict[str, Any]:
    """Of answers of several tokens, of responses, and of prompts that hold one."""
    quiet: dict[str, Any] = {"progress": False}
    margin = ll.AnswerMargin(DOC, PRE)
    log_prob = ll.AnswerLogProb(RESPONSE)
    return {
        "margin": ll.fact_margin(lens, TEXT, DOC, PRE, **quiet),
        "first order": ll.first_order(lens, TEXT, margin),
        "by position": ll.first_order(lens, TEXT, margin, by="position"),
        "by token": ll.first_order(lens, TEXT, log_prob, by="token"),
        "remainder": ll.remainder(lens, TEXT, margin, **quiet),
        "curve": ll.remainder_curve(lens, TEXT, margin, **quiet),
        "path": ll.path_attribution(lens, TEXT, log_prob, tol=0.5, **quiet),
        "effects": ll.patch_sites(lens, TEXT, margin, **quiet),
        "coupling": ll.coupling(lens, TEXT, margin, group="layer", **quiet),
        "edges": ll.edges(lens, TEXT, margin, **quiet),
        "divergence": ll.kl_shares(lens, TEXT, RESPONSE, **quiet),
        "token shifts": ll.token_shifts(lens, TEXT, RESPONSE),
        "activations": ll.lora_activations(lens, TEXT, RESPONSE),
        "activation shift": ll.activation_shift(
            lens, lens.prompts(TEXT, response=RESPONSE), "blocks.0.hook_resid_post"
        ),
        "bank": ll.bank(lens.model, TEXT, margin, **quiet).first_order(lens.adapter),
        "response": ll.explain(lens, TEXT, response=RESPONSE, fast=True, **quiet),
        "explanation": ll.explain(lens, TEXT, DOC, PRE, fast=True, **quiet),
    }


def test_answers_of_several_tokens_are_not_quoted_as_asked(lens: ll.LoraLens, tmp_path: Path):
    """Also after a file; whatever is quoted of a prompt is w20w21w22."""
    for name, result in results_of(lens).items():
        for one in (result, ll.load_result(result.save(tmp_path / f"{name}.safetensors"))):
            texts = [one.plot().layout.title.text or ""] if hasattr(one, "plot") else []
            if hasattr(one, "story"):
                story = one.story()
                opening = story.partition(". ")[0]
                assert "w20" in opening
                texts.append(opening)
            for text in texts:
                for words in quoted(text):
                    is_prompt = "w20" in words
                    assert not (is_prompt and any(token in words for token in ANSWERS)), name
            held = getattr(one, "attribution", one)
            for tokens in getattr(held, "str_tokens", ()):
                assert prompt_text(tokens).replace(" ", "") == "w20w21w22", name


def test_a_conversation_is_called_by_what_its_user_said():
    row = PromptTokens(("<|im_start|>", "user", " hi", "<|im_end|>", " yes"), "hi", 4)
    assert (prompt_text(row), short_prompt(row)) == ("hi", "hi")


def test_rankings_of_one_prompt_and_two_answers_are_of_other_readouts(lens: ll.LoraLens):
    """The prompts are the same, so that is not what is said to differ."""
    one = ll.first_order(lens, TEXT, ll.AnswerLogProb("w41 w42"))
    other = ll.patch_sites(lens, TEXT, ll.AnswerLogProb("w51 w52 w53"), progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="different readouts"):
        ll.compare(one, other)
    with pytest.raises(ll.errors.ArgumentError, match="has other readout than what is run"):
        ll.faithfulness(lens, TEXT, ll.AnswerLogProb("w51 w52"), one, progress=False)


def test_responses_that_a_label_does_not_name_are_still_told_apart(lens: ll.LoraLens):
    """KL's label says "of the response", and three answers' names its first two."""
    kl = ll.KL("w41 w42")
    other_kl = ll.KL("w51 w52")
    assert kl.label == other_kl.label
    one = ll.first_order(lens, TEXT, kl, at=1.0)
    other = ll.patch_sites(lens, TEXT, other_kl, progress=False)
    with pytest.raises(ll.errors.ArgumentError, match="of different responses"):
        ll.compare(one, other)
    with pytest.raises(ll.errors.ArgumentError, match="has other responses than what is run"):
        ll.faithfulness(lens, TEXT, other_kl, one, progress=False)
    assert ll.compare(one, ll.patch_sites(lens, TEXT, kl, progress=False)).pearson.isfinite().all()


def test_a_file_that_does_not_say_where_its_prompts_end_can_be_compared(lens: ll.LoraLens):
    readout = ll.AnswerLogProb("w41 w42")
    new = ll.first_order(lens, TEXT, readout)
    old = dataclasses.replace(new, str_tokens=tuple(map(tuple, new.str_tokens)))
    effects = ll.patch_sites(lens, TEXT, readout, progress=False)
    assert ll.compare(old, effects).pearson.equal(ll.compare(new, effects).pearson)
    ll.faithfulness(lens, TEXT, readout, old, progress=False)
