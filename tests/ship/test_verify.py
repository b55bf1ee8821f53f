"""`verify`: PEFT's own merges pass, and single checks, on tiny models. Mistakes: tests/commands."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import models
import no_ops
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lens_lora as ll
from lens_lora.errors import ModelStateError, PromptError, SiteError, UnsupportedAdapterError
from lens_lora.ship import merged_tensors, neutral_kl
from lens_lora.ship.checks import Check, MergedTensor
from lens_lora.ship.expectations import EXPECTATION, Expectation
from lens_lora.ship.merged_checks import MERGED
from lens_lora.ship.merged_folder import MergedFolder
from lens_lora.ship.merged_settings import CONFIG
from lens_lora.ship.merged_tokenizer import TOKENIZER
from lens_lora.ship.neutral_kl import EFFECT, KL
from lens_lora.ship.verify import LOADS, MODULES, Verification, verify

Q = "model.layers.0.self_attn.q_proj.weight"
HALF = [torch.float32, torch.bfloat16]


def verified(
    out, base=None, adapter=None, dtype=torch.float32, lens_tokenizer=None, **options
) -> Verification:
    """Of a shipment in a folder; the merged folder is looked at where it is asked for."""
    adapter = ll.load_adapter(out / "adapter") if adapter is None else adapter
    base = no_ops.base_of(out) if base is None else base

    tokenizer = models.tokenizer() if lens_tokenizer is None else lens_tokenizer

    def lens_over() -> ll.LoraLens:
        hooked = copy.deepcopy(base).to(dtype)
        return ll.load(hooked, adapter, tokenizer=tokenizer, check=False)

    return verify(adapter, base, lens_over, progress=False, **options)


def compared(out) -> list:
    """The tensors of the merged folder."""
    adapter = ll.load_adapter(out / "adapter")
    return list(merged_tensors.compared(MergedFolder(out / "merged"), adapter, no_ops.base_of(out)))


def check_of(verification: Verification, name: str):
    (check,) = (check for check in verification.checks if check.name == name)
    return check


SHIPMENTS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "trained head": {"modules_to_save": ["lm_head"]},
    "trained embedding": {"modules_to_save": ["embed_tokens"]},
    "trained norm": {"modules_to_save": ["input_layernorm"]},
    "trained rows": {"trainable_token_indices": [3, 5]},
    "embedding and head": {"targets": ["q_proj", "embed_tokens", "lm_head"]},
    "tied": {"tied": True},
    "tied, trained head": {"tied": True, "modules_to_save": ["lm_head"]},
    "tied, trained rows": {"tied": True, "trainable_token_indices": [3, 5]},
    "Conv1D, biases": {"family": "gpt2", "lora_bias": True},
    "fused, other names": {"family": "neox"},
    "experts": {
        "family": "mixtral",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", SHIPMENTS)
def test_what_peft_merges_passes(name: str, dtype: torch.dtype, tmp_path):
    """In float32 and bfloat16, whatever was trained; the oracle is merge_and_unload."""
    out = no_ops.ship(tmp_path, dtype=dtype, **SHIPMENTS[name])
    tensors = compared(out)
    assert [t for t in tensors if t.outcome != "passed"] == []
    changed = [t for t in tensors if t.ratio == t.ratio]
    assert len(changed) >= len(ll.load_adapter(out / "adapter"))
    assert all(abs(t.ratio - 1) < 0.1 for t in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "experts"])
def test_factors_in_half_precision_over_a_base_in_float32(name: str, dtype: torch.dtype, tmp_path):
    """As PEFT merges them: their product is computed in float32, and is not rounded."""
    out = no_ops.ship(tmp_path, merged=False, **SHIPMENTS[name])
    no_ops.store_adapter_in(out, dtype)
    no_ops.merge(out)
    assert {tensor.outcome for tensor in compared(out)} == {"passed"}


def test_one_entry_off_is_found(tmp_path):
    """By six roundings of itself, in a tensor that the adapter changes; by one bit elsewhere."""
    out = no_ops.ship(tmp_path)
    file = out / "merged" / "model.safetensors"
    for name, factor in (("layers.0.self_attn.q_proj", 1 + 2**-20), ("norm", 1 + 2**-23)):
        state = load_file(file)
        key = f"model.{name}.weight"
        spoiled = dict(state)
        spoiled[key] = state[key].clone()
        largest = int(state[key].abs().argmax())
        spoiled[key].view(-1)[largest] *= factor
        save_file(spoiled, file, metadata={"format": "pt"})
        assert [t.name for t in compared(out) if t.outcome == "failed"] == [key]
        save_file(state, file, metadata={"format": "pt"})


def test_the_base_in_bfloat16_is_not_a_merge(tmp_path):
    """Each entry of the base is within the roundings of base + ΔW; c tells the two apart."""
    out = no_ops.ship(tmp_path, dtype=torch.bfloat16, size=0.03)
    assert {tensor.outcome for tensor in compared(out)} == {"passed"}
    no_ops.base_of(out).to(torch.bfloat16).save_pretrained(out / "merged")
    looks = [tensor.looks for tensor in compared(out)]
    assert looks.count("the base (nothing was merged)") == 14
    state = load_file(out / "base/model.safetensors")
    W = state[Q]
    D = ll.load_adapter(out / "adapter").modules[Q[:-7]].materialise()
    assert float((D.abs() <= 4 * 2**-8 * (W.abs() + D.abs())).float().mean()) > 0.4, "control"


def test_a_bfloat16_checkpoint_loaded_in_any_dtype(tmp_path):
    """The base in float32 beside a merge in float16 or bfloat16, and the other way round."""
    out = no_ops.ship(tmp_path, dtype=torch.float32)
    adapter = ll.load_adapter(out / "adapter")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        folder = MergedFolder(no_ops.merge(out, dtype))
        for base_dtype in (torch.float32, torch.bfloat16):
            base = no_ops.base_of(out).to(base_dtype)
            assert {t.outcome for t in merged_tensors.compared(folder, adapter, base)} == {"passed"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merge_in_half_precision_stored_in_float32(dtype: torch.dtype, tmp_path):
    """It is judged by its numbers' own dtype; the base so stored, and a merge done twice, fail."""
    out = no_ops.ship(tmp_path, merged=False)
    for times, outcomes in ((0, {"passed", "failed"}), (1, {"passed"}), (2, {"passed", "failed"})):
        file = no_ops.merge(out, dtype, times=times) / "model.safetensors"
        state = {name: tensor.float() for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
        no_ops.set_merged(out, dtype="float32")
        tensors = compared(out)
        assert {tensor.outcome for tensor in tensors} == outcomes
        failed = [tensor.name for tensor in tensors if tensor.outcome == "failed"]
        assert len(failed) == (0 if times == 1 else 14)


def test_factors_that_are_both_zero_are_undecided(tmp_path):
    """Training begins with a random A: a zero B alone is a fault, and so are zeros everywhere."""
    out = no_ops.ship(tmp_path)
    adapter = ll.load_adapter(out / "adapter")
    base = no_ops.base_of(out)
    first, *others = adapter.modules
    outcomes: list[str] = []
    for parts, keys in ((("A", "B"), [first]), (("B",), [first]), (("A", "B"), [first, *others])):
        modules = dict(adapter.modules)
        for key in keys:
            zeros = {part: 0 * getattr(modules[key], part) for part in parts}
            modules[key] = dataclasses.replace(modules[key], **zeros)
        silenced = dataclasses.replace(adapter, modules=modules)
        checks = verified(out, base, silenced)
        outcomes.append(check_of(checks, MODULES).outcome)
    assert outcomes == ["undecided", "failed", "failed"]


def test_a_loss_to_rounding_is_told_though_the_first_tensor_is_unchanged():
    """A tensor that the adapter does not change has no c, and hides that of no other one."""
    tensors = (
        MergedTensor("embed.weight", "passed", "the base's"),
        MergedTensor("q_proj.weight", "passed", "base + ΔW in bfloat16", ratio=0.6, kept=0.6),
    )
    checks = (Check(MERGED, "passed", "base + ΔW in 1 tensor"),)
    story = Verification("lyon", checks, tensors, {}).story()
    assert "Rounding to its dtype takes up to 40% of a tensor's ΔW away" in story


def test_noise_is_no_effect(tmp_path):
    """In float32 KL of 1e-12 is an effect, and of 1e-14 rounding; in bfloat16 that of 3e-4, too."""
    out = no_ops.ship(tmp_path)
    adapter = ll.load_adapter(out / "adapter")
    outcomes = {
        scale: check_of(verified(out, adapter=adapter.scaled(scale)), EFFECT).outcome
        for scale in (1e-6, 1e-8, 0.0)
    }
    assert outcomes == {1e-6: "passed", 1e-8: "undecided", 0.0: "undecided"}
    half = verified(out, adapter=adapter.scaled(1e-2), dtype=torch.bfloat16)
    assert check_of(half, EFFECT).outcome == "undecided"
    assert half.exit_code == 3
    full = verified(out, adapter=adapter.scaled(1e-2))
    assert check_of(full, EFFECT).outcome == "passed"


def test_kl_is_that_of_the_models(tmp_path):
    """By hand, from PEFT's logits; within a bound, beyond it, and printed where there is none."""
    out = no_ops.ship(tmp_path)
    kl = check_of(verified(out), KL)
    assert kl.outcome == "not asked"
    assert kl.value == pytest.approx(kl_by_hand(out), rel=1e-4)
    for bound, outcome in ((kl.value * 1.01, "passed"), (kl.value * 0.99, "failed")):
        check = check_of(verified(out, max_kl=bound), KL)
        assert check.outcome == outcome
        assert check.value == kl.value
    tiny = ll.load_adapter(out / "adapter").scaled(1e-8)
    assert check_of(verified(out, adapter=tiny, max_kl=1e-13), KL).outcome == "undecided"


def kl_by_hand(out) -> float:
    """The mean over tokens after first ones, each once after the same tokens."""
    base = no_ops.base_of(out)
    adapted = PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval()
    lens = ll.load(str(out / "base"), out / "adapter")
    texts = neutral_kl.readable_texts(lens.model, lens.prepend_bos)
    seen: dict[tuple[int, ...], float] = {}
    for ids, length in zip(texts.tokens.tolist(), texts.lengths.tolist(), strict=True):
        with torch.no_grad():
            p, q = (
                model(torch.tensor([ids[:length]])).logits[0].double().log_softmax(-1)
                for model in (base, adapted)
            )
        for t in range(1, length):
            seen.setdefault(tuple(ids[: t + 1]), float((p[t].exp() * (p[t] - q[t])).sum()))
    return sum(seen.values()) / len(seen)


# --- How much is run


@pytest.fixture
def passes(monkeypatch):
    """(texts, whether they are the base beside itself) of each pair of forward passes."""
    run: list[tuple[int, bool]] = []

    def counted(reference, others, texts, *args, **options):
        (other,) = others
        run.append((texts.batch, other is reference))
        return text_divergences(reference, others, texts, *args, **options)

    text_divergences = neutral_kl.text_divergences
    monkeypatch.setattr(neutral_kl, "text_divergences", counted)
    return run


def test_a_clear_case_takes_few_texts(passes, tmp_path):
    """15 texts, and rounding on 4 of them; all 110 only where that does not decide, or is asked."""
    out = no_ops.ship(tmp_path)
    tokenizer = letters_alone(tmp_path / "letters", VOWELS)

    def run(scale: float, **options) -> list[tuple[int, bool]]:
        passes.clear()
        adapter = ll.load_adapter(out / "adapter").scaled(scale)
        verified(out, adapter=adapter, lens_tokenizer=tokenizer, **options)
        return list(passes)

    few = run(1.0)
    (texts, _), (for_rounding, _) = few
    assert few == [(texts, False), (for_rounding, True)]
    assert 10 < texts <= 15
    assert for_rounding == -(-texts // 4)
    *first, (every_text, _) = run(1.0, max_kl=0.5)
    assert first == few
    assert 80 < every_text <= 110
    everything = [(every_text, False), (every_text, True)]
    assert sorted(run(1e-8)) == sorted([*few, *everything])
    assert sorted(run(1.0, max_kl=1e-14)) == sorted([*few, *everything])


# --- A tokenizer that knows none of the neutral texts


def test_texts_of_its_own_tokens(passes, tmp_path):
    """Where every neutral text is unknown tokens, or none at all: 16 rows of its own tokens."""
    out = no_ops.ship(tmp_path)
    for tokenizer in (models.tokenizer(), letters_alone(tmp_path / "letters", GREEK)):
        passes.clear()
        verification = verified(out, lens_tokenizer=tokenizer, max_kl=1e9)
        effect = check_of(verification, EFFECT)
        assert effect.outcome == "passed"
        assert "16 texts of the tokenizer's own" in effect.measured
        assert check_of(verification, KL).outcome == "passed"
        assert passes[0] == (16, False)


def test_a_tokenizer_of_special_tokens_alone_is_undecided(tmp_path):
    """Nothing can be asked: exit 3, never 1."""
    out = no_ops.ship(tmp_path)
    raw = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>")
    tokenizer = read_again(tokenizer, tmp_path / "special")
    verification = verified(out, lens_tokenizer=tokenizer, max_kl=1.0)
    outcomes = {check.name: check.outcome for check in verification.checks}
    assert outcomes[EFFECT] == outcomes[KL] == "undecided"
    assert verification.exit_code == 3


def test_a_tokenizer_that_knows_some_texts(passes, tmp_path):
    """Those of which it knows nothing, or one token, are left out."""
    out = no_ops.ship(tmp_path)
    verified(out, lens_tokenizer=letters_alone(tmp_path / "letters", GREEK + "kv"))
    (asked, _), _ = passes
    assert 1 < asked < 15


def letters_alone(folder, letters: str):
    """One token a letter, no BOS, and nothing in the place of what it does not know."""
    vocab = {letter: 4 + i for i, letter in enumerate(letters)}
    return read_again(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, []))), folder)


