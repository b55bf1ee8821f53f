"""A sweep goes on only with what decided its numbers: each part changed alone is refused by name.

What decides no number (names, the batch size, where a function is defined) may change.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import models
import pytest
import sweep_runs
import torch
from sweep_runs import run
from tokenizers import Tokenizer

import lens_lora as ll
from lens_lora.sweeps.identity import NotHashable, digest
from lens_lora.sweeps.records import SweepError

PROMPTS = [{"prompt": "w5 w6 w7"}, {"prompt": "w9 w8"}]
RECORDS = [{**record, "doc": "w8", "pre": "w9"} for record in PROMPTS]


def big_adapter(seed: int = 0) -> ll.Adapter:
    """More entries a factor than any sample would look at."""
    A, B = (torch.randn(*shape, generator=models.seeded(seed)).double() for shape in SHAPES)
    return ll.Adapter.from_factors({"model.layers.1.mlp.down_proj": ll.LoRAFactors(A, B)})


SHAPES = ((30, 24), (16, 30))


def a_lens(adapter: ll.Adapter | None = None, flags: dict | None = None) -> ll.LoraLens:
    """A lens of its own, so that its model may be changed."""
    make = list(models.MAKERS.values())[-1 if flags else 0]
    base = models.hf_model("llama")
    model = make(base, **(flags or {}))
    return ll.LoraLens(model, adapter or big_adapter(), hf_model=base if flags else None)


def refused(lens, folder, *, readout=None, words="holds another sweep", **options) -> None:
    records = PROMPTS if readout is not None else RECORDS
    with pytest.raises(SweepError, match=words):
        run(lens, records, folder, readout=readout, **options)


# --- model, tokenizer and adapter


def scale_hook(factor):
    def hook(tensor, hook):
        return tensor * factor

    return hook


def _shuffled(model) -> None:
    """Another tokenizer: the same words, two of them with the other's id."""
    fields = json.loads(model.tokenizer.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    before = model.to_tokens("w5 w6").tolist()
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields))
    assert model.to_tokens("w5 w6").tolist() != before


def _add(tensor: torch.Tensor, index: int) -> None:
    with torch.no_grad():
        tensor.view(-1)[index] += 0.25


MODEL_CHANGES = {
    "configuration default_prepend_bos": lambda m: setattr(m.cfg, "default_prepend_bos", False),
    "configuration output_logits_soft_cap": lambda m: setattr(m.cfg, "output_logits_soft_cap", 3.0),
    "tokenizer": _shuffled,
    "tokenizer ": lambda m: setattr(m.tokenizer, "padding_side", "left"),
    "model_weights": lambda m: _add(next(p for p in m.parameters() if p.numel() > 900), 1),
    "model_weights ": lambda m: _add(
        next(b for n, b in m.named_buffers() if "rot" in n or "inv" in n), 1
    ),
    "hooks": lambda m: m.hook_dict["blocks.0.hook_resid_post"].add_hook(
        scale_hook(0.5), is_permanent=True
    ),
    "hooks ": lambda m: list(m.modules())[-1].register_forward_hook(lambda module, args, out: out),
}


@pytest.mark.parametrize("what", MODEL_CHANGES)
def test_another_model_is_refused(float64, tmp_path, what):
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    assert run(lens, RECORDS, tmp_path).resumed == 2
    MODEL_CHANGES[what](lens.model)
    refused(lens, tmp_path, words=f"holds another sweep: .*{what.strip()}.* there, .* here")


def test_another_hook_is_refused(float64, tmp_path):
    """The user's own function is looked at, not what a hook point wraps around it."""
    lens = a_lens()
    point = lens.model.hook_dict["blocks.0.hook_resid_post"]
    for factor in (0.5, 0.5, 0.25):
        point.add_hook(scale_hook(factor))
        if factor == 0.25:
            refused(lens, tmp_path, words="hooks")
        else:
            run(lens, RECORDS, tmp_path)
        point.remove_hooks("fwd")


@pytest.mark.skipif("TransformerBridge" not in models.MAKERS, reason="a bridge holds such weights")
def test_a_weight_that_is_no_parameter_counts(float64, tmp_path):
    """A processed gated MLP of a bridge computes with tensors that are no parameters."""
    lens = a_lens(flags=models.PROCESSED)
    held = [
        value
        for module in lens.model.modules()
        for name, value in vars(module).items()
        if name.startswith("_processed_W") and isinstance(value, torch.Tensor)
    ]
    if not held:
        pytest.skip("this transformer-lens keeps processed weights as parameters")
    run(lens, RECORDS, tmp_path)
    _add(held[0], 1)
    refused(lens, tmp_path, words="model_weights")


