"""Arguments of odd types: refused by name, or right. Never converted into something else.

What numpy and torch give for a number or an id is one; a truth value, a string of digits, a float
id, NaN or a list in place of a number is none.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pytest
import torch
from chats import ASK
from every_result import every_result
from results_by_hand import two_prompts

import lens_lora as ll
from lens_lora import arguments
from lens_lora.core import Tokens
from lens_lora.responses.answers import answer_ids

pytestmark = pytest.mark.bad_input
NAN = math.nan
INF = math.inf
MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens(batch=2, pos=4)


@pytest.fixture(scope="module")
def lens() -> ll.LoraLens:
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    return ll.LoraLens(next(iter(models.MAKERS.values()))(base), adapter)


# --- token ids

WORDS = SimpleNamespace(
    cfg=SimpleNamespace(d_vocab=models.VOCAB, n_ctx=32), tokenizer=models.tokenizer()
)
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16]
IDS = {
    "numpy": (np.int64(7), [7, 7]),
    "numpy of eight bits": (np.uint8(7), [7, 7]),
    "array without axes": (np.array(7), [7, 7]),
    "list of numpy": ([np.int32(7), np.int64(8)], [7, 8]),
    "list of tensors": ([torch.tensor(7), "w8"], [7, 8]),
    "range": (range(7, 9), [7, 8]),
    "numpy string": (np.str_("w7"), [7, 7]),
    **{str(d): (torch.tensor([7, 8], dtype=d), [7, 8]) for d in INTEGERS},
}
NO_IDS = {
    "truth": True,
    "numpy truth": np.True_,
    "truths": [True, False],
    "tensor of truths": torch.tensor([True, False]),
    "float": 7.0,
    "numpy float": np.float32(7),
    "floats": [7.5, 8.9],
    "tensor of floats": torch.tensor([7.0, 8.0]),
    "complex": torch.tensor([7 + 0j, 8 + 0j]),
    "bytes": b"w7",
    "None": None,
    "set": {7, 8},
    "dict": {7: 8, 8: 9},
    "nested": [[7], [8]],
    "negative": -1,
    "negative tensor": torch.tensor([-7, 8]),
    "negative of eight bits": torch.tensor([-7, 8], dtype=torch.int8),
    "beyond 2⁶³": 2**70,
    "half a surrogate pair": "w\ud800",
}


@pytest.mark.parametrize("token, ids", IDS.values(), ids=IDS)
def test_ids_of_any_integer(token: Any, ids: list[int]):
    assert Tokens(WORDS).one_each(token, 2).tolist() == ids
    if not isinstance(token, range | np.ndarray) and not torch.is_tensor(token):
        assert answer_ids(WORDS, token, 2) == [(i,) for i in ids]


@pytest.mark.parametrize("token", NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize("make", [ll.Logit, ll.LogProb, lambda t: ll.Margin(5, t)])
def test_no_ids(make: Callable[[Any], Any], token: Any):
    with pytest.raises(ll.errors.TokenError):
        make(token).of_logits(WORDS, 2)


@pytest.mark.parametrize("answer", NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize("make", [ll.AnswerLogProb, lambda a: ll.AnswerMargin(5, a)])
def test_no_answers(make: Callable[[Any], Any], answer: Any):
    with pytest.raises(ll.errors.TokenError):
        make(answer).reading(WORDS, ll.results.Prompts(TOKENS, torch.tensor([4, 4])))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_answers_of_any_integer_dtype(dtype: torch.dtype):
    ids = torch.tensor([7, 8], dtype=dtype)
    for given in (ids, ids[None], [ids, "w7 w8"]):
        assert answer_ids(WORDS, given, 2) == [(7, 8), (7, 8)]


def test_ids_of_several_answers_are_no_answer():
    """[batch, token] read as one long answer would be another number."""
    with pytest.raises(
        ll.errors.TokenError, match=r"shape \(2, 2\); expected \[token\], or a list"
    ):
        answer_ids(WORDS, torch.tensor([[7, 8], [9, 10]]), 2)


def test_labels_name_the_id():
    for seven in (7, np.int64(7), torch.tensor(7), np.array(7)):
        assert ll.Logit(seven).label == "logit(7)"
    assert ll.Logit(np.str_("w7")).label == "logit('w7')"


# --- prompts


@pytest.mark.parametrize("dtype", INTEGERS)
def test_prompts_of_any_integer_dtype(lens: ll.LoraLens, dtype: torch.dtype):
    """An index of eight bits without a sign is a mask to torch."""
    expected = lens.logits(TOKENS)
    assert torch.equal(lens.logits(TOKENS.to(dtype)), expected)
    padded = ll.results.Prompts(TOKENS.to(dtype), torch.tensor([4, 4]).to(dtype))
    assert torch.equal(lens.logits(padded), expected)


NO_PROMPTS = {
    "conversation as one dict": {"role": "user", "content": "w5"},
    "set": {"w5", "w6"},
    "bytes": b"w5",
    "number": 5,
    "None": None,
    "nothing": (),
    "ids in a list": [5, 6, 7],
    "array": np.array([[5, 6]]),
    "strings and ids": ["w5", 6],
    "tensor of floats": TOKENS.float(),
    "tensor of truths": TOKENS > 5,
    "complex": TOKENS + 0j,
    "three axes": TOKENS[None],
    "no token": TOKENS[:, :0],
    "negative": -TOKENS,
    "half a surrogate pair": ["w5", "w\ud800"],
}


@pytest.mark.parametrize("prompts", NO_PROMPTS.values(), ids=NO_PROMPTS)
def test_no_prompts(lens: ll.LoraLens, prompts: Any):
    with pytest.raises(ll.errors.PromptError):
        lens.prompts(prompts)


def test_strings_of_a_generator_are_read_once(lens: ll.LoraLens):
    assert lens.prompts(word for word in ("w5", "w6 w7")).batch == 2


@pytest.mark.parametrize("tokens, lengths", [
    ([[5, 6]], torch.tensor([2])), (TOKENS, [4, 4]), (TOKENS.double(), torch.tensor([4, 4])),
    (TOKENS, torch.tensor([True, True])), (TOKENS, torch.tensor([4.0, 4.0])),
])  # fmt: skip
def test_no_lengths(tokens: Any, lengths: Any):
    with pytest.raises(ll.errors.PromptError):
        ll.results.Prompts(tokens, lengths)


# --- truth values


@pytest.mark.bad_input
@pytest.mark.parametrize("check", [0, "no", np.False_])
def test_check_is_true_false_or_none(lens: ll.LoraLens, check: Any):
    """0 was True to a new lens, and False to one of with_adapter."""
    with pytest.raises(ll.errors.ArgumentError, match="expected True, False or None"):
        ll.LoraLens(lens.model, lens.adapter, check=check)
    with pytest.raises(ll.errors.ArgumentError, match="expected True, False or None"):
        lens.with_adapter(lens.adapter, check=check)


# --- numbers

HALVES = {
    "numpy": np.float32(0.5),
    "array without axes": np.array(0.5),
    "tensor": torch.tensor(0.5),
    "double": torch.tensor(0.5, dtype=torch.float64),
}
AT: dict[str, Callable[[ll.LoraLens, Any], Any]] = {
    "first_order": lambda lens, at: ll.first_order(lens, TOKENS, MARGIN, at=at),
    "first_orders": lambda lens, at: ll.first_order(lens, TOKENS, [MARGIN], at=at)[0],
    "logit_shift": lambda lens, at: ll.logit_shift(lens, TOKENS, tokens=[5], at=at),
    "coupling": lambda lens, at: ll.coupling(lens, TOKENS, MARGIN, group="kind", at=at),
    "tangents": lambda lens, at: ll.tangents(lens, TOKENS, "blocks.0.hook_resid_post", at=at),
    "gradients": lambda lens, at: ll.gradients(
        lens, TOKENS, MARGIN, "blocks.0.hook_resid_post", at=at
    ),
    "feature_shift": lambda lens, at: ll.feature_shift(
        lens, TOKENS, torch.eye(16)[:2], "blocks.0.hook_resid_post", at=at
    ),
    "feature_shift by site": lambda lens, at: ll.feature_shift(
        lens, TOKENS, torch.eye(16)[:2], at=at, by="site"
    ),
}
NO_NUMBERS = {
    "text": "0.5", "truth": True, "None": None, "list": [0.5], "several": torch.tensor([0.5, 1.0]),
    "NaN": NAN, "infinity": INF, "complex": 0.5j, "numpy truth": np.True_,
    "tensor of NaN": torch.tensor(NAN), "tensor of truth": torch.tensor(True),
}  # fmt: skip


@pytest.mark.parametrize("call", AT.values(), ids=AT)
def test_at_is_a_number(lens: ll.LoraLens, call: Callable[[ll.LoraLens, Any], Any]):
    def numbers(at: Any) -> torch.Tensor:
        found = call(lens, at)
        if isinstance(found, ll.results.FeatureShift):
            return found.first_order
        if isinstance(found, ll.results.Coupling):
            return found.matrix
        return (
            getattr(found, "values", None)
            if hasattr(found, "meta")
            else found["blocks.0.hook_resid_post"]
        )

    expected = numbers(0.5)
    for half in HALVES.values():
        assert torch.equal(numbers(half), expected)
    for other in NO_NUMBERS.values():
        with pytest.raises(ll.errors.ArgumentError, match="at="):
            call(lens, other)


NO_GATES = {
    **{name: value for name, value in NO_NUMBERS.items() if name != "tensor of NaN"},
    "list of one": [1.0],
    "array": np.ones(14),
    "truths per site": torch.ones(14, dtype=torch.bool),
    "complex per site": torch.ones(14) + 0j,
    "too few": torch.ones(3),
    "text by name": {"*": "1"},
    "truth by name": {"*": True},
    "NaN by name": {"*": NAN},
    "list by name": {"*": [1.0]},
    "by a number": {3: 1.0},
    "by no site": {"*.attn.x": 1.0},
}
ONES = {
    "numpy": np.float32(1),
    "integer": 1,
    "array without axes": np.array(1.0),
    "tensor": torch.tensor(1),
    "per site": torch.ones(14, dtype=torch.int32),
    "by name": {"*": np.float64(1)},
    "by name, of tensors": {"*": torch.tensor(1.0)},
}


@pytest.mark.parametrize("scale", NO_GATES.values(), ids=NO_GATES)
def test_no_gates(lens: ll.LoraLens, scale: Any):
    with pytest.raises(ll.errors.LensLoraError):
        lens.logits(TOKENS, scale)
    with pytest.raises(ll.errors.LensLoraError), lens.applied(scale):
        pass


@pytest.mark.parametrize("scale", ONES.values(), ids=ONES)
def test_gates(lens: ll.LoraLens, scale: Any):
    assert torch.equal(lens.logits(TOKENS, scale), lens.logits(TOKENS))


BY_ROW: dict[str, Callable[[ll.LoraLens, Any], Any]] = {
    "logits": lambda lens, gates: lens.logits(TOKENS, gates),
    "generate": lambda lens, gates: lens.generate(TOKENS, 2, gates, progress=False),
    "activations": lambda lens, gates: ll.lora_activations(lens, TOKENS, scale=gates),
    "activation_shift": lambda lens, gates: ll.activation_shift(
        lens, TOKENS, "blocks.0.hook_resid_post", scale=gates
    ),
    "contrast": lambda lens, gates: ll.contrast(
        lens, TOKENS, TOKENS.roll(1, 1), "blocks.0.hook_resid_post", scale=gates
    ),
    "tangents": lambda lens, gates: ll.tangents(lens, TOKENS, scale=gates),
    "feature_shift": lambda lens, gates: ll.feature_shift(
        lens, TOKENS, torch.eye(16)[:2], "blocks.0.hook_resid_post", scale=gates
    ),
}


@pytest.mark.parametrize("call", BY_ROW.values(), ids=BY_ROW)
def test_gates_of_other_rows_than_there_are(lens: ll.LoraLens, call: Callable[..., Any]):
    call(lens, torch.ones(2, 14))
    with pytest.raises(ll.errors.SiteError, match="gates of 3 .*, and there are 2"):
        call(lens, torch.ones(3, 14))
    with pytest.raises(ll.errors.ArgumentError, match="gates of no point"):
        call(lens, torch.ones(0, 14))


def test_gates_of_other_rows_within_a_block_and_a_list(lens: ll.LoraLens):
    gates = torch.ones(3, 14)
    with pytest.raises(ll.errors.SiteError, match="gates of 3 rows"), lens.applied(gates) as model:
        model(TOKENS)
    with pytest.raises(ll.errors.SiteError, match="gates of 3 rows"):
        lens.model.run_with_hooks(TOKENS, fwd_hooks=lens.fwd_hooks(gates))


def test_gates_that_are_not_finite_are_named(lens: ll.LoraLens):
    with pytest.raises(ll.errors.ArgumentError, match="a gate is NaN or infinite"):
        lens.logits(TOKENS, torch.full((14,), NAN))


def faithful(lens: ll.LoraLens, **how: Any) -> object:
    scores = torch.ones(len(lens.sites))
    return ll.faithfulness(lens, TOKENS, MARGIN, scores, progress=False, **how)


FLOATS: dict[str, Callable[[ll.LoraLens, Any], Any]] = {
    "tol": lambda lens, x: ll.path_attribution(lens, TOKENS, MARGIN, tol=x),
    "threshold": lambda lens, x: ll.reliability(lens, TOKENS, MARGIN, threshold=x),
    "floor": lambda lens, x: ll.reliability(lens, TOKENS, MARGIN, floor=x),
    "max_memory": lambda lens, x: ll.first_order(
        lens, TOKENS, MARGIN, mode="forward", max_memory="none" if x is None else x
    ),
    "scales": lambda lens, x: ll.remainder_curve(lens, TOKENS, MARGIN, scales=[0.5, x]),
    "fractions": lambda lens, x: faithful(lens, fractions=[0.5, x]),
}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_numbers(lens: ll.LoraLens, name: str, value: Any):
    with pytest.raises(ll.errors.ArgumentError, match=f"{name}="):
        FLOATS[name](lens, value)


def explained(lens: ll.LoraLens, null: Any) -> object:
    return ll.explain(lens, TOKENS[:1], 5, 9, null=null, fast=True, progress=False)


def compared(**how: Any) -> object:
    return ll.compare(two_prompts(), two_prompts(), **how)


COUNTS: dict[str, Callable[[ll.LoraLens, Any], Any]] = {
    "max_nodes": lambda lens, n: ll.path_attribution(lens, TOKENS, MARGIN, max_nodes=n),
    "draws": lambda lens, n: ll.null_test(lens, TOKENS, MARGIN, draws=n),
    "exact": lambda lens, n: ll.null_test(lens, TOKENS, MARGIN, exact=n),
    "seed": lambda lens, n: ll.null_test(lens, TOKENS, MARGIN, seed=n),
    "draws of faithfulness": lambda lens, n: faithful(lens, draws=n),
    "seed of faithfulness": lambda lens, n: faithful(lens, seed=n),
    "null": explained,
    "k": lambda lens, n: two_prompts().top(n),
    "k of compare": lambda lens, n: compared(k=n),
    "bootstrap": lambda lens, n: compared(bootstrap=n),
    "seed of compare": lambda lens, n: compared(seed=n),
    "prompt": lambda lens, n: two_prompts().top(prompt=n),
}
NO_COUNTS = {
    "text": "5", "truth": True, "float": 5.0, "list": [5], "NaN": NAN, "negative": -1,
    "several": torch.tensor([5, 6]), "numpy float": np.float64(5), "complex": 5j,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NO_COUNTS.values(), ids=NO_COUNTS)
def test_whole_numbers(lens: ll.LoraLens, name: str, value: Any):
    with pytest.raises(ll.errors.ArgumentError, match=f"{name.split(' of ')[0]}[= ]"):
        COUNTS[name](lens, value)


HOW_MANY = ("k", "n", "context", "count")
# What such a method may not do without.
NEEDED: dict[str, Callable[[Any, Path], Any]] = {
    "site": lambda result, folder: result.sites[0].name,
    "finding": lambda result, folder: result.findings[0],
    "path": lambda result, folder: folder / "file.json",
    "prompt": lambda result, folder: 0,
    "name": lambda result, folder: "blocks.0.hook_resid_post",
}


def counted_methods(result: object) -> list[tuple[str, str]]:
    """The public methods that take how many of something are shown, with the argument's name."""
    found: list[tuple[str, str]] = []
    for name, member in inspect.getmembers(type(result), callable):
        if not name.startswith("_"):
            for argument in inspect.signature(member).parameters:
                if argument in HOW_MANY:
                    found.append((name, argument))
    return found


