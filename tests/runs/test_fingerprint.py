"""A sweep goes on only with what decided its numbers: each part changed alone is refused by name.

Data are compared. Code of the caller's own cannot be: it needs a version. What decides no number
(names, the batch size) may change.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from types import FunctionType

import by_folder
import limits
import models
import numpy as np
import pytest
import sweep_runs
import torch
from sweep_runs import run
from tokenizers import Tokenizer

import lens_lora as ll
from lens_lora.errors import SweepError
from lens_lora.runs import fingerprint as fingerprints
from lens_lora.runs.fingerprint import (
    KeptSettings,
    _weights,
    differences,
    digest,
    fingerprint_without_model,
    settings,
)

PROMPTS = [{"prompt": "w5 w6 w7"}, {"prompt": "w9 w8"}]
RECORDS = [{**record, "doc": "w8", "pre": "w9"} for record in PROMPTS]


def big_adapter(seed: int = 0) -> ll.Adapter:
    """More entries a factor than any sample would look at."""
    A, B = (torch.randn(*shape, generator=models.seeded(seed)).double() for shape in SHAPES)
    return ll.Adapter.from_factors({"model.layers.1.mlp.down_proj": ll.LoRAFactors(A, B)})


SHAPES = ((30, 24), (16, 30))


def a_lens(
    adapter: ll.Adapter | None = None, flags: dict | None = None, kind: str | None = None
) -> ll.LoraLens:
    """A lens of its own, so that its model may be changed."""
    make = models.MAKERS[kind] if kind else list(models.MAKERS.values())[-1 if flags else 0]
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
    "own_code": lambda m: list(m.modules())[-1].register_forward_hook(
        lambda module, args, out: out
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("what", MODEL_CHANGES)
def test_another_model_is_refused(float64, tmp_path, what):
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    assert run(lens, RECORDS, tmp_path).resumed == 2
    MODEL_CHANGES[what](lens.model)
    refused(lens, tmp_path, words=f"holds another sweep: .*{what.strip()}.* there, .* here")


def module_with(model, attribute: str) -> torch.nn.Module:
    return next(module for module in model.modules() if attribute in vars(module))


ATTRIBUTES = {
    "TransformerBridge": ("variance_epsilon", "scaling"),
    "HookedTransformer": ("eps", "attn_scale"),
}


@pytest.mark.parametrize("which", range(2))
@pytest.mark.parametrize("kind", models.MAKERS)
def test_another_attribute_of_a_module_is_refused(float64, tmp_path, kind, which):
    """It decides numbers as a weight does: they change with it."""
    lens = a_lens(kind=kind)
    attribute = ATTRIBUTES[kind][which]
    before = run(lens, RECORDS, tmp_path).to_frame()["first_order"]
    assert run(lens, RECORDS, tmp_path).resumed == 2
    module = module_with(lens.model, attribute)
    setattr(module, attribute, 2 * float(getattr(module, attribute)))
    refused(
        lens, tmp_path, words=rf"holds another sweep: modules \w+\.{attribute} .* there, .* here"
    )
    after = run(lens, RECORDS, tmp_path / "anew").to_frame()["first_order"]
    assert (before - after).abs().max() > 1e-9


def test_a_function_of_a_library_in_a_module_counts_by_its_name(float64, tmp_path):
    lens = a_lens()
    block = lens.model.blocks[0]
    run(lens, RECORDS, tmp_path)
    vars(block)["forward"] = functools.partial(type(block).forward, block)
    refused(lens, tmp_path, words=r"modules \w+\.forward None there, .*forward.* here")


def _patched_instance(model, monkeypatch) -> None:
    block = model.blocks[0]
    plain = block.forward
    forward = lambda *args, **options: plain(*args, **options)  # noqa: E731
    monkeypatch.setitem(vars(block), "forward", forward)  # a bridge's block hands setattr on


def _patched_class(model, monkeypatch) -> None:
    kind = type(model.blocks[0])
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(_through(kind.forward)))


def _through(plain):
    def forward(self, *args, **options):
        return plain(self, *args, **options)

    return forward


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (_patched_instance, r"own_code \[\] there, \[\"forward of 'blocks.0'\"\] here"),
        (_patched_class, r"own_code \[\] there, \['forward of the class \w+'\] here"),
    ],
    ids=["instance", "class"],
)
def test_another_forward_is_refused(float64, tmp_path, monkeypatch, patch, words):
    """It names what changed; with a version on both sides it is resumed."""
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    with monkeypatch.context() as context:
        patch(lens.model, context)
        refused(lens, tmp_path, words=words)
        run(lens, RECORDS, tmp_path / "versioned", version="1")
        assert run(lens, RECORDS, tmp_path / "versioned", version="1").resumed == 2
    assert run(lens, RECORDS, tmp_path).resumed == 2


@pytest.mark.parametrize(
    ("home", "is_own"),
    [("kernels._internals.layer.layer", False), ("kernels_of_mine.layer", True)],
)
def test_a_library_s_wrapper_of_a_forward_is_not_the_caller_s(home: str, is_own: bool, monkeypatch):
    """Transformers 5.25 wraps the forward of attention by functions of the package kernels."""
    model = a_lens().model
    kind = type(model.blocks[0])
    wrapper = _through(kind.forward)
    of_library = FunctionType(wrapper.__code__, {"__name__": home}, closure=wrapper.__closure__)
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(of_library))
    named = [name for name in fingerprints._own_code(model) if kind.__name__ in name]
    assert bool(named) == is_own


def test_the_same_hook_place_takes_a_version(float64, tmp_path):
    """A hook point's wrapper is looked through: it wraps a function of the caller's."""
    lens = a_lens()
    lens.model.hook_dict["blocks.0.hook_resid_post"].add_hook(scale_hook(0.5))
    try:
        run(lens, RECORDS, tmp_path)
        refused(
            lens, tmp_path, words=r"code of your own, a hook on 'blocks.0.hook_(resid_post|out)'"
        )
        run(lens, RECORDS, tmp_path / "versioned", version="half")
        assert run(lens, RECORDS, tmp_path / "versioned", version="half").resumed == 2
    finally:
        lens.model.reset_hooks()


def test_a_tensor_beside_the_parameters_counts():
    """As a component of a bridge may hold its processed weights."""
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0]._processed_W_in = torch.zeros(2)
    before = _weights(module)
    module[0]._processed_W_in[1] = 1.0
    assert _weights(module) != before


@models.NEEDS_BRIDGE
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


@pytest.mark.sample(2)
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
        _add(values[field], 300)
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


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before 2.9")
def test_a_precision_of_one_backend_is_compared(float64, tmp_path):
    """torch has no single word for it then, and refuses to be asked for one."""
    lens = a_lens()
    run(lens, RECORDS, tmp_path)
    product = torch.backends.cuda.matmul
    before = product.fp32_precision
    product.fp32_precision = "tf32"
    try:
        refused(lens, tmp_path, words="float32_matmul_precision 'highest' there, 'tf32, ieee' here")
    finally:
        product.fp32_precision = before


def test_names_may_change(float64, tmp_path):
    """The same weights under other names, made anew, in other batches."""
    run(a_lens(), RECORDS, tmp_path, batch_size=1)
    lens = a_lens(big_adapter().named("other"))
    lens.model.cfg.model_name = "other/name"
    again = run(lens, RECORDS, tmp_path, batch_size=2)
    assert again.resumed == 2


# --- readouts


def column(k):
    return ll.Readout.of(lambda logits: logits[:, k], "column")


class Scaled(ll.Readout):
    """A readout of the caller's own, whose label does not say all."""

    label = "scaled"

    def __init__(self, factor):
        self.factor = factor

    def reading(self, model, prompts):
        return ll.Readout.of(lambda f: self.factor * f[:, 8]).reading(model, prompts)