def read_again(tokenizer: PreTrainedTokenizerFast, folder):
    """From a folder of its own, as TransformerLens reads it there again."""
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


GREEK = "αβγδεζηθικλμνξοπρστυφχψω"
VOWELS = "aei"


# --- Expectations

PROMPT = "w5 w6 w7"


def margins(out, prompt=PROMPT) -> tuple[float, float]:
    """w9 against w26, by PEFT."""
    ids = torch.tensor([models.tokenizer()(prompt).input_ids])
    base = no_ops.base_of(out)
    adapted = PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval()
    with torch.no_grad():
        logits = [model(ids).logits[0, -1] for model in (base, adapted)]
    return tuple(float(f[9] - f[26]) for f in logits)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return no_ops.ship(tmp_path_factory.mktemp("shipped"))


def expected(out, *rows: Expectation) -> list:
    return [c for c in verified(out, expectations=rows).checks if c.name.startswith("expectation,")]


def test_expectations(shipped):
    """Flips, keeps its sign, and a margin at least; the margins are PEFT's."""
    before, after = margins(shipped)
    doc, pre = ("w9", "w26") if after > 0 else ("w26", "w9")
    before, after = (before, after) if doc == "w9" else (-before, -after)
    flips = before < 0
    rows = [
        (None, None, "passed"),
        (flips, None, "passed"),
        (not flips, None, "failed"),
        (None, after - 0.01, "passed"),
        (None, after + 0.01, "failed"),
        (None, after, "undecided"),
        (flips, after + 1, "failed"),
    ]
    asked = [Expectation(f"line {i}", PROMPT, doc, pre, f, m) for i, (f, m, _) in enumerate(rows)]
    checks = expected(shipped, *asked)
    assert [check.outcome for check in checks] == [outcome for *_, outcome in rows]
    assert all(check.value == pytest.approx(after, abs=1e-4) for check in checks)
    swapped = expected(shipped, Expectation("line 1", PROMPT, pre, doc))
    assert [c.outcome for c in swapped] == ["failed"]
    assert repr(pre) in swapped[0].where