@pytest.mark.parametrize("result", every_result(), ids=lambda result: type(result).__name__)
def test_how_many_are_shown_is_a_whole_number(result: Any, tmp_path: Path):
    for name, argument in counted_methods(result):
        method = getattr(result, name)
        given: dict[str, Any] = {}
        for parameter in inspect.signature(method).parameters.values():
            has_site = parameter.name != "site" or result.sites
            if parameter.name in NEEDED and has_site:
                given[parameter.name] = NEEDED[parameter.name](result, tmp_path)
        for value in (-1, True, 2.5, "2", [2]):
            with pytest.raises(ll.errors.ArgumentError, match=f"{argument}[= ]"):
                method(**{**given, argument: value})


def test_whole_numbers_of_numpy_and_torch(lens: ll.LoraLens):
    expected = two_prompts().top(2, prompt=1)
    for one, two in ((np.int64(1), np.uint8(2)), (torch.tensor(1), torch.tensor(2))):
        assert two_prompts().top(two, prompt=one).equals(expected)
    drawn = [ll.null_test(lens, TOKENS, MARGIN, draws=n, progress=False) for n in (2, np.int64(2))]
    assert torch.equal(drawn[0].null, drawn[1].null)
    assert drawn[0].seed == drawn[1].seed


def test_more_than_there_are(lens: ll.LoraLens):
    """k beyond the vocabulary, the sites or the groups is all of them; 0 is none."""
    shift = ll.logit_shift(lens, TOKENS[:1], by_site=False)
    for k, rows in ((10**6, models.VOCAB), (0, 0)):
        assert len(shift.promoted(k=k)) == len(shift.suppressed(k=k)) == rows
    for k, rows in ((99, 4), (0, 0)):
        assert len(two_prompts().top(k)) == rows
    for k in (-1, True, 2.5, "2"):
        with pytest.raises(ll.errors.ArgumentError, match="k="):
            shift.promoted(k=k)