OWN = {"function": lambda: column(8), "class": lambda: Scaled(2.0)}


@pytest.mark.parametrize("make", OWN.values(), ids=OWN)
def test_a_readout_of_ones_own_takes_a_version(float64, tmp_path, make):
    """Without one a sweep begins, and is not gone on with; another version is refused."""
    lens = sweep_runs.a_lens()
    label = make().label
    run(lens, PROMPTS, tmp_path, readout=make())
    words = f"computed with code of your own, the readout '{label}', and without a version.*Start"
    refused(lens, tmp_path, readout=make(), words=words)
    refused(lens, tmp_path, readout=make(), version="1", words="version None there, '1' here")
    run(lens, PROMPTS, tmp_path, readout=make(), version="1", resume=False)
    assert run(lens, PROMPTS, tmp_path, readout=make(), version="1").resumed == 2
    refused(lens, tmp_path, readout=make(), version="2", words="version '1' there, '2' here")
    refused(lens, tmp_path, readout=make(), words="version '1' there, None here")


@pytest.mark.parametrize("method", [None, "forward"])
def test_an_object_with_weights_takes_a_version(method):
    """Of a library too; a function or a class of one is its name."""
    module = torch.nn.Linear(4, 1)
    read = module if method is None else getattr(module, method)
    for stateful in (read, functools.partial(read)):
        assert fingerprint_without_model(big_adapter(), {}, ll.Readout.of(stateful))["own_code"]
    for plain in (
        torch.logsumexp,
        torch.nn.functional.softmax,
        functools.partial(torch.sum, dim=1),
    ):
        assert not fingerprint_without_model(big_adapter(), {}, ll.Readout.of(plain))["own_code"]