def test_answers_of_several_tokens(shipped):
    """Their margin is that of `ll.AnswerMargin`."""
    (check,) = expected(shipped, Expectation("line 1", PROMPT, "w9 w10", "w26 w4"))
    lens = ll.load(str(shipped / "base"), shipped / "adapter")
    margin = ll.fact_margin(lens, PROMPT, "w9 w10", "w26 w4", progress=False)
    assert check.value == pytest.approx(float(margin.m), abs=1e-5)


def test_an_answer_that_does_not_fit_is_named_by_its_line(shipped):
    good = Expectation("line 1", PROMPT, "w9", "w26")
    with pytest.raises(PromptError, match=r"^line 2: .*has no token"):
        expected(shipped, good, good._replace(where="line 2", doc=""))


# --- What cannot be read or decided


def test_damaged_folders(tmp_path):
    out = no_ops.ship(tmp_path)
    folder = no_ops.merge(out, max_shard_size="6KB")
    shards = sorted(folder.glob("*.safetensors"))
    spoiled = shutil.copytree(folder, tmp_path / "cut")
    (spoiled / shards[1].name).write_bytes(shards[1].read_bytes()[:-10])
    with pytest.raises(ModelStateError, match=r"cut: damaged"):
        MergedFolder(spoiled)
    spoiled = shutil.copytree(folder, tmp_path / "one shard less")
    (spoiled / shards[0].name).unlink()
    with pytest.raises(ModelStateError, match=f"{len(shards) - 1} of {len(shards)} .safetensors"):
        MergedFolder(spoiled)
    spoiled = shutil.copytree(folder, tmp_path / "no index")
    (spoiled / INDEX).unlink()
    with pytest.raises(ModelStateError, match=f"neither .*; {len(shards)} other .safetensors"):
        MergedFolder(spoiled)
    (spoiled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelStateError, match=r"pytorch_model.bin is a pickle"):
        MergedFolder(spoiled)
    (folder / INDEX).write_text("{")
    with pytest.raises(ModelStateError, match="merged: damaged"):
        MergedFolder(folder)
    with pytest.raises(ModelStateError, match=r"no config.json, and transformers loads no model"):
        MergedFolder(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content", ["[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "é{", '{"weight_map": {}}']
)
def test_an_index_of_another_form(content: str, shipped, tmp_path):
    """Where transformers reads it, the folder is refused; beside model.safetensors it is not."""
    folder = shutil.copytree(shipped / "merged", tmp_path / "merged")
    (folder / INDEX).write_text(content, encoding="latin-1")
    MergedFolder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelStateError, match=r"merged: (damaged|0 of 1 .safetensors)"):
        MergedFolder(folder)


