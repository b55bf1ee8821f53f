"""A readout declared by a function of the logits: as `Readout.of`, and in groups as well."""

from __future__ import annotations

import copy

import cases
import models
import numpy as np
import pytest
import torch
from differences import largest_difference
from torch import Tensor

import lens_lora as ll
from lens_lora.core import DeclaredReadout, declared_readout
from lens_lora.core.readout.readout import LastToken

TEXTS = ["w5 w7 w8", "w9 w10 w11 w12", "w4", "w6 w7"]
FORMER_NAMES = [
    (ll.Readout, "over", "reading"),
    (LastToken, "over", "reading"),
    (LastToken, "bind", "of_logits"),
    (ll.Logit, "bind", "of_logits"),
    (ll.Margin, "over", "reading"),
]


@ll.readout(units="nats", label="H(next token)")
def Entropy(logits: Tensor) -> Tensor:
    """The entropy of the next token."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@ll.readout(units="logits", label="the {k} largest logits")
def Largest(logits: Tensor, k: int, *, sign: float = 1.0) -> Tensor:
    return sign * logits.topk(k).values.sum(-1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", models.MAKERS)
def test_it_is_the_same_readout_as_of_the_function(cls: str):
    """Values, slopes and effects; and where prompts go in groups, which `Readout.of` cannot."""
    lens = cases.case("llama", cls, "raw").lens
    same = ll.Readout.of(lambda logits: torch.distributions.Categorical(logits=logits).entropy())
    expected = ll.first_order(lens, TEXTS, same, at=0.5)
    found = ll.first_order(lens, TEXTS, Entropy(), at=0.5)
    assert largest_difference(found.values, expected.values) < 1e-9
    assert largest_difference(found.shift, expected.shift) < 1e-9
    small = ll.first_order(lens.within(2e5), TEXTS, Entropy(), at=0.5)
    assert largest_difference(small.values, expected.values) < 1e-9
    found, expected = (
        ll.patch_sites(lens, TEXTS, readout, progress=False) for readout in (Entropy(), same)
    )
    assert largest_difference(found.values, expected.values) < 1e-9
    assert (found.readout, found.units) == ("H(next token)", "nats")


def test_parameters_of_the_function_are_those_of_the_class():
    five = Largest(5)
    six = Largest(k=6, sign=-1.0)
    assert five.label == "the 5 largest logits"
    assert repr(six) == "Largest(k=6, sign=-1.0)"
    assert five == Largest(k=5) != six
    assert len({five, Largest(5)}) == 1
    logits = torch.randn(3, 61)
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    read = six.reading(lens.model, lens.prompts(TEXTS[:3])).read
    assert torch.equal(read(logits), -logits.topk(6).values.sum(-1))
    assert Entropy.__doc__ == "The entropy of the next token."
    assert Entropy.__module__ == __name__
    assert isinstance(Entropy(), ll.Readout)
    assert Entropy().units == "nats"
    with pytest.raises(TypeError, match="missing a required argument: 'k'"):
        Largest()


def mean_of_rows(logits: Tensor) -> Tensor:
    return logits[:, 0] - logits[:, 0].mean()


REFUSED = {
    "other rows": (mean_of_rows, "another number beside other rows"),
    "a shape": (lambda logits: logits, "expected one number a row"),
    "no tensor": (lambda logits: 3.0, "gave float for logits"),
    "no derivative": (lambda logits: logits.argmax(-1).double(), "cuts its derivative"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("function", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_as_declared_is_refused_when_it_is_bound(function, words: str):
    lens = cases.case("llama", next(iter(models.MAKERS)), "raw").lens
    declared = ll.readout(units="logits", label="own")(function)
    with pytest.raises(ll.errors.ArgumentError, match=words):
        lens.function(TEXTS, declared())


@pytest.mark.bad_input
def test_a_declaration_that_says_nothing_is_refused():
    with pytest.raises(ll.errors.ArgumentError, match="units=3"):
        ll.readout(units=3, label="own")
    with pytest.raises(ll.errors.ArgumentError, match=r"label='the \{n\} largest' names 'n'"):
        ll.readout(units="logits", label="the {n} largest")(Largest.function)
    with pytest.raises(ll.errors.ArgumentError, match="no function of the logits"):
        ll.readout(units="logits", label="own")(lambda: 0)


@pytest.mark.bad_input
def test_a_decorator_without_arguments_says_what_stands_there():
    """`readout() takes 0 positional arguments but 1 was given` named neither units nor label."""
    with pytest.raises(ll.errors.CallError, match='@ll.readout.units="nats", label='):
        ll.readout(Largest.function)
    with pytest.raises(ll.errors.CallError, match="takes no unit=.*units, label"):
        ll.readout(unit="nats", label="own")


@pytest.mark.bad_input
def test_arguments_that_a_declared_readout_lacks_are_refused_by_its_name():
    with pytest.raises(ll.errors.CallError, match=r"Largest takes no n=.*It is k="):
        Largest(n=3)
    with pytest.raises(ll.errors.CallError, match="Weighted: .*'weights'"):
        Weighted()


@ll.readout(units="logits", label="a weighted sum")
def Weighted(logits: Tensor, weights: object) -> Tensor:
    return (logits * weights).sum(-1)


READOUTS_OF_A_VALUE = {
    "declared": Weighted,
    "Logit": ll.Logit,
    "LogProb": ll.LogProb,
    "Margin": lambda value: ll.Margin(3, value),
}
DIFFERENT_VALUES = {
    "another entry": torch.tensor([5, 8]),
    "another size": torch.tensor([5, 7, 7]),
    "another dtype": torch.tensor([5, 7], dtype=torch.int32),
    "a list": [5, 7],
    "a list of tensors": [torch.tensor(5), torch.tensor(7)],
    "an array": np.array([5, 7]),
    "a string": "w5",
    "a dict of tensors": {"ids": torch.tensor([5, 7])},
}


@pytest.mark.bad_input
@pytest.mark.parametrize("make", READOUTS_OF_A_VALUE.values(), ids=READOUTS_OF_A_VALUE)
def test_readouts_are_equal_where_their_tensors_are(make):
    """Entry by entry: the == of two tensors of several entries is no truth value."""
    one = make(torch.tensor([5, 7]))
    same = make(torch.tensor([5, 7]))
    assert one == same
    assert len({one, same}) == 1
    for value in DIFFERENT_VALUES.values():
        other = make(value)
        assert one != other
        assert other != one
        assert other == make(copy.deepcopy(value))
        assert hash(other) == hash(make(value))
    assert one != ll.Readout.of(torch.logsumexp)
    assert one != 5


def test_the_door_has_the_decorator_under_a_name_that_is_no_package():
    """`lens_lora.core.readout` is the package of that name."""
    assert declared_readout is ll.readout
    assert isinstance(Entropy(), DeclaredReadout)


def test_the_former_name_of_of_logits_warns_and_does_the_same():
    model = models.MAKERS[next(iter(models.MAKERS))](models.hf_model("llama"))
    logits = torch.randn(2, model.cfg.d_vocab_out, generator=models.seeded(0))
    margin = ll.Margin(5, 9)
    with pytest.warns(ll.errors.LensLoraWarning, match=r"Margin\.bind is called of_logits now"):
        read = margin.bind(model, 2)
    assert torch.equal(read(logits), margin.of_logits(model, 2)(logits))


def test_the_former_name_of_reading_warns_and_does_the_same():
    model = models.MAKERS[next(iter(models.MAKERS))](models.hf_model("llama"))
    prompts = ll.results.Prompts(models.tokens(), torch.tensor([7, 4]))
    logits = torch.randn(2, model.cfg.d_vocab_out, generator=models.seeded(0))
    margin = ll.Margin(5, 9)
    with pytest.warns(ll.errors.LensLoraWarning, match=r"Margin\.over is called reading now"):
        reading = margin.over(model, prompts)
    assert torch.equal(reading.read(logits), margin.reading(model, prompts).read(logits))


@pytest.mark.parametrize(("base", "former", "new"), FORMER_NAMES)
def test_a_class_of_ones_own_under_a_former_name_is_refused(base, former, new):
    """Of a class derived from `Logit`, Logit's own method would be called in its place."""
    method = {former: lambda self, *given: None}
    with pytest.raises(ll.errors.ArgumentError, match=rf"Mine defines {former}, .* {new} now"):
        type("Mine", (base,), method)


@pytest.mark.parametrize(("base", "former", "new"), FORMER_NAMES)
def test_a_class_of_ones_own_may_have_both_names(base, former, new):
    """It is then one that works with the former release, too."""
    methods = dict.fromkeys((former, new), lambda self, *given: None)
    assert issubclass(type("Mine", (base,), methods), base)
