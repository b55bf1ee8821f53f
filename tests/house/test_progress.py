"""Every long call shows a bar, can be silenced, and leaves neither bar nor hook behind."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import by_folder
import models
import pytest
import torch
import transformers as hf
from shared_questions import PROMPT
from tqdm import tqdm

import lens_lora as ll

FEW = 10


def lens_of(layers: int) -> ll.LoraLens:
    torch.manual_seed(0)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**{**models._ROTARY, "num_hidden_layers": layers}))
    base.eval().config.architectures = ["LlamaForCausalLM"]
    model = next(iter(models.MAKERS.values()))(base)
    return ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("llama", base)))


@pytest.fixture(scope="module")
def tiny():
    """One layer, 7 sites; and ten, 70 sites, for the calls that batch all their passes in few."""
    return SimpleNamespace(lens=lens_of(1), deep=lens_of(10))


CALLS = by_folder.named("WITH_BAR")
SHORT = by_folder.named("WITHOUT_BAR")
# The calls that are made with the deep model.
DEEP = {
    "LoraLens.function",
    "fact_margin",
    "patch_edges",
    "patch_sites",
    "reliability",
    "remainder",
}
# Functions that run no model, and those that load one.
NO_PASS = {
    "adapter_format",
    "analysis",
    "compare",
    "demo",
    "gather",
    "load",
    "load_adapter",
    "load_bank",
    "load_result",
    "panel",
    "readout",
    "table",
    "weight_alignment",
}


def is_python(member) -> bool:
    """Whether it is a function or method written in Python, which has a signature."""
    return inspect.isfunction(member) or inspect.ismethod(member)


def takes_progress(function) -> bool:
    return "progress" in inspect.signature(function).parameters


def test_every_public_function_is_here():
    """Functions and methods; a new one needs a bar, or a place among the short ones."""
    public = {name: getattr(ll, name) for name in ll.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    methods = {
        f"{name}.{method}"
        for name, cls in public.items()
        if inspect.isclass(cls)
        for method, f in inspect.getmembers(cls, is_python)
        if not method.startswith("_") and takes_progress(f)
    }
    with_bar = methods | {name for name, f in functions.items() if takes_progress(f)}
    without_bar = {name for name, f in functions.items() if not takes_progress(f)}
    by_folder.require_in_list("WITH_BAR", with_bar, CALLS)
    by_folder.require_in_list("WITHOUT_BAR", without_bar - NO_PASS, SHORT)
    assert with_bar == set(CALLS)
    assert without_bar == set(SHORT) | NO_PASS


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", CALLS)
def test_bar_is_shown_and_can_be_silenced(tiny, name, tmp_path, capsys):
    CALLS[name](tiny, tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    CALLS[name](tiny, tmp_path)
    shown = capsys.readouterr().err
    assert "%|" in shown or "node" in shown
    assert not tqdm._instances
    last = shown.rstrip("\r\n").rpartition("\r")[2]
    assert not last.strip() or last.startswith("sweep: 100%")


class Passes:
    """Counts the forward passes of a model, by rows; interrupts one of them."""

    def __init__(self, model, interrupt_at: int = 0) -> None:
        self.calls = 0
        self.rows = 0
        self._at = interrupt_at
        self._handle = model.unembed.register_forward_pre_hook(self._count)

    def _count(self, module, args) -> None:
        self.calls += 1
        self.rows += len(args[0])
        if self.calls == self._at:
            raise KeyboardInterrupt

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()


@pytest.mark.parametrize("name", SHORT)
def test_calls_without_a_bar_are_short(tiny, name):
    with Passes(tiny.lens.model) as passes:
        SHORT[name](tiny)
    assert 0 < passes.rows <= FEW


def state_of(model):
    hooks = [
        (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training)
        for name, m in model.named_modules()
    ]
    return hooks, {name: p.clone() for name, p in model.named_parameters()}


# A bank refuses the hook that counts and interrupts; core/model/test_interrupts.py needs none.
@pytest.mark.sample(2)
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"Adapter.between", "intruders", "bank"}))
def test_interrupted_call_leaves_nothing_behind(tiny, name, tmp_path, capsys):
    """In the middle of its passes: hooks off, weights untouched, no dual level, the bar wiped."""
    model = tiny.deep.model if name in DEEP else tiny.lens.model
    model(models.tokens())  # a bridge adds hooks of its own in its first pass
    hooks, weights = state_of(model)
    with Passes(model) as passes:
        CALLS[name](tiny, tmp_path, progress=False)
    capsys.readouterr()
    with Passes(model, interrupt_at=passes.calls // 2 + 1), pytest.raises(KeyboardInterrupt):
        CALLS[name](tiny, tmp_path)
    assert not tqdm._instances
    last = capsys.readouterr().err.rpartition("\r")[2]
    # A sweep's bar stays, to say how far it came.
    assert not last.strip() or last.startswith("sweep:") and last.endswith("\n")
    after, now = state_of(model)
    assert after == hooks
    assert all(torch.equal(now[key], weights[key]) for key in weights)
    assert torch.autograd.forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    assert torch.isfinite(tiny.lens.logits(PROMPT)).all()
