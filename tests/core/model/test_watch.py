"""A weight that changes after the lens was made is named, however it was changed."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from differences import largest_difference
from every_call import CALLS
from torch import Tensor, nn

import lens_lora as ll
from lens_lora.core.model.watch import Watch

MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens()


def places(model: Any) -> dict[str, tuple[nn.Module, str]]:
    """Weights of block 0 that updates are computed from, by what they are, and W_U."""
    block = model.blocks[0]
    if type(model).__name__ == "HookedTransformer":
        attn = {name: (block.attn, name) for name in ("W_Q", "W_O")}
        return {"γ": (block.ln1, "w"), **attn, "W_U": (model.unembed, "W_U")}
    return {
        "γ": (block.ln1.original_component, "weight"),
        "W_Q": (block.attn.q.original_component, "weight"),
        "W_O": (block.attn.o.original_component, "weight"),
        "W_U": (model.unembed.original_component, "weight"),
    }


def doubled(owner: nn.Module, name: str) -> None:
    with torch.no_grad():
        getattr(owner, name).mul_(2)


def doubled_through_data(owner: nn.Module, name: str) -> None:
    getattr(owner, name).data.mul_(2)


def other_data(owner: nn.Module, name: str) -> None:
    getattr(owner, name).data = 2 * getattr(owner, name).data


def other_parameter(owner: nn.Module, name: str) -> None:
    setattr(owner, name, nn.Parameter(2 * getattr(owner, name).detach()))


def loaded(owner: nn.Module, name: str) -> None:
    state = {key: 2 * value for key, value in owner.state_dict().items()}
    owner.load_state_dict(state)


def trained(owner: nn.Module, name: str) -> None:
    weight = getattr(owner, name).requires_grad_()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


EDITS = {
    doubled: "was edited in place",
    doubled_through_data: "was edited in place",
    other_data: "was moved or cast, or got other data",
    other_parameter: "was replaced",
    loaded: "was edited in place",
    trained: "was edited in place",
}


@pytest.fixture(params=models.MAKERS)
def made(request) -> SimpleNamespace:
    base = models.hf_model("llama")
    peft = models.peft_model("llama", base, use_dora=True)
    model = models.MAKERS[request.param](base)
    return SimpleNamespace(
        base=base, peft=peft, model=model, lens=ll.LoraLens(model, ll.Adapter.from_peft(peft))
    )


@pytest.mark.sample(6)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("weight", ["γ", "W_Q", "W_O", "W_U"])
def test_a_weight_of_the_model(made: SimpleNamespace, weight: str, edit: Callable[..., None]):
    """γ, the base under DoRA, and what only the model itself reads."""
    owner, name = places(made.model)[weight]
    edit(owner, name)
    path = next(path for path, module in made.model.named_modules() if module is owner)
    name = r"\w+" if edit is loaded else name
    words = rf"the model's {path}\.{name} {EDITS[edit]}.* after the lens was made.*new LoraLens"
    with pytest.raises(ll.errors.ModelStateError, match=words):
        made.lens.logits(TOKENS)


USES: dict[str, Callable[[ll.LoraLens], object]] = {
    "applied": lambda lens: lens.applied().__enter__(),
    "fwd_hooks": lambda lens: lens.fwd_hooks(),
    "with_adapter": lambda lens: lens.with_adapter(lens.adapter),
    "first_order": lambda lens: ll.first_order(lens, TOKENS, MARGIN),
    "logit_shift": lambda lens: ll.logit_shift(lens, TOKENS),
    "tangents": lambda lens: ll.tangents(lens, TOKENS),
    "explain": lambda lens: ll.explain(lens, TOKENS[:1], 5, 9),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_the_lens_sees_it(made: SimpleNamespace, use: Callable[..., object]):
    """The kind of edit that is hardest to see; and the model has no hook afterwards."""
    doubled_through_data(*places(made.model)["γ"])
    with pytest.raises(ll.errors.ModelStateError, match="was edited in place"):
        use(made.lens)
    assert not any(point._forward_hooks for point in made.model.hook_dict.values())


# They are given the lens's model and make a lens of their own, or run the base as it is now.
OF_THE_MODEL_AS_IT_IS = {"bank", "scan"}


@pytest.mark.parametrize("name", sorted(CALLS.keys() - OF_THE_MODEL_AS_IT_IS))
def test_every_public_call_sees_it(stale: ll.LoraLens, name: str):
    """Also a call that reads only weights, and runs no pass that would notice."""
    with pytest.raises(ll.errors.ModelStateError, match="was edited in place"):
        CALLS[name](stale, models.tokens(batch=2, pos=5))


OF_WEIGHTS_ALONE: dict[str, Callable[[ll.LoraLens], object]] = {
    "delta_w": lambda lens: lens.delta_w(lens.sites[0]),
    "null_adapters": lambda lens: lens.null_adapters(seed=0, draws=1),
}


@pytest.mark.parametrize("read", OF_WEIGHTS_ALONE.values(), ids=OF_WEIGHTS_ALONE)
def test_what_is_read_of_the_weights_alone_sees_it(
    stale: ll.LoraLens, read: Callable[[ll.LoraLens], object]
):
    """Both describe the adapter over the base that the lens was made for."""
    with pytest.raises(ll.errors.ModelStateError, match="was edited in place"):
        read(stale)


@pytest.mark.parametrize("read", OF_WEIGHTS_ALONE.values(), ids=OF_WEIGHTS_ALONE)
def test_weights_are_read_within_a_block(
    made: SimpleNamespace, read: Callable[[ll.LoraLens], object]
):
    """The lens's own hooks are no change of the model."""
    with made.lens.applied():
        read(made.lens)