# --- words, names and things

WRONG: dict[str, tuple[Callable[[ll.LoraLens], Any], str]] = {
    "by misspelt": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, by="positon"), "positon"),
    "by None": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, by=None), "by=None"),
    "by a number": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, by=3), "by=3"),
    "by a list of others": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, by=[3]), r"by=\[3\]"),
    "mode": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, mode=["reverse"]), "mode="),
    "rules": (lambda lens: ll.first_order(lens, TOKENS, MARGIN, rules="patterns"), "rules="),
    "how": (lambda lens: ll.patch_sites(lens, TOKENS, MARGIN, how=["add_one"]), "how="),
    "group": (lambda lens: ll.coupling(lens, TOKENS, MARGIN, group=["layer"]), "group"),
    "no groups": (lambda lens: ll.coupling(lens, TOKENS, MARGIN, group={}), "holds no group"),
    "a group of a number": (
        lambda lens: ll.coupling(lens, TOKENS, MARGIN, group={"a": 3}), "a group of 3"),
    "a group of numbers": (
        lambda lens: ll.coupling(lens, TOKENS, MARGIN, group={"a": [3]}), "3 names no site"),
    "sites": (lambda lens: ll.patch_sites(lens, TOKENS, MARGIN, sites=[3]), "3 names no site"),
    "sites of a number": (
        lambda lens: ll.patch_sites(lens, TOKENS, MARGIN, sites=0), "sites=0"),
    "sites of a truth": (
        lambda lens: ll.lora_activations(lens, TOKENS, sites=False), "sites=False"),
    "scales of kl_shares": (lambda lens: ll.kl_shares(lens, TOKENS, scales=0.5), "scales=0.5"),
    "no scales": (lambda lens: ll.kl_shares(lens, TOKENS, scales=None), "scales=None"),
    "a placeholder": (
        lambda lens: ll.patchscope(
            lens, torch.ones(16), "blocks.1.hook_resid_pre", prompt="w5 w6", placeholder=""),
        "placeholder=''"),
    "k of token_shifts": (lambda lens: ll.token_shifts(lens, TOKENS, [5], k=True), "k=True"),
    "between what": (
        lambda lens: ll.token_shifts(lens, TOKENS, [5], between=0.5), "between=0.5"),
    "between many points": (
        lambda lens: ll.token_shifts(
            lens, TOKENS, torch.tensor([5]), between=(0.0, torch.ones(2, 14))),
        r"between holds gates of shape \(2, 14\)"),
    "direction": (
        lambda lens: ll.patch_activations(lens, TOKENS, MARGIN, "*", direction=["x"]),
        "direction="),
    "positions": (
        lambda lens: ll.patch_activations(lens, TOKENS, MARGIN, "*", positions="every"),
        "positions='every'"),
    "a truth for a position": (
        lambda lens: ll.patch_activations(lens, TOKENS, MARGIN, "*", positions=True),
        "positions=True"),
    "a mask for positions": (
        lambda lens: ll.patch_activations(
            lens, TOKENS, MARGIN, "*", positions=torch.tensor([True, False])), "positions="),
    "heads": (
        lambda lens: ll.patch_activations(lens, TOKENS, MARGIN, "*hook_z", heads=["each"]),
        "heads="),
    "over": (lambda lens: ll.best_subset(lens, TOKENS, MARGIN, over=["heads"]), "over="),
    "a mask for held out": (
        lambda lens: ll.best_subset(
            lens, TOKENS, MARGIN, held_out=torch.tensor([True, False])), "held_out="),
    "an axis of a shift": (
        lambda lens: ll.activation_shift(lens, TOKENS, "*resid_post", by=["position"]), "by="),
    "a float for a position": (
        lambda lens: ll.patch_activations(lens, TOKENS, MARGIN, "*", positions=[1.0]),
        r"positions=\[1.0\]"),
    "names": (lambda lens: ll.tangents(lens, TOKENS, 3), "names=3"),
    "names of a number": (lambda lens: ll.tangents(lens, TOKENS, [3]), "3 names no hook point"),
    "a name": (
        lambda lens: ll.feature_shift(lens, TOKENS, torch.eye(16), 3),
        "3 names no hook point"),
    "a string of tokens": (
        lambda lens: ll.logit_shift(lens, TOKENS, tokens="w5"), "tokens='w5': expected a list"),
    "no tokens": (lambda lens: ll.logit_shift(lens, TOKENS, tokens=[]), "tokens=.*nothing"),
    "one of several sites": (
        lambda lens: ll.logit_shift(lens, TOKENS[:1], tokens=[5, 6]).promoted("*.attn.q"),
        "matches 2 sites; name one"),
    "scales that are a number": (
        lambda lens: ll.remainder_curve(lens, TOKENS, MARGIN, scales=0.5), "scales=0.5: expected"),
    "scales that are text": (
        lambda lens: ll.remainder_curve(lens, TOKENS, MARGIN, scales="01"), "scales='01': exp"),
    "scales of two axes": (
        lambda lens: ll.remainder_curve(lens, TOKENS, MARGIN, scales=torch.ones(2, 2)),
        "scales has the shape"),
    "no readouts": (lambda lens: ll.first_order(lens, TOKENS, []), "readout=.*at least one"),
    "a group of several readouts": (
        lambda lens: ll.first_order(lens, TOKENS, [MARGIN, MARGIN], by="token", group="layer"),
        "group= takes one readout"),
    "directions of NaN": (
        lambda lens: ll.feature_shift(lens, TOKENS, torch.full((1, 16), NAN), by="site"),
        "NaN or infinite"),
    "a function": (lambda lens: ll.Readout.of("entropy"), "cannot be called"),
    "a label": (lambda lens: ll.Readout.of(len, 3), "label=3"),
    "the model": (lambda lens: ll.first_order(lens.model, TOKENS, MARGIN), "ll.LoraLens.model"),
    "the adapter": (lambda lens: ll.explain(lens.adapter, TOKENS, 5, 9), "the lens is a Adapter"),
    "no attribution": (lambda lens: ll.compare("path", two_prompts()), "compare takes"),
    "a table": (lambda lens: ll.compare(two_prompts(), two_prompts().to_frame()), "compare takes"),
}  # fmt: skip


