"""The model is left as it was; users' own hooks see and change the adapted model."""

from __future__ import annotations

import gc
import weakref

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_family import EVERY
from model_state import merged_model, same, state

import lens_lora as ll
from lens_lora.core.function.forward import gated_logits
from lens_lora.core.model.hooks import attached

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
ANALYSES = {
    "logits": lambda lens, t: lens.logits(t),
    "first_order": lambda lens, t: ll.first_order(lens, t, MARGIN),
    "forward": lambda lens, t: ll.first_order(lens, t, MARGIN, mode="forward", progress=False),
    "components": lambda lens, t: ll.components(lens, t, MARGIN, progress=False),
    "logit_shift": lambda lens, t: ll.logit_shift(lens, t, progress=False),
    "joint": lambda lens, t: ll.logit_shift(lens, t, by_site=False),
    "tangents": lambda lens, t: ll.tangents(lens, t),
    "gradients": lambda lens, t: ll.gradients(lens, t, MARGIN),
    "remainder": lambda lens, t: ll.remainder(lens, t, MARGIN, by_site=True, progress=False),
    "curve": lambda lens, t: ll.remainder_curve(lens, t, MARGIN, progress=False),
    "margin": lambda lens, t: ll.fact_margin(lens, t, 5, 9, progress=False),
}


@pytest.fixture(params=models.MAKERS)
def cls(request) -> str:
    return request.param


@pytest.mark.parametrize("analysis", ANALYSES)
def test_analyses_leave_the_model_as_it_was(analysis: str, cls: str):
    """Hooks, weights, gradients and requires_grad, with a user's own hook on the model."""
    lens = cases.case("llama", cls, "processed").lens
    lens.model.hook_dict[lens.sites[0].read].add_hook(lambda tensor, hook: None)
    before = state(lens.model)
    try:
        ANALYSES[analysis](lens, models.tokens())
        assert same(before, state(lens.model))
    finally:
        lens.model.reset_hooks()


@pytest.mark.parametrize(
    "analysis", sorted(set(ANALYSES) - {"logits", "joint", "tangents", "logit_shift"})
)
def test_a_failing_readout_leaves_the_model_as_it_was(analysis: str, cls: str, monkeypatch):
    """After an exception in the readout nothing of ours stays on the model."""
    lens = cases.case("gpt2", cls, "raw").lens
    before = state(lens.model)

    def explode(self, model, batch, before):
        def readout(logits):
            raise RuntimeError("the user's own")

        return readout

    monkeypatch.setattr(ll.Margin, "of_logits", explode)
    with pytest.raises(RuntimeError, match="the user's own"):
        ANALYSES[analysis](lens, models.tokens())
    assert same(before, state(lens.model))


def test_an_exception_inside_applied_leaves_the_model_as_it_was(cls: str):
    """In the block's body, and in a hook in the middle of a forward pass."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    before = state(lens.model)
    plain = lens.logits(tokens, 0.0)

    def explode(tensor, hook):
        raise KeyError("mid-forward")

    with pytest.raises(KeyError, match="body"), lens.applied():
        raise KeyError("body")
    assert same(before, state(lens.model))
    with pytest.raises(KeyError, match="mid-forward"), lens.applied():
        lens.model.run_with_hooks(tokens, fwd_hooks=[(lens.sites[-1].write, explode)])
    assert same(before, state(lens.model))
    assert torch.equal(lens.logits(tokens, 0.0), plain)


def test_gates_at_zero_change_no_bit(cls: str):
    """f(0) is the base model bit for bit."""
    lens = cases.case("qwen2", cls, "processed").lens
    tokens = models.tokens()
    with torch.no_grad():
        assert torch.equal(lens.logits(tokens, 0.0), lens.model(tokens))


def test_applied_survives_reset_hooks_and_nests(cls: str):
    """Tools that call reset_hooks() see the adapted model; two halves make a whole."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    adapted = lens.logits(tokens)
    with torch.no_grad(), lens.applied():
        lens.model.reset_hooks()
        lens.model.run_with_cache(tokens)
        assert torch.allclose(lens.model(tokens), adapted, rtol=0, atol=1e-12)
    names = [s.name for s in lens.sites]
    first = dict.fromkeys(names[:6], 1.0)
    second = dict.fromkeys(names[6:], 1.0)
    with torch.no_grad(), lens.applied(first), lens.applied(second):
        assert torch.allclose(lens.model(tokens), adapted, rtol=0, atol=1e-12)


def test_fwd_hooks_run_with_hooks(cls: str):
    """`run_with_hooks(fwd_hooks=lens.fwd_hooks())` is `lens.logits`, in whatever scale."""
    lens = cases.case("neox", cls, "processed").lens
    tokens = models.tokens()
    for scale in (1.0, 0.3, {"*.attn.*": 1.0}, torch.rand(len(lens.sites), dtype=torch.float64)):
        with torch.no_grad():
            out = lens.model.run_with_hooks(tokens, fwd_hooks=lens.fwd_hooks(scale))
        assert torch.allclose(out, lens.logits(tokens, scale), rtol=0, atol=1e-12)


