"""The cheaper mode is taken, memory is bounded, and neither changes a number."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from every_family import EVERY, lens_of
from torch.utils._python_dispatch import TorchDispatchMode

import lens_lora as ll
from lens_lora.core.function import gate_graph, tangents
from lens_lora.core.function import memory as batching
from lens_lora.core.function.footprint import dual_copy_bytes, dual_pass_bytes
from lens_lora.core.function.gate_graph import hessian_product
from lens_lora.core.function.memory import tangents_at_once
from lens_lora.core.function.modes import chosen_mode, tangent_passes
from lens_lora.core.function.reverse import site_slopes

pytestmark = pytest.mark.usefixtures("float64")
CLASSES = pytest.mark.parametrize("cls", models.MAKERS)
PROMPTS = ["w5 w7 w8", "w9 w10 w11 w12 w13 w14"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.sample(4)
@pytest.mark.parametrize(("family", "cls", "flags"), EVERY)
def test_tokens_by_reverse_equal_tokens_by_forward(family: str, cls: str, flags: str):
    lens = lens_of(family, cls, flags)
    for at in (0.0, 0.7):
        reverse, forward = (
            ll.logit_shift(lens, PROMPTS, tokens=[7, 9, 3], at=at, mode=mode, progress=False)
            for mode in ("reverse", "forward")
        )
        assert reverse.values.shape == (2, len(lens.sites), 3)
        assert relative(reverse.values, forward.values) < 1e-11
        assert (reverse.tokens, reverse.sites) == (forward.tokens, forward.sites)


@CLASSES
def test_tokens_by_reverse_in_any_chunks(cls: str, monkeypatch):
    lens = cases.case("llama", cls, "raw").lens
    tokens = list(range(lens.model.cfg.d_vocab_out))
    whole = ll.logit_shift(lens, PROMPTS, mode="forward", progress=False)
    monkeypatch.setattr(batching, "COVECTOR_TOKENS", 5 * 12)
    found = ll.logit_shift(lens, PROMPTS, tokens=tokens, mode="reverse", progress=False)
    assert relative(found.values, whole.values) < 1e-11


@CLASSES
def test_the_mode_is_chosen_by_the_work_of_each(cls: str, monkeypatch):
    """Two layers of seven sites: 14 + 7 block passes of tangents, 10.5 passes; so ten tokens."""
    lens = cases.case("llama", cls, "raw").lens
    assert len(lens.sites) == 14
    assert tangent_passes(lens) == 10.5
    taken: list[str] = []
    for module, name in ((gate_graph, "slopes_of_each"), (tangents, "part_tangents")):
        real = getattr(module, name)

        def spy(*args, name=name, real=real, **options):
            taken.append(name)
            return real(*args, **options)

        monkeypatch.setattr(module, name, spy)
    for readouts in (1, 10, 11):
        ll.logit_shift(lens, PROMPTS, tokens=list(range(readouts)), progress=False)
    ll.logit_shift(lens, PROMPTS, progress=False)
    ll.logit_shift(lens, PROMPTS, tokens=[1], mode="forward", progress=False)
    assert taken == ["slopes_of_each"] * 2 + ["part_tangents"] * 3


def test_a_late_site_and_a_batch_that_cannot_grow():
    """The last block's tangents cost one block; where rows start at once, each costs all."""
    cls = list(models.MAKERS)[-1]
    lens = cases.case("llama", cls, "raw").lens
    last = lens.with_adapter(lens.adapter.only("*layers.1.*"))
    assert tangent_passes(last) == 3.5
    assert [chosen_mode("auto", last, readouts) for readouts in (3, 4)] == ["reverse", "forward"]
    if models.has_bridge():
        bloom = lens_of("bloom", "TransformerBridge", "raw")
        assert tangent_passes(bloom) == len(bloom.sites)


@CLASSES
def test_memory_bounds_the_rows_and_changes_nothing(cls: str, monkeypatch):
    lens = cases.case("gpt2", cls, "raw").lens
    prompts = lens.prompts(PROMPTS)
    longest = prompts.row(1)
    row = dual_copy_bytes(lens, longest, 2)
    always = dual_pass_bytes(lens)
    bounded = [lens.within(always + m * row) for m in (2, 3.5, 9)]
    found = [tangents_at_once(one, longest, read=2) for one in bounded]
    assert found == [1, 2, 8]
    whole = ll.logit_shift(lens, prompts, mode="forward", progress=False)
    for memory in (always + 2 * row, always + 4 * row, 1e12):
        found = ll.logit_shift(lens, prompts, mode="forward", max_memory=memory, progress=False)
        assert relative(found.values, whole.values) < 1e-12
    some = ll.logit_shift(lens, prompts, tokens=[5, 9, 7], mode="reverse", progress=False)
    memory = always + 3 * dual_copy_bytes(lens, prompts, 2)
    few = ll.logit_shift(
        lens, prompts, tokens=[5, 9, 7], mode="reverse", max_memory=memory, progress=False
    )
    assert relative(few.values, some.values) < 1e-12
    for mode in ("forward", "reverse"):
        with pytest.raises(ValueError, match="allow"):
            ll.logit_shift(lens, prompts, tokens=[5], mode=mode, max_memory=row, progress=False)


@pytest.mark.bad_input
def test_an_unknown_mode_is_refused():
    lens = cases.case("llama", list(models.MAKERS)[-1], "raw").lens
    with pytest.raises(ValueError, match="expected 'auto', 'forward' or 'reverse'"):
        ll.logit_shift(lens, PROMPTS, mode="backward")  # type: ignore[arg-type]


class HostReads(TorchDispatchMode):
    """Counts the numbers that the host waits for: .item(), bool(tensor) and the like."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@CLASSES
def test_the_host_does_not_wait_site_by_site(cls: str):
    """Fourteen sites, or two: the same few reads, in every engine."""
    whole = cases.case("llama", cls, "raw").lens
    two = whole.with_adapter(whole.adapter.only("*q_proj"))
    one = torch.ones(1)
    engines = {
        "reverse": lambda lens: site_slopes(lens, margin(lens), lens.gates(0.3), ("rank",)),
        "tokens": lambda lens: ll.logit_shift(lens, PROMPTS, tokens=[3, 4], mode="reverse"),
        "tangents": lambda lens: ll.logit_shift(lens, PROMPTS, mode="forward"),
        "H·1": lambda lens: hessian_product(lens, margin(lens), lens.gates(0.0), lens.gates(1.0)),
    }
    for name, run in engines.items():
        counts = []
        for lens in (whole, two):
            run(lens)
            with HostReads() as reads:
                run(lens)
            counts.append(reads.count)
        assert counts[0] == counts[1], name
    with HostReads() as reads:
        one.item()
    assert reads.count == 1


def margin(lens: ll.LoraLens):
    return ll.Margin(5, 9).reading(lens.model, lens.prompts(PROMPTS))
