"""A prompt's numbers do not depend on its batch, where rotary tables depend on a row's length.

The oracle is PEFT's active adapter on the Hugging Face model, each prompt alone and each pass on a
model that has run nothing before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import architectures
import cases
import models
import pytest
import reference
import torch
import transformers as hf
from differences import largest_difference
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad

import lens_lora as ll
from lens_lora.core.model.lengths import Rotary

pytestmark = models.NEEDS_BRIDGE

LIMIT = 8
LENGTHS = 5, 24, 12  # on both sides of the limit; the longest is neither first nor last
MARGIN = ll.Margin(5, 9)
QUIET: dict[str, Any] = {"progress": False}


def _longrope(width: int) -> dict[str, Any]:
    half = range(width // 2)
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in half],
        "long_factor": [2.0 + i for i in half],
        "factor": 4.0,
        "original_max_position_embeddings": LIMIT,
        "rope_theta": 10_000.0,
    }


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}


def _phi3() -> hf.PreTrainedModel:
    sizes = {**models._ROTARY, "pad_token_id": 0, "original_max_position_embeddings": LIMIT}
    return hf.Phi3ForCausalLM(hf.Phi3Config(**sizes, rope_parameters=_longrope(4)))


def _phimoe() -> hf.PreTrainedModel:
    """Its factors do not change with the length, and the size of its cosines does."""
    rope = {**_longrope(4), "short_mscale": 1.1, "long_mscale": 1.4}
    sizes = {**models._ROTARY, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = hf.PhimoeConfig(**{**sizes, "rope_parameters": rope})
    config._experts_implementation = "eager"
    return hf.PhimoeForCausalLM(config)


def _llama() -> hf.PreTrainedModel:
    sizes = {**models._ROTARY, "max_position_embeddings": LIMIT}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, rope_parameters=DYNAMIC))


def _gemma3() -> hf.PreTrainedModel:
    """One embedding with a table for each type of layer."""
    sizes = {**models._GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
    tables = {"sliding_attention": DYNAMIC, "full_attention": _longrope(4)}
    config = hf.Gemma3TextConfig(
        **{**sizes, "max_position_embeddings": LIMIT, "rope_parameters": tables}
    )
    return hf.Gemma3ForCausalLM(config)


MADE: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "phi3": _phi3,
    "llama": _llama,
    "gemma3": _gemma3,
}


@dataclass(frozen=True)
class Case:
    peft: PeftModel
    lens: ll.LoraLens
    prompts: ll.results.Prompts

    def alone(self, i: int) -> Tensor:
        return self.prompts.row(i).tokens

    def by_peft(self, i: int) -> Tensor:
        """Logits of one prompt by a model that has run no other."""
        with torch.no_grad():
            return copy.deepcopy(self.peft)(self.alone(i)).logits


@pytest.fixture
def case(request: pytest.FixtureRequest, float64: None) -> Case:
    return _case(getattr(request, "param", "phi3"))


def _case(family: str) -> Case:
    base = models.randomised(MADE[family](), 0, torch.float64)
    peft = models.peft_model(family, base)
    model = models.bridge(base)
    model.cfg.n_ctx = models.CONTEXT  # transformers runs a dynamic table beyond its context
    rows = [models.tokens(1, length, seed=length)[0] for length in LENGTHS]
    tokens = torch.stack([pad(row, (0, max(LENGTHS) - len(row))) for row in rows])
    prompts = ll.results.Prompts(tokens, torch.tensor(LENGTHS))
    return Case(peft, ll.LoraLens(model, ll.Adapter.from_peft(peft)), prompts)


EACH = pytest.mark.parametrize("case", list(MADE), indirect=True)


@pytest.mark.sample(2)
@EACH
def test_logits_are_peft_s_of_each_prompt_alone(case: Case):
    for _ in range(2):  # a second time, after the longest
        together = case.lens.logits(case.prompts)
        for i, length in enumerate(LENGTHS):
            torch.testing.assert_close(together[i, :length], case.by_peft(i)[0], rtol=0, atol=1e-12)
    assert torch.isfinite(together).all()


def test_a_batch_of_transformers_depends_on_its_longest_row(case: Case):
    """The negative control: what the group of rows corrects is there."""
    with torch.no_grad():
        together = copy.deepcopy(case.peft)(case.prompts.tokens).logits[0, : LENGTHS[0]]
    assert largest_difference(together, case.by_peft(0)[0]) > 0.1


def _read(logits: Tensor) -> Tensor:
    return logits[:, 5] - logits[:, 9]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_slopes_are_peft_s_of_each_prompt_alone(case: Case, mode: Any):
    modules = list(case.lens.adapter.modules)
    few = modules[::3]
    ours = ll.first_order(case.lens, case.prompts, MARGIN, at=1.0, mode=mode, **QUIET).values
    for i in range(len(LENGTHS)):
        peft = copy.deepcopy(case.peft)
        expected = reference.peft_first_order(peft, case.alone(i), _read, few, 1.0)
        for module, value in expected.items():
            sites = [site.module == module for site in case.lens.sites]
            torch.testing.assert_close(ours[i, sites].sum()[None], value, rtol=1e-8, atol=1e-9)


def _effects(lens: ll.LoraLens, prompts: Any) -> Tensor:
    return ll.patch_sites(lens, prompts, MARGIN, how="leave_one_out", **QUIET).values


CALLS: dict[str, Callable[[ll.LoraLens, Any], Tensor]] = {
    "by position": lambda lens, p: ll.first_order(lens, p, MARGIN, by="rank").values,
    "by token": lambda lens, p: (
        ll.first_order(lens, p, ll.AnswerLogProb(torch.tensor([5, 9])), by="token", **QUIET).values
    ),
    "shifts of all tokens": lambda lens, p: ll.logit_shift(lens, p, by_site=False).values,
    "shifts by site": lambda lens, p: ll.logit_shift(lens, p, **QUIET).values,
    "add one": lambda lens, p: ll.patch_sites(lens, p, MARGIN, how="add_one", **QUIET).values,
    "leave one out": _effects,
    "path": lambda lens, p: ll.path_attribution(lens, p, MARGIN, tol=1e-9, **QUIET).values,
    "curvature": lambda lens, p: ll.second_order(lens, p, MARGIN, **QUIET).half_row_sums,
    "edges": lambda lens, p: ll.edges(lens, p, MARGIN, **QUIET).values,
    "kl": lambda lens, p: ll.patch_sites(lens, p, ll.KL(), **QUIET).values,
    "kl shares": lambda lens, p: ll.kl_shares(lens, p, **QUIET).attribution.values,
    "a user's readout": lambda lens, p: (
        ll.first_order(lens, p, ll.Readout.of(lambda logits: logits[:, 3] * logits[:, 4])).values
    ),
    "blocks that run again": lambda lens, p: (
        ll.first_order(lens.within(200_000.0), p, MARGIN).values
    ),
    "a bank": lambda lens, p: (
        ll.bank(lens.model, p, MARGIN, hf_model=lens._hf_model, **QUIET)
        .first_order(lens.adapter)
        .values
    ),
}


_QUICK = "by position", "by token", "leave one out", "edges"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in CALLS]
)
def test_every_call_is_that_of_each_prompt_alone(case: Case, name: str):
    call = CALLS[name]
    lens = case.lens
    if name == "a bank":  # which asks for the base where a projection is taken apart
        base = copy.deepcopy(case.peft).unload()
        lens = ll.LoraLens(lens.model, lens.adapter, hf_model=base)
    together = call(lens, case.prompts)
    for i in range(len(LENGTHS)):
        alone = call(lens, case.prompts.row(i))[0]
        # The nodes of a path are as many as the prompt that needs the most of them takes.
        rtol = 1e-5 if name == "path" else 1e-9
        torch.testing.assert_close(together[i], alone, rtol=rtol, atol=1e-10)


@pytest.mark.slow
@EACH
def test_it_says_what_peft_says_across_the_limit(case: Case):
    said = case.lens.generate(case.prompts, 7, eos_token_id=(), **QUIET)
    for i, ids in enumerate(said.ids):
        text = case.alone(i)
        for _ in range(7):
            with torch.no_grad():
                logits = copy.deepcopy(case.peft)(text).logits
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        assert ids.tolist() == text[0, LENGTHS[i] :].tolist()


def test_drafts_are_trusted_on_either_side_of_the_limit(case: Case, monkeypatch):
    """Two passes confirm a text that crosses the limit, one any other."""
    confirmed: list[int] = []
    run = ll.LoraLens.run

    def counted(lens: ll.LoraLens, prompts: ll.results.Prompts) -> Tensor:
        confirmed.append(prompts.tokens.shape[1])
        return run(lens, prompts)

    monkeypatch.setattr(ll.LoraLens, "run", counted)
    case.lens.generate(case.prompts, 7, eos_token_id=(), **QUIET)
    assert sorted(confirmed) == [8, 11, 18, 30]


@EACH
def test_the_model_is_left_as_it_was(case: Case):
    """Also as a user's own long pass has left it, on which later passes do not depend."""
    model = case.lens.model
    before = case.lens.logits(case.alone(0))

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for module, _ in Rotary.of(model).rules:
            plain = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            found |= {**plain, **dict(module.named_buffers())}
        return {k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()}

    with torch.no_grad():
        model(case.alone(1))
    then = state()
    ll.first_order(case.lens, case.prompts, MARGIN)
    case.lens.generate(case.prompts, 3, **QUIET)
    now = state()
    assert then.keys() == now.keys()
    for name, value in then.items():
        assert torch.equal(value, now[name]) if isinstance(value, Tensor) else value == now[name]
    torch.testing.assert_close(case.lens.logits(case.alone(0)), before, rtol=0, atol=0)


