"""Within an open block every public call is right, or refused by the name of the block's adapter.

Right is what the call gives outside of the block.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager as Manager
from typing import Any, NamedTuple

import cases
import models
import pytest
import torch
from differences import largest_difference
from every_call import CALLS, same
from interrupts import held

import lens_lora as ll
from lens_lora.core.model import hooks, injections
from lens_lora.core.model.injections import ScaleInject

WITHIN = "within another one, by a hook or a readout of yours.*Make it beforehand"


def by_name(adapter: str) -> str:
    return rf"adapter '{adapter}' is on the model already.*outside of the block.*\(a \+ b\)"


class Lenses(NamedTuple):
    """Over one model: of the calls, of another adapter, and of one at other sites."""

    own: ll.LoraLens
    other: ll.LoraLens
    elsewhere: ll.LoraLens


def tokens() -> torch.Tensor:
    return models.tokens(batch=2, pos=5)


@functools.cache
def lenses(cls: str) -> Lenses:
    base = models.hf_model("llama", dtype=torch.float32)

    def adapter(name: str, seed: int, targets: list[str] | None = None) -> ll.Adapter:
        return ll.Adapter.from_peft(models.peft_model("llama", base, seed, targets)).named(name)

    own = ll.LoraLens(models.MAKERS[cls](base), adapter("own", 0))
    other = own.with_adapter(adapter("other", 5))
    return Lenses(own, other, own.with_adapter(adapter("ends", 6, ["embed_tokens", "lm_head"])))


@functools.cache
def expected(cls: str, name: str) -> Any:
    return CALLS[name](lenses(cls).own, tokens())


@contextlib.contextmanager
def permanent(lens: ll.LoraLens) -> Iterator[None]:
    for name, fn in lens.fwd_hooks():
        lens.model.hook_dict[name].add_hook(fn, is_permanent=True)
    try:
        yield
    finally:
        lens.model.reset_hooks(including_permanent=True)


@contextlib.contextmanager
def by_torch(lens: ll.LoraLens) -> Iterator[None]:
    """In functions of the user's, of which TransformerLens knows nothing."""
    points = lens.model.hook_dict
    handles = []
    for name, fn in lens.fwd_hooks():

        def hook(module: Any, args: Any, output: Any, fn: Any = fn) -> Any:
            return fn(output, hook=module)

        handles.append(points[name].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def listed(lens: ll.LoraLens, wrap: Callable[[Any], Any] = lambda fn: fn) -> Manager[Any]:
    return lens.model.hooks(fwd_hooks=[(name, wrap(fn)) for name, fn in lens.fwd_hooks()])


BLOCKS: dict[str, Callable[[Lenses], Manager[Any]]] = {
    "applied": lambda of: of.own.applied(),
    "applied at 0": lambda of: of.own.applied(0.0),
    "one site applied": lambda of: of.own.applied({"blocks.1.mlp.down": 0.5}),
    "another adapter": lambda of: of.other.applied(),
    "another lens": lambda of: ll.LoraLens(of.own.model, of.other.adapter).applied(),
    "other sites": lambda of: of.elsewhere.applied(),
    "injected": lambda of: of.own.injected(ScaleInject(of.own.plan, of.own.gates())),
    "a list of hooks": lambda of: listed(of.own),
    "partials": lambda of: listed(of.own, functools.partial),
    "lambdas": lambda of: listed(of.own, lambda fn: lambda tensor, hook: fn(tensor, hook=hook)),
    "permanent hooks": lambda of: permanent(of.own),
    "torch's hooks": lambda of: by_torch(of.own),
}
NAMES = {"another adapter": "other", "another lens": "other", "other sites": "ends"}


def outcome(of: Lenses, name: str, words: str) -> str:
    """'right', 'wrong', or 'refused' in these words."""
    try:
        numbers = CALLS[name](of.own, tokens())
    except ll.errors.ModelStateError as error:
        assert re.search(words, str(error)), error
        return "refused"
    cls = of.own.class_name
    return "right" if same(numbers, expected(cls, name), 1e-6) else "wrong"


def refused_in(block: str, cls: str, names: Iterable[str]) -> set[str]:
    """Which of these calls are refused in a block, in its words; the others are right."""
    of = lenses(cls)
    for name in names:
        expected(cls, name)  # with which a bridge has put hooks of its own on its parts
    before = held(of.own.model)
    words = by_name(NAMES.get(block, "own"))
    outcomes: dict[str, str] = {}
    for name in names:
        # A bank refuses whatever hooks are there, and may not know what they call.
        more = "|hooks of your own are on the model" if name in ("bank", "scan") else ""
        with BLOCKS[block](of):
            outcomes[name] = outcome(of, name, words + more)
    assert "wrong" not in outcomes.values(), outcomes
    assert held(of.own.model) == before
    assert same(CALLS["logits"](of.own, tokens()), expected(cls, "logits"), 1e-6)
    return {name for name, result in outcomes.items() if result == "refused"}


# Calls of each kind, which all blocks refuse.
REFUSED = {"logits", "forward", "patch_sites", "generate", "kl_shares", "sweep"}


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_some_calls_in_every_block(block: str, cls: str):
    some = ("logits", "forward", "patch_sites")
    assert refused_in(block, cls, some) == {*some}


@pytest.mark.exhaustive
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_call_in_every_block(block: str, cls: str):
    assert refused_in(block, cls, CALLS) >= REFUSED


@pytest.mark.parametrize("cls", models.MAKERS)
def test_what_runs_no_model_works_in_a_block(cls: str):
    own, other, _ = lenses(cls)
    with own.applied():
        assert own.with_adapter(other.adapter).sites == other.sites
        assert len(ll.LoraLens(own.model, other.adapter).fwd_hooks()) == len(other.fwd_hooks())
        assert own.prompts("w5 w6").batch == 1
        assert own.delta_w("blocks.0.attn.q").rdim == 16


@pytest.mark.sample(2)
@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("outer", ["logits", "first_order", "forward", "generate", "patch_sites"])
def test_a_call_from_a_hook_of_the_users_within_a_call(outer: str, cls: str):
    """Of another lens on the model, while the outer one's hooks are on it."""
    of = lenses(cls)
    seen = list[str]()
    point = of.own.plan.host.block_input(1)

    def ask(tensor: torch.Tensor, hook: Any) -> None:
        if not seen:
            seen.append("asked")
            seen.append(outcome(of, "logits", WITHIN))

    with of.own.model.hooks(fwd_hooks=[(point, ask)]):
        found = CALLS[outer](of.own, tokens())
    assert seen == ["asked", "refused"]
    assert same(found, expected(cls, outer), 1e-6)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("outer", ["remainder", "patch_sites", "first_order"])
def test_a_call_from_a_readout(outer: str, cls: str):
    of = lenses(cls)
    seen = set[str]()

    def read(logits: torch.Tensor) -> torch.Tensor:
        seen.add(outcome(of, "logits", WITHIN))
        return logits[:, 5] - logits[:, 9]

    {"remainder": ll.remainder, "patch_sites": ll.patch_sites, "first_order": ll.first_order}[
        outer
    ](of.own, tokens(), ll.Readout.of(read))
    assert seen
    assert "wrong" not in seen


@pytest.mark.parametrize("cls", models.MAKERS)
def test_calls_between_the_texts_of_a_sweep(cls: str, tmp_path):
    """No hook is on the model there."""
    of = lenses(cls)
    seen = list[str]()

    def records() -> Iterator[dict[str, str]]:
        for word in ("w5", "w6 w7"):
            seen.append(outcome(of, "logits", WITHIN))
            yield {"prompt": word}

    ll.sweep(of.own, records(), "activations", out=tmp_path / "r.parquet", progress=False)
    assert seen == ["right", "right"]


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_sweep_in_a_block_writes_nothing(cls: str, tmp_path):
    """Nor does it resume one, whose finished prompts would be of the base model."""
    of = lenses(cls)

    def run() -> int:
        records = [{"prompt": "w5 w6", "doc": " w5", "pre": " w9"}]
        return ll.sweep(of.own, records, out=tmp_path / "r.parquet", progress=False).resumed

    for resumed in (0, 1):
        before = sorted(tmp_path.iterdir())
        with (
            of.other.applied(),
            pytest.raises(ll.errors.ModelStateError, match=by_name("other")),
        ):
            run()
        assert sorted(tmp_path.iterdir()) == before
        assert run() == resumed


@pytest.mark.parametrize("cls", models.MAKERS)
def test_hooks_that_another_thread_has_put_on(cls: str):
    """A list of hooks takes no lock, so the call does not wait for its end (`test_threads`)."""
    of = lenses(cls)
    with ThreadPoolExecutor(1) as pool, listed(of.other):
        assert pool.submit(outcome, of, "logits", by_name("other")).result(timeout=60) == "refused"


# --- blocks within one another


def nested_off(lens: ll.LoraLens, first: ll.Adapter, second: ll.Adapter, how: str) -> float:
    """How far the model in blocks of both is from a lens of their sum."""
    both = [lens.with_adapter(adapter) for adapter in (first.named("a"), second.named("b"))]
    wanted = lens.with_adapter(both[0].adapter + both[1].adapter).logits(tokens())
    with torch.no_grad(), contextlib.ExitStack() as blocks:
        for part in both:
            blocks.enter_context(part.applied() if how == "blocks" else listed(part))
        return largest_difference(lens.model(tokens()), wanted)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("how", ["blocks", "lists"])
@pytest.mark.usefixtures("float64")
def test_blocks_add_up(how: str, cls: str):
    """Also of the same sites, and where norms are folded."""
    for family, flags in (("llama", "processed"), ("gpt2", "raw")):
        lens = cases.case(family, cls, flags).lens
        assert nested_off(lens, lens.adapter, lens.adapter.scaled(0.5), how) < 1e-10


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_end_in_any_order(first: int, cls: str):
    """What is left on the model is the other's alone, and after both the model is as it was."""
    own, other, _ = lenses(cls)
    own.model(tokens())
    before = held(own.model)
    kinds = list(map(type, own.model.modules()))
    left = (own, other)[1 - first].logits(tokens())
    blocks = own.applied(), other.applied()
    for block in blocks:
        block.__enter__()
    blocks[first].__exit__(None, None, None)
    assert torch.equal(own.model(tokens()), left)
    assert hooks.lock_of(own.model).holders  # other threads still wait
    blocks[1 - first].__exit__(None, None, None)
    assert held(own.model) == before
    assert list(map(type, own.model.modules())) == kinds


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("block", ["applied", "without"])
def test_no_reset_takes_a_block_s_hooks_off(block: str, cls: str):
    """The rest of the block would run the base."""
    own, *_ = lenses(cls)
    own.model(tokens())
    before = held(own.model)
    with (
        torch.no_grad(),
        own.applied() if block == "applied" else own.ablate_directions(torch.eye(16)[0]),
    ):
        inside = own.model(tokens())
        own.model.reset_hooks()
        with pytest.raises(ll.errors.ModelStateError, match="Leave the block first"):
            own.model.reset_hooks(including_permanent=True)
        assert torch.equal(own.model(tokens()), inside)
    assert held(own.model) == before


def halved(gates: torch.Tensor) -> None:
    gates.mul_(0.5)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("how", ["block", "list"])
def test_gates_that_are_edited_in_place(how: str, cls: str):
    """A pass has those of now, as an optimiser's, or is refused; none has those of before."""
    own, *_ = lenses(cls)
    expected = [own.logits(tokens(), scale) for scale in (1.0, 0.5)]

    def logits(gates: Any, edit: Callable[[], object]) -> list[torch.Tensor]:
        hooks = own.fwd_hooks(gates) if how == "list" else []
        with torch.no_grad(), own.applied(gates) if how == "block" else contextlib.nullcontext():
            first = own.model.run_with_hooks(tokens(), fwd_hooks=hooks)
            edit()
            return [first, own.model.run_with_hooks(tokens(), fwd_hooks=hooks)]

    ones = torch.ones(len(own.sites), requires_grad=True)
    for found, wanted in zip(logits(ones, functools.partial(halved, ones)), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
    plain = torch.ones(len(own.sites))
    double = torch.ones(len(own.sites), dtype=torch.float64)
    zero = torch.zeros(len(own.sites))
    number = torch.tensor(1.0)
    edits = [(gates, functools.partial(halved, gates)) for gates in (plain, double, number)]
    edits += [({"*": number}, functools.partial(halved, number)), (zero, lambda: zero.fill_(1.0))]
    for gates, edit in edits:
        with pytest.raises(ll.errors.ModelStateError, match="gates were edited in place"):
            logits(gates, edit)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_a_call_leaves_a_block_open_that_its_callback_opened(cls: str):
    """Of a generator over another model that a readout takes one step on."""
    own = lenses(cls).own
    judge = ll.LoraLens(lenses(cls).own.model, lenses(cls).other.adapter)
    judge = ll.LoraLens(copy.deepcopy(judge.model), judge.adapter)
    adapted = judge.logits(tokens())

    def judged() -> Iterator[torch.Tensor]:
        with judge.applied() as model:
            while True:
                yield model(tokens()).detach()

    steps = judged()

    def read(logits: torch.Tensor) -> torch.Tensor:
        assert torch.allclose(next(steps), adapted, atol=1e-5)
        return logits[:, 5]

    ll.first_order(own, tokens(), ll.Readout.of(read))
    assert torch.allclose(next(steps), adapted, atol=1e-5)
    steps.close()
    assert torch.equal(judge.logits(tokens()), adapted)


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("how", ["blocks", "lists"])
@pytest.mark.usefixtures("float64")
def test_blocks_of_v_and_o_where_value_biases_are_folded(how: str, cls: str, monkeypatch):
    """What v's bias becomes passes through o, whose update the other block has: refused."""
    lens = cases.case("gpt2", cls, "processed").lens
    v = lens.adapter.only("*.c_attn")
    o = lens.adapter.only("*.attn.c_proj")
    for parts in ((v, o), (o, v), (lens.adapter, lens.adapter)):
        with pytest.raises(
            ll.errors.ModelStateError, match=r"attn\.v and .*attn\.o .*two blocks.*add up"
        ):
            nested_off(lens, *parts, how)
    mlp = lens.adapter.only("*.mlp.*")
    assert nested_off(lens, v, v.scaled(0.5), how) < 1e-10
    assert nested_off(lens, lens.adapter, mlp, how) < 1e-10
    monkeypatch.setattr(injections._Writer, "_require_own_update_of_o", lambda *_: None)
    assert nested_off(lens, v, o, how) > 1e-2


@pytest.mark.parametrize("cls", models.MAKERS)
@pytest.mark.parametrize("family, norm", [("llama", "input_layernorm"), ("gpt2", "ln_1")])
def test_blocks_of_a_norm_and_of_what_reads_it(family: str, norm: str, cls: str, monkeypatch):
    base = models.hf_model(family, dtype=torch.float32)
    peft = models.peft_model(family, base, modules_to_save=[norm])
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            weight.mul_(1.5 if "modules_to_save" in name else 1.0)
    whole = ll.Adapter.from_peft(peft)
    lens = ll.LoraLens(models.MAKERS[cls](base), whole, hf_model=base)
    norms = whole.only(f"*{norm}")
    others = whole.without_modules(f"*{norm}")
    for parts in ((norms, others), (others, norms)):
        with pytest.raises(ll.errors.ModelStateError, match=r"ln1 is a norm .*do not add up.*sum"):
            nested_off(lens, *parts, "blocks")
    halves = [{site.name: 1.0} for site in lens.sites]
    with torch.no_grad(), contextlib.ExitStack() as blocks:
        for half in halves:
            blocks.enter_context(lens.applied(half))
        adapted = lens.model(tokens())
    assert torch.allclose(adapted, lens.logits(tokens()), atol=1e-4)
    monkeypatch.setattr("lens_lora.core.model.adapted_model.require_sum", lambda *_: None)
    if (cls, family) == ("HookedTransformer", "llama"):  # whose q is read before γ
        assert nested_off(lens, norms, others, "blocks") > 1e-2


# --- the planted fault


@pytest.mark.parametrize("cls", models.MAKERS)
def test_without_the_check_the_adapter_is_applied_twice(cls: str, monkeypatch):
    of = lenses(cls)
    names = ("logits", "first_order")
    for name in names:
        expected(cls, name)  # made without the fault
    monkeypatch.setattr(injections, "require_own_hooks", lambda laid_by, adapter: None)
    with of.own.applied():
        assert {outcome(of, name, "") for name in names} == {"wrong"}
        twice = of.own.logits(tokens())
    assert torch.allclose(twice, of.own.logits(tokens(), 2.0), atol=1e-4)