def test_per_prompt_gates(cls: str):
    """Gates [batch, site] give each prompt its own adapter strength."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=2)
    gates = torch.rand(2, len(lens.sites), dtype=torch.float64)
    both = lens.logits(tokens, gates)
    for row in range(2):
        alone = lens.logits(tokens[row : row + 1], gates[row])
        assert torch.allclose(both[row], alone[0], rtol=0, atol=1e-12)


INTERVENTIONS = {
    "HookedTransformer": [
        "hook_embed",
        "blocks.0.ln1.hook_normalized",
        "blocks.1.attn.hook_q",
        "blocks.1.attn.hook_v",
        "blocks.0.attn.hook_z",
        "blocks.0.hook_attn_out",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.mlp.hook_pre",
        "blocks.0.mlp.hook_post",
        "blocks.0.hook_mlp_out",
        "blocks.1.hook_resid_pre",
    ],
    "TransformerBridge": [
        "embed.hook_out",
        "blocks.0.attn.q.hook_in",
        "blocks.1.attn.q.hook_out",
        "blocks.1.attn.v.hook_out",
        "blocks.0.attn.o.hook_in",
        "blocks.0.attn.o.hook_out",
        "blocks.1.mlp.hook_in",
        "blocks.0.mlp.out.hook_in",
        "blocks.0.mlp.out.hook_out",
        "blocks.1.hook_in",
    ],
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "qwen2"])
@pytest.mark.parametrize("flags", ["raw", "fold_value_biases", "processed"])
@pytest.mark.parametrize("order", ["ours first", "theirs first", "inside applied"])
def test_interventions_equal_those_on_the_merged_model(
    family: str, flags: str, order: str, cls: str
):
    """A user's hook on the adapted model does what it does on a model of the merged weights.

    Doubling half the features at each hook point, whichever was registered first.
    """
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    merged = merged_model(family, cls, flags)

    def double_some(tensor, hook):
        tensor = tensor.clone()
        tensor[..., ::2] *= 2
        return tensor

    for name in INTERVENTIONS[cls]:
        theirs = [(name, double_some)]
        ours = case.lens.fwd_hooks()
        with torch.no_grad():
            expected = merged.run_with_hooks(tokens, fwd_hooks=theirs)
            if order == "inside applied":
                with case.lens.applied() as model:
                    found = model.run_with_hooks(tokens, fwd_hooks=theirs)
            else:
                hooks = ours + theirs if order == "ours first" else theirs + ours
                found = case.model.run_with_hooks(tokens, fwd_hooks=hooks)
            plain = merged(tokens)
        difference = cases.centred(found) - cases.centred(expected)
        assert difference.abs().max() < 1e-9, name
        assert largest_difference(plain, expected) > 1e-3, name


IN_EVERY_FLAG = ("gpt2", "neox", "llama", "qwen2")
GAUGE = [
    *[(f, cls, flags) for f in IN_EVERY_FLAG for cls in models.MAKERS for flags in cases.FLAGS],
    *[cell for cell in EVERY if cell[0] not in models.CORE],
]


@pytest.mark.sample(7)
@pytest.mark.parametrize(("family", "cls", "flags"), GAUGE)
def test_cached_activations_equal_those_of_the_merged_model(family: str, cls: str, flags: str):
    """The gauge: every activation by name, whatever the processing; z and v without a bias."""
    case = cases.case(family, cls, flags)
    tokens = models.tokens()
    merged = merged_model(family, cls, flags)
    with torch.no_grad(), case.lens.applied() as model:
        found = model.run_with_cache(tokens)[1]
        expected = merged.run_with_cache(tokens)[1]
    assert set(found.keys()) == set(expected.keys())
    for name in expected:
        a = found[name]
        b = expected[name]
        if a.is_floating_point() and "attn_scores" not in name:
            assert largest_difference(a, b) < 1e-9, name


def test_a_dead_input_hook_is_refused_at_the_first_run(cls: str):
    """Where a hook point stops firing, an error names the site; never a silent zero."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens()
    hooks = [(n, f) for n, f in lens.fwd_hooks() if type(f).__name__ != "_Reader"]
    hooks = [(n, f) for n, f in hooks if type(f).__name__ != "Arranger"]
    with pytest.raises(ll.errors.ModelStateError, match="blocks.0.attn.q.*input hook did not"):
        lens.model.run_with_hooks(tokens, fwd_hooks=hooks)


def test_generate_under_the_adapter(cls: str):
    """Greedy generation inside `applied` is greedy decoding of lens.logits."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)
    expected = tokens
    for _ in range(4):
        last = lens.logits(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, last], 1)
    options = {"do_sample": False, "use_past_kv_cache": False, "verbose": False}
    with lens.applied() as model:
        found = model.generate(tokens, max_new_tokens=4, stop_at_eos=False, **options)
    assert torch.equal(found, expected)


def test_what_a_reader_kept_goes_with_its_hooks(cls: str):
    """Without a cycle, in which it would wait for the garbage collector."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))
    name = next(site.read for site in lens.sites if site.kind == "o")
    seen: list[weakref.ref] = []

    def keep(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        changed = tensor + 0
        seen.append(weakref.ref(changed))
        return changed

    gc.disable()
    try:
        with attached(lens.model, [(name, keep)]):
            gated_logits(lens, prompts, lens.gates(1.0))
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_pass_leaves_nothing_to_the_garbage_collector(cls: str):
    """What a block's readers kept goes with its hooks: on long prompts it is a lot."""
    lens = cases.case("llama", cls, "raw").lens
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))

    def tensors() -> int:
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    gated_logits(lens, prompts, lens.gates(1.0))
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(3):
            gated_logits(lens, prompts, lens.gates(1.0))
        assert tensors() == before
    finally:
        gc.enable()