@pytest.fixture(scope="module")
def stale() -> ll.LoraLens:
    """A lens over a model of which one weight has changed since."""
    make_hooked = next(iter(models.MAKERS.values()))
    model = make_hooked(models.hf_model("llama"))
    peft = models.peft_model("llama", models.hf_model("llama"))
    lens = ll.LoraLens(model, ll.Adapter.from_peft(peft))
    doubled(*places(model)["γ"])
    return lens


@dataclasses.dataclass
class Held:
    lens: ll.LoraLens


COPIES: dict[str, Callable[[ll.LoraLens], object]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda lens: torch.save(lens, io.BytesIO()),
    "deepcopy": copy.deepcopy,
    "of a list": lambda lens: copy.deepcopy([lens]),
    "of a dataclass": lambda lens: dataclasses.asdict(Held(lens)),
    "of one with a bound": lambda lens: copy.deepcopy(lens.within(1e9)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_over_other_tensors_is_refused(made: SimpleNamespace, make: Callable[..., object]):
    with pytest.raises(ll.errors.ArgumentError, match=r"pickled or deep-copied.*LoraLens\(copy"):
        make(made.lens)


def test_what_the_refusal_advises(made: SimpleNamespace):
    expected = made.lens.logits(TOKENS)
    shallow = copy.copy(made.lens)
    assert shallow.model is made.lens.model
    assert torch.equal(shallow.logits(TOKENS), expected)
    again = ll.LoraLens(copy.deepcopy(made.lens.model), made.lens.adapter)
    assert torch.equal(again.logits(TOKENS), expected)
    adapter = pickle.loads(pickle.dumps(made.lens.adapter))
    assert torch.equal(made.lens.with_adapter(adapter).logits(TOKENS), expected)


def test_another_dtype_or_module(made: SimpleNamespace):
    model = copy.deepcopy(made.model)
    lens = ll.LoraLens(model, made.lens.adapter)
    model.to(torch.float32)
    with pytest.raises(ll.errors.ModelStateError, match="was moved or cast"):
        lens.logits(TOKENS)
    owner = next(m for m in made.model.modules() if places(made.model)["γ"][0] is m)
    path = next(path for path, module in made.model.named_modules() if module is owner)
    above, _, key = path.rpartition(".")
    made.model.get_submodule(above)._modules[key] = copy.deepcopy(owner)
    with pytest.raises(ll.errors.ModelStateError, match=rf"the model's {path} was replaced"):
        made.lens.logits(TOKENS)


def test_the_adapter(made: SimpleNamespace):
    """Its tensors are the caller's, who may go on training them."""
    plain = models.peft_model("llama", made.base, targets=["q_proj"])
    adapter = ll.Adapter.from_peft(plain)
    lens = ll.LoraLens(made.model, adapter)
    module, factors = next(iter(adapter.modules.items()))
    expected = lens.logits(TOKENS)
    factors.B.mul_(2)
    words = f"the adapter's B of {module} was edited in place"
    with pytest.raises(ll.errors.ModelStateError, match=words):
        lens.logits(TOKENS)
    factors.B.div_(2)
    assert torch.equal(ll.LoraLens(made.model, adapter).logits(TOKENS), expected)


def test_the_adapter_s_own_table(made: SimpleNamespace):
    adapter = made.lens.adapter
    module, update = next(iter(adapter.modules.items()))
    adapter.modules[module] = dataclasses.replace(update, scale=2 * update.scale)
    with pytest.raises(ll.errors.ModelStateError, match=f"adapter's update of {module} was repl"):
        made.lens.logits(TOKENS)


def test_what_a_lens_gave_away_may_be_edited(made: SimpleNamespace):
    expected = made.lens.logits(TOKENS)
    for site in made.lens.sites:
        change = made.lens.delta_w(site)
        change.A.mul_(2)
        change.B.mul_(2)
    made.lens.gates().zero_()
    assert torch.equal(made.lens.logits(TOKENS), expected)


@pytest.mark.usefixtures("float64")
def test_hf_model_counts_where_it_is_read_again():
    """The lens has taken what it needs; another adapter's lens takes it anew."""
    base = models.hf_model("gpt2")
    model = models.MAKERS[next(iter(models.MAKERS))](base, **models.PROCESSED)
    adapter = ll.Adapter.from_peft(models.peft_model("gpt2", base))
    lens = ll.LoraLens(model, adapter, hf_model=base)
    expected = lens.logits(TOKENS)
    with torch.no_grad():
        base.transformer.h[0].ln_1.bias.add_(1)
    assert torch.equal(lens.logits(TOKENS), expected)
    with pytest.raises(
        ll.errors.ModelStateError, match=r"hf_model's transformer\.h\.0\.ln_1\.bias"
    ):
        lens.with_adapter(adapter)


def test_what_leaves_the_weights_alone_is_seen_as_that(made: SimpleNamespace):
    expected = made.lens.logits(TOKENS)
    made.model.requires_grad_(False)
    made.model.eval()
    ll.first_order(made.lens, TOKENS, MARGIN)
    assert torch.equal(made.lens.logits(TOKENS), expected)


def test_without_the_watch_the_logits_are_wrong(
    made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    """Control: DoRA's ΔW of another base."""
    monkeypatch.setattr(Watch, "changed", lambda self, **how: None)
    doubled(*places(made.model)["W_Q"])
    with torch.no_grad():
        made.peft.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(2)
        oracle = made.peft(TOKENS).logits
    assert largest_difference(made.lens.logits(TOKENS), oracle) > 1e-2
    again = ll.LoraLens(made.model, made.lens.adapter)
    assert largest_difference(again.logits(TOKENS), oracle) < 1e-5


# --- a watch by itself


class Odd(nn.Module):
    """Weights of unusual kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(12, 300).T)
        self.tied = self.turned
        self.nan = nn.Parameter(torch.full((5,), float("nan")))
        self.empty = nn.Parameter(torch.empty(0))
        self.short = nn.Parameter(torch.randn(3, 4, 50).half())
        self.quantised = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.offloaded = nn.Parameter(torch.empty(4, device="meta"))


def changed(watch: Watch) -> str | None:
    return watch.changed(entries=True)


@pytest.mark.parametrize("name", ["turned", "nan", "short"])
def test_unusual_weights(name: str):
    """Transposed in memory, not a number, of another dtype."""
    module = Odd()
    watch = Watch.of_module(module, "")
    assert changed(watch) is None
    getattr(module, name).data.fill_(0.5)
    assert changed(watch) == f"{name} was edited in place"


def test_weights_that_a_forward_pass_may_replace():
    """Quantised ones are repacked, offloaded ones are brought in: no update is made from them."""
    module = Odd()
    watch = Watch.of_module(module, "")
    module.quantised.data = torch.ones(4, dtype=torch.uint8)
    module.offloaded = nn.Parameter(torch.ones(4))
    assert changed(watch) is None


def test_weights_made_in_inference_mode_have_no_version():
    with torch.inference_mode():
        linear = nn.Linear(3, 4)
    watch = Watch.of_module(linear, "")
    assert changed(watch) is None
    with torch.inference_mode():
        linear.bias.add_(1)
    assert changed(watch) == "bias was edited in place"


def test_what_is_seen_of_data():
    """A tenth of the rows or columns of a matrix, and every entry of a vector; not one entry."""
    linear = nn.Linear(960, 1000)
    watch = Watch.of_module(linear, "")
    linear.weight.data[0, 1] += 1
    assert changed(watch) is None
    for part in (slice(100), slice(400, 500)):
        for rows, columns in ((part, slice(None)), (slice(None), part)):
            linear.weight.data[rows, columns] += 1
            assert changed(watch) == "weight was edited in place"
            linear.weight.data[rows, columns] -= 1
            watch = Watch.of_module(linear, "")
    linear.bias.data[567] += 1
    assert changed(watch) == "bias was edited in place"
    assert watch.changed(entries=False) is None


def test_a_bridge_s_own_copies():
    """What `set_processed_weights` keeps beside the parameters."""
    linear = nn.Linear(3, 4)
    linear._processed_W_in = torch.ones(4, 3)  # type: ignore[assignment]
    watch = Watch.of_module(linear, "")
    linear._processed_W_in.mul_(2)
    assert changed(watch) == "_processed_W_in was edited in place"
    again = Watch.of_module(linear, "")
    linear._processed_W_in = torch.ones(4, 3)  # type: ignore[assignment]
    assert changed(again) == "_processed_W_in was replaced"


def test_factors_of_one_tensor():
    """An adapter whose modules share a tensor."""
    shared = torch.ones(2, 16)
    factors = ll.LoRAFactors(A=shared, B=torch.ones(16, 2))
    watch = Watch([(name, t) for name, t in vars(factors).items() if isinstance(t, Tensor)])
    shared += 1
    assert changed(watch) == "A was edited in place"
    assert dataclasses.replace(factors).A is shared