NO_LENS: dict[str, Callable[[Any], object]] = {
    "activations": lambda x: ll.lora_activations(x, TOKENS),
    "activation_shift": lambda x: ll.activation_shift(x, TOKENS, "blocks.0.hook_resid_post"),
    "alignment": lambda x: ll.weight_alignment(x, torch.ones(16)),
    "constant_part": lambda x: ll.constant_part(x, TOKENS),
    "explain": lambda x: ll.explain(x, TOKENS, 5, 9),
    "feature_shift": lambda x: ll.feature_shift(x, TOKENS, torch.ones(16), "hook_embed"),
    "gradients": lambda x: ll.gradients(x, TOKENS, MARGIN),
    "kl_shares": lambda x: ll.kl_shares(x, TOKENS),
    "logit_shift": lambda x: ll.logit_shift(x, TOKENS),
    "removal_cost": lambda x: ll.removal_cost(x),
    "counted_speech": lambda x: ll.counted_speech(x),
    "tangents": lambda x: ll.tangents(x, TOKENS),
    "token_shifts": lambda x: ll.token_shifts(x, TOKENS, [5]),
    "what_changed": lambda x: ll.what_changed(x),
}


@pytest.mark.parametrize("call", NO_LENS.values(), ids=NO_LENS)
def test_what_is_no_lens_is_refused(lens: ll.LoraLens, call: Callable[[Any], object]):
    """The adapter or the model in place of the lens, and nothing at all."""
    for other in (lens.adapter, lens.model, None):
        with pytest.raises(ll.errors.ArgumentError, match=r"the lens is a .*ll\.load\(base"):
            call(other)


