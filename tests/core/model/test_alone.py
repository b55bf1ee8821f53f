"""Whatever settings of torch are around a call, its numbers are the same, or it is refused by name.

In float32, the dtype that autocast and default dtypes act on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager as Manager
from typing import Any

import by_folder
import models
import pytest
import torch
import torch.autograd.forward_ad as fwad
from every_call import CALLS, OWN, numbers, same
from interrupts import held

import lens_lora as ll
from lens_lora.core.function import forward as function
from lens_lora.core.model import public_call, unembedding

R = ll.Margin(5, 9)


def make(cls: str, *, model_inside: bool = False, lens_inside: bool = False) -> ll.LoraLens:
    """A float32 lens; the model, or the lens and its adapter, may be made in inference mode."""
    with torch.inference_mode(model_inside):
        base = models.hf_model("llama", dtype=torch.float32)
        model = models.MAKERS[cls](base)
    peft = models.peft_model("llama", models.hf_model("llama", dtype=torch.float32))
    with torch.inference_mode(lens_inside):
        read = ll.Adapter.from_peft(peft)
        copies = {k: ll.LoRAFactors(f.A * 1, f.B * 1, f.scale) for k, f in read.modules.items()}
        return ll.LoraLens(model, ll.Adapter.from_factors(copies))


@functools.cache
def lens_of(cls: str) -> ll.LoraLens:
    return make(cls)


def tokens() -> torch.Tensor:
    return models.tokens(batch=2, pos=5)


@functools.cache
def expected(cls: str, name: str) -> Any:
    return CALLS[name](lens_of(cls), tokens())


def differing(
    cls: str, lens: ll.LoraLens, prompts: torch.Tensor, around, names=frozenset(CALLS)
) -> list[str]:
    found = []
    for name in names:
        with around():
            result = CALLS[name](lens, prompts)
        if not same(result, expected(cls, name), 1e-6):
            found.append(name)
    return found


@contextlib.contextmanager
def setting(put: Callable[[Any], object], value: object, back: object) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(back)


AROUND: dict[str, Callable[[], Manager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad disabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "forward grad disabled": lambda: fwad._set_fwd_grad_enabled(False),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype bfloat16": lambda: setting(
        torch.set_default_dtype, torch.bfloat16, torch.float32
    ),
    "default device": lambda: setting(torch.set_default_device, "meta", None),
    "device": lambda: torch.device("meta"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "saved on cpu": torch.autograd.graph.save_on_cpu,
}


# The settings that changed numbers silently, or broke most calls, are tried around every call.
AROUND_ALL = ("inference_mode", "autocast", "default device")
SOME = ("logits", "first_order", "forward", "first_orders", "frozen", "second_order", "null_test")


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("name", AROUND)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_settings_around_a_call_change_no_number(name: str, cls: str):
    """And the settings are there again afterwards."""
    lens = lens_of(cls)
    prompts = tokens()
    if name not in AROUND_ALL:
        assert differing(cls, lens, prompts, AROUND[name], {*SOME}) == []
    CALLS["logits"](lens, prompts)  # a Bridge registers hooks of its own on its first pass
    with AROUND[name]():
        before = held(lens.model)
        CALLS["second_order"](lens, prompts)
        assert held(lens.model) == before


@pytest.mark.parametrize("name", AROUND_ALL)
def test_settings_around_some_calls_change_no_number(name: str):
    """A call of each kind, on one class of model."""
    classes = list(models.MAKERS)
    cls = classes[AROUND_ALL.index(name) % len(classes)]
    assert differing(cls, lens_of(cls), tokens(), AROUND[name], {*SOME}) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND_ALL)
def test_settings_around_every_call_change_no_number(name: str):
    """Each call with one of the classes, and a few with both."""
    for i, cls in enumerate(models.MAKERS):
        names = {*SOME, *sorted(CALLS)[i :: len(models.MAKERS)]}
        if "device" in name:  # transformer-lens' own tokenisation moves ids, and none leave "meta"
            names -= {"sweep"}
        assert differing(cls, lens_of(cls), tokens(), AROUND[name], names) == []


@pytest.mark.parametrize("cls", models.MAKERS)
def test_ids_gates_lens_and_adapter_made_in_inference_mode(cls: str):
    """All of one function under @torch.inference_mode(), as people write it."""
    lens = make(cls, lens_inside=True)
    with torch.inference_mode():
        ids = tokens() + 0
        gates = torch.rand(len(lens.sites)) + 0
    assert ids.is_inference()
    assert gates.is_inference()
    for around in (torch.inference_mode, contextlib.nullcontext):
        assert differing(cls, lens, ids, around, {*SOME}) == []
    shifts = [ll.tangents(lens, ids, scale=g) for g in (gates, gates.clone())]
    assert same(*shifts, 1e-6)


@pytest.mark.night
@pytest.mark.parametrize("cls", models.MAKERS)
def test_every_call_on_ids_and_a_lens_made_in_inference_mode(cls: str):
    lens = make(cls, lens_inside=True)
    with torch.inference_mode():
        ids = tokens() + 0
    assert differing(cls, lens, ids, torch.inference_mode) == []


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_weights_made_in_inference_mode(cls: str):
    """Runs without a derivative work; the others name a weight, and never give another number."""
    lens = make(cls, model_inside=True)
    refused = []
    for name, call in CALLS.items():
        try:
            assert same(call(lens, tokens()), expected(cls, name), 1e-6), name
        except ll.errors.ModelStateError as error:
            assert "the weight " in str(error)
            assert "torch.no_grad()" in str(error)
            refused.append(name)
    assert {"first_order", "second_order"} <= {*refused}
    assert not {"logits", "patch_sites", "logit_shift", "tangents"} & {*refused}


def test_what_a_readout_holds_was_made_in_inference_mode():
    lens = lens_of(next(iter(models.MAKERS)))
    with torch.inference_mode():
        weights = torch.rand(models.VOCAB) + 0
    readout = ll.Readout.of(lambda logits: logits @ weights)
    with pytest.raises(ll.errors.ModelStateError, match=r"a readout or a hook holds.*clone\(\)"):
        ll.first_order(lens, tokens(), readout)


TRANSFORMS = {
    "grad": lambda f: torch.func.grad(f)(torch.tensor(0.5)),
    "jvp": lambda f: torch.func.jvp(f, (torch.tensor(0.5),), (torch.tensor(1.0),)),
    "vmap": lambda f: torch.func.vmap(f)(torch.rand(3)),
}


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_within_a_transform_calls_are_refused(transform: str, cls: str):
    lens = lens_of(cls)
    prompts = tokens()
    for name in {*CALLS} - {"sweep"}:  # which hashes the adapter first, and torch refuses that

        def within(x: torch.Tensor, name=name) -> torch.Tensor:
            return x * numbers(CALLS[name](lens, prompts))[0].sum()

        with pytest.raises(
            ll.errors.ModelStateError, match=r"torch\.func transform.*lens\.applied"
        ):
            TRANSFORMS[transform](within)
            pytest.fail(name)


REFUSED = {
    *("feature_shift", "explain", "kl_shares", "by token and layer"),
    "compare_adapters",
    "edges",
}


def refused_within_a_dual_level(cls: str, names: Iterable[str]) -> set[str]:
    """Which of these calls are refused by name; the others are right."""
    lens = lens_of(cls)
    refused: set[str] = set()
    for name in names:
        wanted = expected(cls, name)
        with fwad.dual_level():
            try:
                assert same(CALLS[name](lens, tokens()), wanted, 1e-6), name
            except ll.errors.ModelStateError as error:
                assert "forward-mode derivatives" in str(error)
                refused.add(name)
    return refused


@pytest.mark.parametrize("cls", models.MAKERS)
def test_some_calls_within_a_dual_level(cls: str):
    """Forward mode is refused, as torch has one level; all else is right."""
    assert refused_within_a_dual_level(cls, SOME) == {"forward"}


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_every_call_within_a_dual_level(cls: str):
    forward = {"forward", "frozen, forward", "components", "logit_shift", "joint", "tangents"}
    forward |= {"explain_all", "tangent of f"}
    assert refused_within_a_dual_level(cls, CALLS) == forward | REFUSED


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_model_that_turns_autocast_on_itself(cls: str):
    """As accelerate does to a model that it prepares for mixed precision."""
    lens = make(cls)
    lens.model.forward = torch.autocast("cpu", torch.bfloat16)(lens.model.forward)
    for name in ("first_order", "remainder", "patch_sites", "fact_margin"):
        with pytest.raises(ll.errors.ModelStateError, match="turns autocast on.*unwrap_model"):
            CALLS[name](lens, tokens())


@pytest.mark.skipif(
    os.environ.get("LENS_LORA_SHAPES") == "checked", reason="the check wraps what `alone` returns"
)
def test_every_public_call_on_a_lens_is_alone():
    """A sweep is so batch by batch: others may work between them."""
    public = {name: getattr(ll, name) for name in ll.__all__}
    taking = {
        name: fn
        for name, fn in public.items()
        if inspect.isfunction(fn) and next(iter(inspect.signature(fn).parameters), "") == "lens"
    }
    assert len(taking) > 15
    bare = {name for name, fn in taking.items() if not is_alone(fn)}
    assert bare == {"sweep"}
    assert is_alone(ll.LoraLens.logits)
    assert is_alone(ll.LoraLens.__init__)
    assert not is_alone(ll.compare)
    # A server is asked in `tests/ship/test_served.py` alone.
    by_folder.require_in_list("CALLS", taking, [*CALLS, "verify_served"])
    assert OWN


def is_alone(fn: Any) -> bool:
    return inspect.unwrap(fn) is not fn and fn.__code__.co_filename == public_call.__file__


# --- planted faults


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("name", ["inference_mode", "autocast"])
def test_settings_that_are_left_on_show(name: str, cls: str, monkeypatch):
    monkeypatch.setattr(public_call, "_prepare", lambda lens, span: None)
    for module in (function, unembedding):
        monkeypatch.setattr(module, "unrounded", lambda residual: residual)
    with AROUND[name]():
        found = CALLS["first_orders"](lens_of(cls), tokens())
    assert not same(found, expected(cls, "first_orders"), 1e-3)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("what", ["torch", "a device", "python"])
def test_memory_that_runs_out_names_what_bounds_it(cls: str, what: str):
    lens = lens_of(cls)
    large = 2**50

    def ask_too_much(tensor: torch.Tensor, hook: object) -> None:
        if what == "a device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        bytearray(large) if what == "python" else torch.empty(large, dtype=torch.uint8)

    hooks = [(lens.plan.host.block_input(1), ask_too_much)]
    for name in ("logits", "first_order", "forward", "patch_sites", "tangents", "second_order"):
        for one, says in ((lens, "no bound is set"), (lens.within(1e12), "max_memory is 1e")):
            with (
                lens.model.hooks(fwd_hooks=hooks),
                pytest.raises(ll.errors.OutOfMemoryError, match=rf"{says}.*lens\.within.*names="),
            ):
                CALLS[name](one, tokens())
    assert not lens.model.hook_dict[hooks[0][0]]._forward_hooks