def test_another_base_given_beside_is_refused(float64, tmp_path):
    lens = a_lens(flags=models.PROCESSED)
    run(lens, RECORDS, tmp_path)
    _add(lens._hf_model.lm_head.weight, 1)
    refused(lens, tmp_path, words="base_weights")


@pytest.mark.parametrize("field", ["A", "B", "scale", "strength"])
def test_another_adapter_is_refused(float64, tmp_path, field):
    """One entry of one factor, wherever it stands."""
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    factors = next(iter(big_adapter().modules.values()))
    values = {name: getattr(factors, name) for name in ("A", "B", "scale", "strength")}
    if isinstance(values[field], float):
        values[field] += 2**-30
    else:
        _add(values[field], 1)
    other = ll.Adapter.from_factors({"model.layers.1.mlp.down_proj": ll.LoRAFactors(**values)})
    refused(lens.with_adapter(other), tmp_path, words="adapter_weights")


def test_another_precision_is_refused(float64, tmp_path):
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        refused(lens, tmp_path, words="float32_matmul_precision 'highest' there, 'medium' here")
    finally:
        torch.set_float32_matmul_precision(before)


def test_names_may_change(float64, tmp_path):
    """The same weights under other names, made anew, in other batches."""
    run(a_lens(), RECORDS, tmp_path, batch_size=1)
    lens = a_lens(big_adapter().named("other"))
    lens.model.cfg.model_name = "other/name"
    again = run(lens, RECORDS, tmp_path, batch_size=2)
    assert again.resumed == 2


# --- readouts

K = 8


def helper(logits):
    return logits[:, K]


def by_global(logits):
    return helper(logits)


def of_source(source: str, **names) -> types.FunctionType:
    """The function `f` of a source."""
    space = {"torch": torch, **names}
    exec(source, space)
    return space["f"]


def closure(k):
    def f(logits):
        return logits[:, k]

    return f


def default(k):
    def f(logits, k=k, *, scale=float(k)):
        return logits[:, 8] * scale + 0 * k

    return f


class Column:
    def __init__(self, k):
        self.k = k
        self.__name__ = "column"

    def __call__(self, logits):
        return logits[:, self.k]

    def method(self, logits):
        return logits[:, self.k]


class Row(Column):
    def __call__(self, logits):
        return logits[:, self.k] * 2


class Probe(torch.nn.Module):
    def __init__(self, k):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(models.VOCAB, dtype=torch.float64)[k])
        self.__name__ = "probe"

    def forward(self, logits):
        return logits @ self.weight


def column_of(logits, k):
    return logits[:, k]


def module_with(k):
    module = types.ModuleType("of_the_user")
    module.K = k
    return of_source("def f(logits):\n    return logits[:, of_the_user.K]", of_the_user=module)


def calling(body):
    inner = of_source(f"def f(logits):\n    return {body}")
    return of_source("def f(logits):\n    return inner(logits)", inner=inner)