@pytest.mark.parametrize("field", [{"model_type": "nothing"}, {"hidden_act": "no such function"}])
def test_a_config_of_no_model(field: dict[str, str], shipped, tmp_path):
    folder = shutil.copytree(shipped / "merged", tmp_path / "merged")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **field}))
    with pytest.raises(ModelStateError, match=next(iter(field.values()))):
        MergedFolder(folder)


def test_a_config_that_ties_what_the_base_does_not(tmp_path):
    """The merge is right, and loading it puts the embedding in the head's place."""
    out = no_ops.ship(tmp_path)
    config = out / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    failed = {tensor.name for tensor in compared(out) if tensor.outcome == "failed"}
    assert failed == {"lm_head.weight", "model.embed_tokens.weight"}


def test_quantised_weights_are_undecided(tmp_path):
    out = no_ops.ship(tmp_path)
    config = out / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {}}))
    check = check_of(verified(out, merged=out / "merged"), MERGED)
    assert check.outcome == "undecided"
    assert "quantised" in check.measured


def test_another_vocabulary(tmp_path):
    """A resized embedding is named with both shapes."""
    out = no_ops.ship(tmp_path)
    merged = no_ops.base_of(out)
    merged.resize_token_embeddings(models.VOCAB + 3)
    merged.save_pretrained(out / "merged")
    looks = {tensor.name: tensor.looks for tensor in compared(out)}
    assert looks["lm_head.weight"] == "(64, 16), the base's is (61, 16)"