@pytest.mark.parametrize("name", ["first_order", "activations"])
def test_an_interrupted_sweep_with_own_code_takes_a_version(float64, tmp_path, monkeypatch, name):
    """Parts without a result are rows too; a folder without any part is none."""
    lens = a_lens()
    records = RECORDS
    point = lens.model.hook_dict["blocks.0.hook_resid_post"]
    folder = tmp_path / "r.parts"
    folder.mkdir()
    point.add_hook(scale_hook(0.5))
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            limits.sweeps_are_merged_by(patch, _stop)
            ll.sweep(lens, records, name, out=tmp_path / "r.parquet", progress=False)
        assert list(folder.glob("*.parquet"))
        assert not (tmp_path / "r.parquet").exists()
        with pytest.raises(SweepError, match="without a version"):
            ll.sweep(lens, records, name, out=tmp_path / "r.parquet", progress=False)
    finally:
        lens.model.reset_hooks()


def _stop(*args) -> None:
    raise KeyboardInterrupt


def makes(said):
    return ll.AnswerLogProb(said, mean=True)


def test_what_makes_a_readout_is_data_or_code(float64, tmp_path):
    """A class of the package with plain arguments is data; a function of one's own is code."""
    lens = sweep_runs.a_lens()
    said = [{"prompt": "w5", "response": "w7 w8"}]

    def over(make, **options):
        return run(lens, said, tmp_path, "add_one", readout=make, **options)

    over(functools.partial(ll.KL, direction="adapted_to_base"))
    assert over(functools.partial(ll.KL, direction="adapted_to_base")).resumed == 1
    with pytest.raises(SweepError, match="readout .* there"):
        over(ll.KL)
    over(makes, resume=False)
    with pytest.raises(SweepError, match="code of your own, makes, and without a version"):
        over(makes)


def test_readouts_of_the_package_are_compared_by_their_data(float64, tmp_path):
    """Tokens as ids of a tensor too."""
    lens = sweep_runs.a_lens()
    run(lens, PROMPTS, tmp_path, readout=ll.Logit(torch.tensor(8)))
    assert run(lens, PROMPTS, tmp_path, readout=ll.Logit(torch.tensor(8))).resumed == 2
    refused(lens, tmp_path, readout=ll.Logit(torch.tensor(9)), words="readout")


DECLARED = """
@readout(units="nats", label="H(next token)")
def Entropy(logits):
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)

@readout(units="logits", label="a sum of logits")
def Weighted(logits, weights=None):
    return (logits * weights).sum(-1)
"""


def declared_in(module: str) -> dict:
    """The names that a module of this name has, which declares two readouts."""
    names = {"__name__": module, "readout": ll.readout}
    exec(DECLARED, names)
    return names


def test_a_readout_that_the_package_declares_is_data(float64, tmp_path):
    """Its class is made by `@readout`, and is no dataclass: it needs no version to be resumed."""
    lens = sweep_runs.a_lens()
    declared = declared_in("lens_lora.responses.entropies")
    run(lens, PROMPTS, tmp_path, readout=declared["Entropy"]())
    assert run(lens, PROMPTS, tmp_path, readout=declared["Entropy"]()).resumed == 2
    own = declared_in("entropies_of_ones_own")
    refused(lens, tmp_path, readout=own["Weighted"](torch.ones(61)), words="readout")
    run(lens, PROMPTS, tmp_path, readout=own["Entropy"](), resume=False)
    words = r"code of your own, the readout 'H\(next token\)', and without a version"
    refused(lens, tmp_path, readout=own["Entropy"](), words=words)


def test_a_declared_readout_is_known_by_its_arguments():
    """A label need not name them; and what it is given may be code, or have a state."""
    weighted = declared_in("lens_lora.responses.sums")["Weighted"]
    arguments = [None, 1.0, torch.ones(61), torch.arange(61.0), torch.sum]
    known = [
        fingerprint_without_model(big_adapter(), {}, weighted(given), None) for given in arguments
    ]
    assert len({fields["readout"] for fields in known}) == len(arguments)
    assert [fields["own_code"] for fields in known] == [[]] * len(arguments)
    again = fingerprint_without_model(big_adapter(), {}, weighted(torch.ones(61)), None)
    assert again == known[2]
    for own in (column, torch.nn.Linear(61, 1)):
        assert fingerprint_without_model(big_adapter(), {}, weighted(own))["own_code"]

    class Mine(weighted):
        """A subclass of the caller's own, which may read something else."""

    assert fingerprint_without_model(big_adapter(), {}, Mine())["own_code"]