@pytest.mark.parametrize("call, words", WRONG.values(), ids=WRONG)
def test_wrong_words_and_things(lens: ll.LoraLens, call: Callable[..., Any], words: str):
    with pytest.raises(ll.errors.LensLoraError, match=words):
        call(lens)


def test_positions_of_numpy_and_torch(lens: ll.LoraLens):
    def patched(positions: Any) -> torch.Tensor:
        name = "blocks.0.hook_resid_post"
        return ll.patch_activations(lens, TOKENS, MARGIN, name, positions=positions).values

    for index in (np.int64(-1), torch.tensor(-1), [torch.tensor(3)], np.array([3])):
        assert torch.equal(patched(index), patched(-1))


def test_an_odd_index_is_saved(lens: ll.LoraLens, tmp_path):
    shift = ll.feature_shift(
        lens, TOKENS, torch.eye(16)[:1], "blocks.0.hook_resid_post", positions=np.int64(-1)
    )
    assert ll.results.FeatureShift.load(shift.save(tmp_path / "s")).positions == -1
    assert dataclasses.is_dataclass(shift)


# --- texts that look like conversations


@pytest.mark.parametrize(
    "text",
    [
        "w7 [1]",
        "[w7] w8",
        "{w7",
        "[]",
        "{}",
        '{"role": "w7"}',
        '[{"role": "w7", "team": "w8"}]',
        f"{ASK} w7",
        f"w7 {ASK}",
        json.dumps(["w7", "w8"]),
        "[INST] w7 'role': 'content': [/INST]",
        "[" * 100_000 + '"role": "content":',
        "[" + "{'role': " * 5_000,
    ],
)
def test_other_text_with_braces_is_text(text):
    assert arguments.text("the prompt", text, ll.errors.PromptError) == text


# --- numbers that are not finite


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_one_value_that_is_not_finite_is_refused(broken: float):
    values = torch.zeros(3, 4)
    values[1, 2] = broken
    with pytest.raises(ll.errors.NumericsError, match="the tangent is not finite"):
        ll.errors.require_finite(values, "the tangent")


def test_finite_values_whose_sum_overflows_are_taken():
    largest = torch.finfo(torch.float32).max
    ll.errors.require_finite(torch.full((3,), largest), "the tangent")
