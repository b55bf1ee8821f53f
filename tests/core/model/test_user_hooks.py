"""Any hook of a user's is legal at any hook point, and does what it does on the merged model.

Torch takes whatever can be called, as a forward hook or before the forward pass, first or last.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_call import CALLS, same
from model_state import merged_model

import lens_lora as ll
from lens_lora.core.model import hooks as model_hooks

pytestmark = pytest.mark.usefixtures("float64")
Registered = Any


def double(tensor):
    tensor = tensor.clone()
    tensor[..., ::2] *= 2
    return tensor


def plain(module, args, output):
    return double(output)


def named(factor, module, args, output):
    return double(output)


def empty() -> Callable[..., torch.Tensor]:
    """Its closure has a cell that holds nothing."""
    if not callable(double):
        never = None

    def hook(module, args, output):
        return double(output) if args else never

    assert hook.__closure__ == (types.CellType(),)
    return hook


def before(module, args):
    return (double(args[0]), *args[1:])


class Callable_:
    """Its attributes are its own."""

    __closure__ = 5

    def __call__(self, module, args, output):
        return double(output)

    def method(self, module, args, output):
        return double(output)


class Both:
    """Two registrations, removed together."""

    def __init__(self, *handles: Registered) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def gone_after_one(point) -> Registered:
    """Removes itself within its first call."""

    def hook(module, args, output):
        handle.remove()
        return double(output)

    handle = point.register_forward_hook(hook)
    return handle


def of_transformer_lens(hook, **options) -> Callable[[Any], Registered]:
    def register(point):
        point.add_hook(hook, **options)
        return point.fwd_hooks[0 if options else -1].hook

    return register


HOOKS: dict[str, Callable[[Any], Registered]] = {
    "TransformerLens'": of_transformer_lens(lambda tensor, hook: double(tensor)),
    "TransformerLens', first": of_transformer_lens(lambda t, hook: double(t), prepend=True),
    "TransformerLens' partial": of_transformer_lens(
        functools.partial(lambda k, t, hook: double(t), 1)
    ),
    "function": lambda p: p.register_forward_hook(plain),
    "function, first": lambda p: p.register_forward_hook(plain, prepend=True),
    "twice": lambda p: Both(p.register_forward_hook(plain), p.register_forward_hook(plain)),
    "partial": lambda p: p.register_forward_hook(functools.partial(named, 2)),
    "object": lambda p: p.register_forward_hook(Callable_()),
    "method": lambda p: p.register_forward_hook(Callable_().method),
    "empty closure": lambda p: p.register_forward_hook(empty()),
    "with keywords": lambda p: p.register_forward_hook(
        lambda module, args, kwargs, output: double(output), with_kwargs=True
    ),
    "always called": lambda p: p.register_forward_hook(plain, always_call=True),
    "gone after one": gone_after_one,
    "pre-hook": lambda p: p.register_forward_pre_hook(before),
    "pre-hook, first": lambda p: p.register_forward_pre_hook(before, prepend=True),
    "pre-hook partial": lambda p: p.register_forward_pre_hook(
        functools.partial(lambda k, module, args: before(module, args), 1)
    ),
    "pre-hook with keywords": lambda p: p.register_forward_pre_hook(
        lambda module, args, kwargs: (before(module, args), kwargs), with_kwargs=True
    ),
}  # fmt: skip


def points(lens: ll.LoraLens) -> list[str]:
    """A point that is read, one that is written (of attention and of the MLP), a block's input."""
    own = {site.kind: site for site in lens.sites if site.layer == 1}
    found = [own["q"].write, own["o"].read, own["down"].write, lens.plan.host.block_input(1)]
    return [name for name in found if name in lens.model.hook_dict]


def within(lens: ll.LoraLens, register, name: str, tokens, order: str) -> torch.Tensor:
    """The adapted model's logits with the hook, registered before or after those of the lens."""
    point = lens.model.hook_dict[name]
    with torch.no_grad():
        if order == "before applied":
            handle = register(point)
            with lens.applied() as model:
                out = model(tokens)
        elif order == "inside applied":
            with lens.applied() as model:
                handle = register(point)
                out = model(tokens)
        elif order == "before a list":
            handle = register(point)
            out = lens.model.run_with_hooks(tokens, fwd_hooks=lens.fwd_hooks())
        else:
            with lens.model.hooks(fwd_hooks=lens.fwd_hooks()) as model:
                handle = register(point)
                out = model(tokens)
    handle.remove()
    lens.model.reset_hooks()
    return out


ORDERS = ("before applied", "inside applied", "before a list", "after a list")


@pytest.mark.sample(4)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("hook", HOOKS)
def test_any_hook_does_what_it_does_on_the_merged_model(hook: str, cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)
    merged = merged_model("llama", cls, "raw")
    plain = lens.logits(tokens)
    for name in points(lens):
        with torch.no_grad():
            handle = HOOKS[hook](merged.hook_dict[name])
            expected = merged(tokens)
        handle.remove()
        merged.reset_hooks()
        assert largest_difference(expected, plain) > 1e-3, name
        for order in ORDERS:
            found = within(lens, HOOKS[hook], name, tokens, order)
            assert largest_difference(found, expected) < 1e-10, (name, order)
        point = lens.model.hook_dict[name]
        assert not (point._forward_pre_hooks)
        assert not (point.fwd_hooks)
    assert torch.equal(lens.logits(tokens), plain)