def test_without_a_base(tmp_path):
    """Zero factors are seen all the same; all else is undecided."""
    out = no_ops.ship(tmp_path)
    merged = out / "merged"
    adapter = ll.load_adapter(out / "adapter")
    undecided = verified(out, base="gone", merged=merged, max_kl=1.0)
    outcomes = {check.name: check.outcome for check in undecided.checks}
    wanted = dict.fromkeys((LOADS, EFFECT, KL, MERGED, CONFIG, TOKENIZER), "undecided")
    assert outcomes == {**wanted, MODULES: "passed", EXPECTATION: "not asked"}
    assert undecided.exit_code == 3
    assert verified(out, base="gone", adapter=adapter.scaled(0)).exit_code == 3, "strength, not B"
    zero = {path: dataclasses.replace(f, B=0 * f.B) for path, f in adapter.modules.items()}
    assert verified(out, base="gone", adapter=ll.Adapter(zero)).exit_code == 1


def test_what_only_this_package_lacks_is_undecided(shipped):
    """Modules that the base has, or an adapter that is sound: nothing says that it is broken."""
    adapter = ll.load_adapter(shipped / "adapter")
    base = no_ops.base_of(shipped)

    def refusing(error: Exception):
        def lens_over() -> ll.LoraLens:
            raise error

        return lens_over

    for error in (SiteError("no such module"), UnsupportedAdapterError("not read here")):
        verification = verify(adapter, base, refusing(error), progress=False)
        assert verification.exit_code == 3
    elsewhere = ll.Adapter({f"decoder.{key}": f for key, f in adapter.modules.items()})
    lacking = verify(elsewhere, base, refusing(SiteError("no such module")), progress=False)
    assert check_of(lacking, LOADS).outcome == "failed"


def test_a_stored_weight_that_is_the_base_is_no_fault(tmp_path):
    """As bias="all" stores biases that were not trained; B = 0 beside them is one."""
    out = no_ops.ship(tmp_path, family="gpt2", bias="all")
    check = check_of(verified(out), MODULES)
    assert check.outcome == "passed"
    assert check.measured.startswith("8 of ")