def test_a_size_that_changes_at_the_limit(float64: None):
    """PhiMoE has a mixture of experts and a rotary embedding of its own kind."""
    base = models.randomised(_phimoe(), 0, torch.float64)
    [(module, rule)] = Rotary.of(base).rules
    assert rule.limit == LIMIT
    assert type(module).__name__ == "PhimoeRotaryEmbedding"


# --- What a HookedTransformer lacks


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_hooked_transformer_s_context_ends_where_its_tables_do(float64: None):
    base = models.randomised(_llama(), 0, torch.float64)
    model = models.as_loaded(base, "HookedTransformer")
    assert model.cfg.n_ctx == LIMIT
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("llama", base)))
    with pytest.raises(ll.errors.PromptError, match="the context of this HookedTransformer"):
        lens.logits(models.tokens(1, LIMIT + 1))


def _windowed(family: str) -> hf.PreTrainedModel:
    """A family whose window transformer-lens does not read."""
    config = {"qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}[family]
    window = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9}
    sizes = {**models._ROTARY, **window, "head_dim": 4}
    made = {"qwen2": hf.Qwen2ForCausalLM, "qwen3": hf.Qwen3ForCausalLM}[family]
    return models.randomised(made(config(**sizes)), 0, torch.float64)


@models.NEEDS_HOOKED_TRANSFORMER
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_a_hooked_transformer_lacks_bounds_its_context(family: str, float64: None):
    base = _windowed(family)
    model = models.as_loaded(base, "HookedTransformer")
    assert model.cfg.n_ctx == 9
    peft = models.peft_model(family, base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    tokens = models.tokens(2, 9)
    with torch.no_grad():
        expected = peft(tokens).logits
    torch.testing.assert_close(lens.logits(tokens), expected, rtol=0, atol=1e-11)
    model.cfg.n_ctx = 32
    with pytest.raises(ll.errors.ModelStateError, match=r"Set model\.cfg\.n_ctx = 9"):
        ll.LoraLens(model, lens.adapter, hf_model=base)


@models.NEEDS_HOOKED_TRANSFORMER
def test_a_window_that_a_hooked_transformer_has_bounds_nothing(float64: None):
    config = hf.MistralConfig(**models._ROTARY, sliding_window=9)
    base = models.randomised(hf.MistralForCausalLM(config), 0, torch.float64)
    model = models.as_loaded(base, "HookedTransformer")
    tokens = models.tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), base(tokens).logits, rtol=0, atol=1e-11)


# --- Every other architecture


LONG = 24
_FIRST = list(architectures.ARCHITECTURES)[::8]


@models.NEEDS_NEWEST
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in _FIRST else pytest.mark.exhaustive)
        for name in architectures.ARCHITECTURES
    ],
)
def test_a_batch_equals_its_prompts_alone_in_every_architecture(name: str):
    """Windows, chunks, experts, recurrences: none of them looks at the longest row."""
    with architectures.in_float64():
        held = architectures.case(name)
        short = models.tokens(1, 5)
        long = models.tokens(1, LONG, seed=5)
        tokens = torch.cat([pad(short, (0, LONG - 5)), long])
        both = held.lens.logits(ll.results.Prompts(tokens, torch.tensor([5, LONG])))
        with torch.no_grad():
            expected = held.peft(short).logits, held.peft(long).logits
    for ours, theirs, length in zip(both, expected, (5, LONG), strict=True):
        off = cases.centred(ours[:length]) - cases.centred(theirs[0])
        assert float(off.abs().max()) < 1e-12
