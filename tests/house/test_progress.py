"""Every long call shows a bar, can be silenced, and leaves neither bar nor hook behind."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import by_folder
import models
import pytest
import torch
import transformers as hf
from sweep_runs import GOOD
from tqdm import tqdm

import lens_lora as ll

R, PROMPT, LONG = ll.Margin("w8", "w9"), "w5 w6 w7", " ".join(["w5"] * 30)
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


def _between(t, folder, **options):
    base = models.hf_model("llama")
    return ll.Adapter.between(base, models.peft_model("llama", base).merge_and_unload(), **options)


def _sweep(t, folder, **options):
    records = [{**row, "doc": "w8", "pre": "w9"} for row in GOOD]
    return ll.sweep(t.lens, records, out=folder / "r.parquet", resume=False, **options)


def _faithful(t, folder, **options):
    first = ll.first_order(t.lens, PROMPT, R)
    return ll.faithfulness(t.lens, PROMPT, R, first, greedy=True, draws=2, **options)


def _points(t, folder, **options):
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    return ll.patch_activations(t.lens, PROMPT, R, names, **options)


def _cost(t, folder, **options):
    with t.lens.ablate_directions(torch.eye(16)[0]):
        return ll.removal_cost(t.lens, PROMPT, **options)


CALLS = {
    "Adapter.between": _between,
    "constant_part": lambda t, folder, **o: ll.constant_part(t.lens, [PROMPT, LONG], **o),
    "counted_speech": lambda t, folder, **o: ll.counted_speech(t.lens, max_new_tokens=2, **o),
    "what_changed": lambda t, folder, **o: ll.what_changed(t.lens, [PROMPT, LONG], **o),
    "components": lambda t, folder, **o: ll.components(t.lens, PROMPT, R, **o),
    "coupling": lambda t, folder, **o: ll.coupling(t.lens, [LONG] * 10, R, **o),
    "bank": lambda t, folder, **o: ll.bank(t.lens.model, PROMPT, R, **o),
    "best_subset": lambda t, folder, **o: ll.best_subset(t.lens, PROMPT, R, k=2, steps=4, **o),
    "checkpoints": lambda t, folder, **o: ll.checkpoints(
        t.lens, [t.lens.adapter.scaled(s) for s in (0.5, 1)], PROMPT, R, **o
    ),
    "compare_adapters": lambda t, folder, **o: ll.compare_adapters(
        t.lens, t.lens.adapter.scaled(0.5), PROMPT, R, draws=2, **o
    ),
    "edges": lambda t, folder, **o: ll.edges(t.lens, [LONG] * 600, R, **o),
    "explain": lambda t, folder, **o: ll.explain(t.lens, PROMPT, "w8", "w9", null=2, **o),
    "fact_margin": lambda t, folder, **o: ll.fact_margin(t.deep, PROMPT, "w8", "w9", **o),
    "faithfulness": _faithful,
    "first_order": lambda t, folder, **o: ll.first_order(t.lens, PROMPT, R, mode="forward", **o),
    "logit_shift": lambda t, folder, **o: ll.logit_shift(t.lens, PROMPT, **o),
    "intruders": lambda t, folder, **o: ll.intruders(t.lens, k=2, **o),
    "null_test": lambda t, folder, **o: ll.null_test(t.lens, PROMPT, R, draws=2, **o),
    "patch_activations": _points,
    "patch_edges": lambda t, folder, **o: ll.patch_edges(
        t.deep, PROMPT, R, [(site.name, "logits") for site in t.deep.sites], **o
    ),
    "patch_sites": lambda t, folder, **o: ll.patch_sites(t.deep, PROMPT, R, how="add_one", **o),
    "path_attribution": lambda t, folder, **o: ll.path_attribution(t.lens, PROMPT, R, **o),
    "reliability": lambda t, folder, **o: ll.reliability(
        t.deep, PROMPT, R, threshold=0.99, floor=0.0, fix=True, **o
    ),
    "remainder": lambda t, folder, **o: ll.remainder(t.deep, PROMPT, R, by_site=True, **o),
    "remainder_curve": lambda t, folder, **o: ll.remainder_curve(
        t.lens, PROMPT, R, torch.linspace(0.1, 1, 70), **o
    ),
    "LoraLens.function": lambda t, folder, **o: t.deep.function(PROMPT, R, **o).corners("add_one"),
    "LoraLens.generate": lambda t, folder, **o: t.lens.generate(PROMPT, 12, eos_token_id=(), **o),
    "kl_shares": lambda t, folder, **o: ll.kl_shares(
        t.lens, PROMPT, scales=[0.01 * s for s in range(1, 100)], **o
    ),
    "removal_cost": _cost,
    "scale_intruders": lambda t, folder, **o: ll.scale_intruders(
        t.lens, PROMPT, R, k=2, texts=[PROMPT, LONG], **o
    ),
    "repair": lambda t, folder, **o: ll.repair(
        t.lens, [(PROMPT, R)], [(PROMPT, ll.KL())], 0.5, steps=8, draws=1, **o
    ),
    "second_order": lambda t, folder, **o: ll.second_order(
        t.lens, [LONG] * 10, R, self_curvature=True, **o
    ),
    "sweep": _sweep,
    **by_folder.named("WITH_BAR"),
}
SHORT = {
    "activation_shift": lambda t: ll.activation_shift(t.lens, PROMPT, "blocks.0.hook_resid_post"),
    "lora_activations": lambda t: ll.lora_activations(t.lens, PROMPT, "w5 w6"),
    "contrast": lambda t: ll.contrast(
        t.lens, ["w5 w6", "w6 w7"], ["w8 w9", "w9 w5"], "blocks.0.hook_resid_post"
    ),
    "feature_shift": lambda t: (
        ll.feature_shift(t.lens, PROMPT, torch.eye(16), "blocks.0.hook_resid_post"),
        ll.feature_shift(t.lens, PROMPT, torch.eye(16), by="site"),
    ),
    "foils": lambda t: ll.foils(t.lens, PROMPT, R),
    "gradients": lambda t: ll.gradients(t.lens, PROMPT, R),
    "patchscope": lambda t: ll.patchscope(
        t.lens,
        torch.eye(16)[0],
        "blocks.0.hook_resid_post",
        [1.0, 2.0],
        prompt="w5 w6 w7",
        placeholder="w6",
        max_new_tokens=2,
    ),
    "tangents": lambda t: ll.tangents(t.lens, PROMPT),
    "token_shifts": lambda t: ll.token_shifts(t.lens, PROMPT, "w5 w6"),
    **by_folder.named("WITHOUT_BAR"),
}
DEEP = {
    "LoraLens.function",
    "fact_margin",
    "patch_edges",
    "patch_sites",
    "reliability",
    "remainder",
}
NO_PASS = {
    *("adapter_format", "weight_alignment", "analysis", "compare", "demo", "gather", "load"),
    *("load_adapter", "load_bank", "load_result", "panel", "readout", "table"),
}


def is_python(member) -> bool:
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
    assert methods | {n for n, f in functions.items() if takes_progress(f)} == set(CALLS)
    assert {n for n, f in functions.items() if not takes_progress(f)} == set(SHORT) | NO_PASS


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
        self.calls = self.rows = 0
        self._at = interrupt_at
        self._handle = model.unembed.register_forward_pre_hook(self._count)

    def _count(self, module, args) -> None:
        self.calls, self.rows = self.calls + 1, self.rows + len(args[0])
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
    with Passes(model, interrupt_at=passes.calls // 2 + 1), pytest.raises(KeyboardInterrupt) as hit:
        CALLS[name](tiny, tmp_path)
    assert hit.value is not None and not tqdm._instances
    left = capsys.readouterr().err.rpartition("\r")[2]
    assert not left.strip() or left.startswith("sweep:") and left.endswith("\n")
    after, now = state_of(model)
    assert after == hooks and all(torch.equal(now[key], weights[key]) for key in weights)
    assert torch.autograd.forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    assert torch.isfinite(tiny.lens.logits(PROMPT)).all()