EVERY_KIND = {
    "Logit": lambda: ll.Logit(8),
    "LogProb": lambda: ll.LogProb(8),
    "Margin": lambda: ll.Margin(8, 9),
    "AnswerLogProb": lambda: ll.AnswerLogProb([8, 9]),
    "AnswerMargin": lambda: ll.AnswerMargin([8], [9]),
    "KL": ll.KL,
    "Projection": lambda: ll.Projection(torch.ones(16), "blocks.0.hook_resid_post"),
    "Readout.of": lambda: ll.Readout.of(torch.logsumexp),
    **by_folder.named("READOUTS"),
}


def test_every_public_readout_is_among_them():
    public = [getattr(ll, name) for name in ll.__all__]
    readouts = {
        cls.__name__ for cls in public if isinstance(cls, type) and issubclass(cls, ll.Readout)
    }
    by_folder.require_in_list("READOUTS", readouts - {"Readout"}, EVERY_KIND)


@pytest.mark.parametrize("make", EVERY_KIND.values(), ids=EVERY_KIND)
def test_every_kind_of_readout_of_the_package_is_data(make):
    one, other = (fingerprint_without_model(big_adapter(), {}, make()) for _ in range(2))
    assert one["own_code"] == []
    assert one == other


# --- the hash itself


def test_values_are_told_apart_and_equal_ones_are_not():
    x = torch.arange(6.0)
    different = [
        None, True, 1, 1.0, -0.0, 0.0, "1", b"1", "\ud800", [1], {"a": 1}, {"a": 2}, x,
        x.double(), x.view(2, 3), x.numpy(), -x, len, torch.relu, torch.float32, Path("a"),
        ll.Logit(1), ll.Logit("1"), ll.LogProb(1), ll.Margin(1, 2), np.float64(3.0), {1, 2},
        functools.partial(ll.KL), functools.partial(ll.KL, direction="adapted_to_base"),
    ]  # fmt: skip
    digests = [digest(value) for value in different]
    assert len(set(digests)) == len(different)
    assert digests == [digest(copy.deepcopy(value)) for value in different]


# --- Settings that are compared again and again


def _set_attribute(module: torch.nn.Module) -> None:
    module.scaling_of_test = 0.5


def _replace_list_by_number(module: torch.nn.Module) -> None:
    module.listed = 3.0


def _change_within(module: torch.nn.Module) -> None:
    module.of_test.keywords["other"] = 3.0


def _replace_child(module: torch.nn.Module) -> None:
    module.child = torch.nn.Dropout(0.25)


def _change_grandchild(module: torch.nn.Module) -> None:
    module.child[0].p = 0.25


def _change_class(module: torch.nn.Module) -> None:
    module.child[0].__class__ = torch.nn.Dropout2d


def _put_hook_on(module: torch.nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


CHANGES = {
    "an attribute more": _set_attribute,
    "a number where a list was": _replace_list_by_number,
    "within an object": _change_within,
    "another child": _replace_child,
    "a child of a child": _change_grandchild,
    "another class": _change_class,
    "a hook": _put_hook_on,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_kept_settings_differ_wherever_their_words_do(change):
    model = a_lens().model
    module = next(module for module in model.modules() if len(list(module.children())) > 1)
    module.child = torch.nn.Sequential(torch.nn.Dropout(0.5))
    module.listed = [3.0]
    if change is _change_within:
        module.of_test = functools.partial(torch.mul, other=2.0)
    kept = KeptSettings(model)
    before = settings(model)
    assert kept.differences() == []
    change(module)
    expected = differences(before, settings(model))
    assert expected
    assert sorted(kept.differences()) == sorted(expected)


def test_kept_settings_have_the_configuration():
    model = a_lens().model
    kept = KeptSettings(model)
    model.cfg.of_test = 1.0
    assert kept.differences() == ["configuration of_test None there, 1.0 here"]
    del model.cfg.of_test
    assert kept.differences() == []


def test_settings_of_the_same_objects_are_not_put_into_words_again(monkeypatch):
    model = a_lens().model
    kept = KeptSettings(model)
    put_into_words: list[object] = []
    monkeypatch.setattr(fingerprints, "_settings_of_modules", put_into_words.append)
    assert kept.differences() == []
    assert not put_into_words