FUNCTIONS = {
    "body": lambda k: of_source(f"def f(logits):\n    return logits[:, {k}]"),
    "operation": lambda k: of_source(
        f"def f(logits):\n    return logits.{'sin' if k == 8 else 'cos'}()[:, 8]"
    ),
    "lambda": lambda k: of_source(f"f = lambda logits: logits[:, {k}]"),
    "closure": closure,
    "default": default,
    "global": lambda k: of_source("def f(logits):\n    return logits[:, K]", K=k),
    "function of a function": lambda k: calling(f"logits[:, {k}]"),
    "nested": lambda k: of_source(
        f"def f(logits):\n    return (lambda x: sum(x[:, i] for i in ({k}, 9)))(logits)"
    ),
    "tensor": lambda k: of_source(
        "def f(logits):\n    return logits @ v", v=torch.eye(models.VOCAB).double()[k]
    ),
    "attribute of a module": module_with,
    "partial": lambda k: functools.partial(column_of, k=k),
    "callable object": Column,
    "class": lambda k: (Column if k == 8 else Row)(8),
    "bound method": lambda k: Column(k).method,
    "nn.Module": Probe,
    "cached": lambda k: functools.lru_cache(closure(k)),
    "wrapped": lambda k: functools.wraps(column_of)(closure(k)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_another_function_is_refused(float64, tmp_path, kind):
    """The same name and units, the same function made anew, and another one."""
    lens, make = sweep_runs.a_lens(), FUNCTIONS[kind]
    run(lens, PROMPTS, tmp_path, readout=ll.Readout.of(make(8), "f"))
    assert run(lens, PROMPTS, tmp_path, readout=ll.Readout.of(make(8), "f")).resumed == 2
    refused(lens, tmp_path, readout=ll.Readout.of(make(9), "f"), words="readout")


def test_a_global_of_the_function_counts(float64, tmp_path, monkeypatch):
    """Also that of a function which it calls."""
    lens, readout = sweep_runs.a_lens(), ll.Readout.of(by_global)
    run(lens, PROMPTS, tmp_path, readout=readout)
    monkeypatch.setitem(globals(), "K", 9)
    refused(lens, tmp_path, readout=readout, words="readout")


class Scaled(ll.Readout):
    """A readout of the user's own, whose label does not say all."""

    label = "scaled"

    def __init__(self, factor):
        self.factor = factor

    def over(self, model, prompts):
        return ll.Readout.of(lambda f: self.factor * f[:, 8]).over(model, prompts)


def test_a_readout_of_one_s_own_is_hashed(float64, tmp_path):
    lens = sweep_runs.a_lens()
    run(lens, PROMPTS, tmp_path, readout=Scaled(2.0))
    assert run(lens, PROMPTS, tmp_path, readout=Scaled(2.0)).resumed == 2
    refused(lens, tmp_path, readout=Scaled(3.0), words="readout")


def test_the_model_in_a_readout_is_the_lens_s(float64, tmp_path):
    """A function that uses the lens, its model or its tokenizer is hashed: they are already."""
    lens = sweep_runs.a_lens()
    readout = ll.Readout.of(lambda f: f[:, lens.model.tokenizer.convert_tokens_to_ids("w8")])
    run(lens, PROMPTS, tmp_path, readout=readout)
    assert run(lens, PROMPTS, tmp_path, readout=readout).resumed == 2


def test_what_cannot_be_hashed_takes_a_version(float64, tmp_path):
    lens, numbers = sweep_runs.a_lens(), (i for i in range(3))

    def f(logits):
        return logits[:, 8] if numbers else logits[:, 9]

    readout = ll.Readout.of(f)
    refused(lens, tmp_path, readout=readout, words=r"'f'.*numbers.*generator.*version=")
    run(lens, PROMPTS, tmp_path, readout=readout, version="1")
    assert run(lens, PROMPTS, tmp_path, readout=readout, version="1").resumed == 2
    refused(lens, tmp_path, readout=readout, version="2", words="version '1' there, '2' here")


# --- the hash itself


def test_values_are_told_apart_and_equal_ones_are_not():
    x = torch.arange(6.0)
    different = [
        None, True, 1, 1.0, -0.0, 0.0, "1", b"1", "\ud800", (1,), [1], {1}, {"a": 1}, {"a": 2}, x,
        x.double(), x.view(2, 3), x.numpy(), -x, len, max, torch.relu, torch.float32, Path("a"),
        slice(1), range(2), Column, Row, Column(1), Column(2), Column(1).method, column_of, 1j,
        functools.partial(column_of, k=1), functools.partial(column_of, k=2),
    ]  # fmt: skip
    found = [digest(value) for value in different]
    assert len(set(found)) == len(different)
    assert found == [digest(copy.deepcopy(value)) for value in different]
    twice = ["ab" * 3, "ab" * 3]
    assert digest(twice) == digest([twice[0], "".join(["ab"] * 3)])


def test_circles_end():
    def f(n):
        return f(n - 1)

    circle: list = []
    circle.append(circle)
    assert digest(f) and digest(circle) != digest([[]])


@pytest.mark.parametrize(
    "value", [(i for i in ()), sys.stdout, sys._getframe()], ids=["generator", "stream", "frame"]
)
def test_what_has_no_hash_says_so(value):
    with pytest.raises(NotHashable, match="numbers"):
        digest({"numbers": [value]})


HASHED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from lens_lora.sweeps.identity import digest
k = {"a", "b", "c", "d"}
def f(logits):
    return torch.stack([logits[:, len(i)] for i in k if i in {"x", "y", "z"}])
print(digest(f), digest({"a", "b", "c"}))
"""


def test_every_process_finds_the_same_hash():
    """Whatever its hash seed, and wherever its objects lie."""
    done = {
        subprocess.run(
            [sys.executable, "-c", HASHED, str(Path(ll.__file__).parents[1])],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(done) == 1 and done.pop().strip()