@pytest.mark.slow
@pytest.mark.parametrize("cls", models.MAKERS)
def test_builtins_and_backward_hooks_change_nothing(cls: str, capsys):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)
    expected = {name: call(lens, tokens) for name, call in SOME.items()}
    silent: dict[str, Callable[[Any], Registered]] = {
        "builtin": lambda p: p.register_forward_hook(print),
        "backward": lambda p: p.register_full_backward_hook(lambda module, into, out: None),
        "before backward": lambda p: p.register_full_backward_pre_hook(lambda module, out: None),
    }
    for register in silent.values():
        handles = [register(lens.model.hook_dict[name]) for name in points(lens)]
        for name, call in SOME.items():
            assert same(call(lens, tokens), expected[name], 1e-12), name
        Both(*handles).remove()
    assert capsys.readouterr().out


SOME = {
    name: CALLS[name]
    for name in ("logits", "first_order", "forward", "second_order", "tangents", "patch_sites")
}


@pytest.mark.sample(1)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("hook", ["partial", "object", "pre-hook", "empty closure"])
def test_analyses_see_any_hook_as_they_see_a_plain_one(hook: str, cls: str):
    """At a point that is written, where the order tells."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)
    point = lens.model.hook_dict[points(lens)[0]]
    found = {}
    for name in ("TransformerLens'", hook):
        handle = HOOKS[name](point)
        found[name] = {call: SOME[call](lens, tokens) for call in SOME}
        handle.remove()
        lens.model.reset_hooks()
    for call, expected in found["TransformerLens'"].items():
        assert same(found[hook][call], expected, 1e-10), call


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_hook_that_raises_leaves_the_model_as_it_was(cls: str):
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)

    def explode(*args):
        raise KeyError("the user's own")

    for name in points(lens):
        point = lens.model.hook_dict[name]
        for register in (point.register_forward_hook, point.register_forward_pre_hook):
            handle = register(explode)
            for call in SOME.values():
                with pytest.raises(KeyError, match="the user's own"):
                    call(lens, tokens)
            handle.remove()
            assert not (point._forward_pre_hooks)
            assert not (point.fwd_hooks)


# --- embeddings and head: where a site is, hooks of the embedding's own points


@pytest.fixture(scope="module", params=models.MAKERS)
def ends(request):
    """A lens over embedding, head and two linears, and the model of the merged weights."""
    with models.lifted():
        base = models.hf_model("llama")
        targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
        peft = models.peft_model("llama", base, targets=targets)
        lens = ll.LoraLens(models.MAKERS[request.param](base), ll.Adapter.from_peft(peft))
        merged = copy.deepcopy(peft).merge_and_unload()
        merged.config.architectures = base.config.architectures
        return lens, models.MAKERS[request.param](merged)


def other_tokens(tokens):
    return (tokens + 1) % models.VOCAB


ENDS = ("embed.hook_in", "embed.hook_out", "hook_embed", "unembed.hook_in", "unembed.hook_out")


@pytest.mark.parametrize("hook", ["TransformerLens'", "pre-hook"])
def test_hooks_at_an_adapted_embedding_and_head(hook: str, ends):
    lens, merged = ends
    tokens = models.tokens(batch=1, pos=4)
    for name in [name for name in ENDS if name in lens.model.hook_dict]:
        change = other_tokens if name == "embed.hook_in" else double
        register = {
            "TransformerLens'": of_transformer_lens(lambda t, hook, change=change: change(t)),
            "pre-hook": lambda p, change=change: p.register_forward_pre_hook(
                lambda module, args: (change(args[0]), *args[1:])
            ),
        }[hook]
        with torch.no_grad():
            handle = register(merged.hook_dict[name])
            expected = merged(tokens)
        handle.remove()
        merged.reset_hooks()
        for order in ORDERS[:2]:
            found = within(lens, register, name, tokens, order)
            assert largest_difference(found, expected) < 1e-10, (name, order)


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("ends", ["TransformerBridge"], indirect=True)
def test_a_list_whose_token_hook_comes_too_late(ends):
    """What reads the tokens stands before it in the list: refused, with both ways out.

    A HookedTransformer has no hook point of the tokens.
    """
    lens, _ = ends
    tokens = models.tokens(batch=1, pos=4)
    theirs = [("embed.hook_in", lambda tensor, hook: other_tokens(tensor))]
    with pytest.raises(ll.errors.ModelStateError, match=r"embed\.hook_in: a hook after .*applied"):
        lens.model.run_with_hooks(tokens, fwd_hooks=[*lens.fwd_hooks(), *theirs])
    right = lens.model.run_with_hooks(tokens, fwd_hooks=[*theirs, *lens.fwd_hooks()])
    assert torch.allclose(right, lens.logits(other_tokens(tokens)), rtol=0, atol=1e-12)


# --- planted faults


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_writer_behind_a_pre_hook_shows(cls: str, monkeypatch):
    """The output without δ is doubled, then δ is added."""
    lens = cases.case("llama", cls, "raw").lens
    tokens = models.tokens(batch=1, pos=4)
    name = points(lens)[0]
    right = within(lens, HOOKS["pre-hook"], name, tokens, "before applied")
    monkeypatch.setattr(model_hooks, "_move_before_pre_hooks", lambda point, fn: None)
    wrong = within(lens, HOOKS["pre-hook"], name, tokens, "before applied")
    assert largest_difference(wrong, right) > 1e-3
