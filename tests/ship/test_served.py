"""`verify_served` against servers on loopback, right ones and such with a fault planted."""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import models
import no_ops
import pytest
import torch
from loopback import Engine, served, serving, vllm
from peft import PeftModel
from servers import chat, dripping, echo, llama_cpp, plain_completions, tgi
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lens_lora as ll
from lens_lora.errors import ArgumentError, ServerError
from lens_lora.ship import served as served_module
from lens_lora.ship import served_comparison, served_measure
from lens_lora.ship.served_comparison import Comparison, ServedInstead
from lens_lora.ship.served_rows import ServedRow
from lens_lora.ship.server import Refused, Server

QUIET = {"progress": False}
TEXTS = [f"w{i} w{i + 7} w{2 * i} w{i + 20} w{60 - i}" for i in range(4, 14)]
RIGHT = ("llama", "gpt2", "qwen2", "mixtral")
BOS = 0


@pytest.fixture(scope="module")
def shipment(tmp_path_factory):
    """Makes a base and an adapter, once for each way to make them."""
    made: dict[tuple, Path] = {}

    def ship(**ships) -> Path:
        key = tuple(sorted((name, str(value)) for name, value in ships.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("served")
            made[key] = no_ops.ship(folder, merged=False, **ships)
        return made[key]

    return ship


@functools.cache
def lens_of(out: Path) -> ll.LoraLens:
    base = no_ops.base_of(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ll.load(base, out / "adapter", tokenizer=models.tokenizer(), check=False)


def adapted(out: Path, dtype: torch.dtype = torch.float32, base=None):
    """PEFT's active adapter, which is what a right server runs."""
    base = no_ops.base_of(out) if base is None else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base.to(dtype), out / "adapter").to(dtype).eval()


def verified(lens: ll.LoraLens, engine: Engine, kind=vllm, **options):
    with served(engine, kind) as (url, log):
        result = ll.verify_served(lens, url, **{"dtype": "float32", **QUIET, **options})
    assert len(log) == result.requests_sent
    return result


def of(result, name: str):
    (check,) = (check for check in result.checks if check.name == name)
    return check


# --- Right servers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_right_server_passes(family: str, shipment):
    """In float32, asked for the log p of each prompt's tokens; c and residual are PEFT's own."""
    out = shipment(family=family)
    lens = lens_of(out)
    engine = Engine(adapted(out), models.tokenizer())
    result = verified(lens, engine)
    assert result.outcome == "passed", result.checks
    assert result.c == pytest.approx(1, abs=1e-4)
    assert result.residual < 1e-5
    assert result.requests_sent == 17
    assert result.tokens > 100


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", RIGHT)
def test_right_servers_pass_in_every_dtype(family: str, dtype: str, shipment):
    """No false alarm, and the residual is the floor up to a factor of three."""
    out = shipment(family=family)
    engine = Engine(adapted(out, getattr(torch, dtype)), models.tokenizer())
    result = verified(lens_of(out), engine, dtype=dtype)
    assert result.outcome == "passed", result.checks
    assert result.residual < 3 * result.floor


@pytest.mark.slow
@models.NEEDS_BRIDGE
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma2"])
def test_a_right_server_in_4_bit_passes(family: str, shipment):
    """The lens over the base in 4 bit, as the server has it."""
    pytest.importorskip("bitsandbytes")
    out = shipment(family=family)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(out / "base", quantization_config=quantised)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = ll.load(str(out / "base"), out / "adapter", load_in_4bit=True)
        # In eval mode bitsandbytes has kernels for wide matrices alone; there is no dropout.
        model = PeftModel.from_pretrained(base, out / "adapter").train()
    result = verified(lens, Engine(model, models.tokenizer()), dtype="bfloat16")
    assert result.outcome == "passed", result.checks


KINDS = {"vllm": vllm, "echo": echo, "tgi": tgi, "llama.cpp": llama_cpp, "plain": plain_completions}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_each_way_to_ask(kind: str, shipment):
    """Prompt tokens or generated ones: the same verdict, and the base in its place is found."""
    out = shipment(family="llama")
    lens = lens_of(out)
    options = {"name": "tuned", "texts": TEXTS[:4], "new_tokens": 6}
    right = verified(lens, Engine(adapted(out), models.tokenizer()), KINDS[kind], **options)
    assert right.outcome == "passed", right.checks
    base = verified(lens, Engine(no_ops.base_of(out), models.tokenizer()), KINDS[kind], **options)
    assert base.outcome == "failed"
    assert base.explanations[0].words == "the base, without the adapter"
    assert abs(base.c) < 1e-3
    assert base.residual == pytest.approx(1, abs=1e-3)


# --- Planted faults


class Fault(NamedTuple):
    """A server that runs something else.

    Attributes:
        says: a part of the explanation that is to be the nearest.
        engine: makes what runs.
        ships: how base and adapter are made.
    """

    says: str
    engine: Callable[[Path], Engine]
    ships: dict = {}


def losing(*parts: str) -> Callable[[Path], Engine]:
    """Without the B of modules whose name has one of these parts."""

    def engine(out: Path) -> Engine:
        model = adapted(out)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_b = "lora_B" in name or "lora_embedding_B" in name
                if is_b and any(part in name for part in parts):
                    parameter.zero_()
        return Engine(model, models.tokenizer())

    return engine


def scaled(factor: float) -> Callable[[Path], Engine]:
    def engine(out: Path) -> Engine:
        model = adapted(out)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(factor)
        return Engine(model, models.tokenizer())

    return engine


def base_alone(out: Path) -> Engine:
    return Engine(no_ops.base_of(out), models.tokenizer())


def bos_in_front(out: Path) -> Engine:
    return Engine(adapted(out), models.tokenizer(), in_front=(BOS,))


def with_config(**fields) -> Callable[[Path], Engine]:
    """As a server that reads fields of adapter_config.json otherwise."""

    def engine(out: Path) -> Engine:
        config = out / "adapter" / "adapter_config.json"
        kept = config.read_text()
        no_ops.set_config(out / "adapter", **fields)
        try:
            return Engine(adapted(out), models.tokenizer())
        finally:
            config.write_text(kept)

    return engine


def without_magnitude(out: Path) -> Engine:
    model = adapted(out)
    for module in model.modules():
        if getattr(module, "use_dora", None):
            module.use_dora = dict.fromkeys(module.use_dora, False)
            module.lora_variant.clear()
    return Engine(model, models.tokenizer())


def over_rounded_base(bits: int) -> Callable[[Path], Engine]:
    """Linear weights in blocks of 32 that share a scale."""

    def engine(out: Path) -> Engine:
        base = no_ops.base_of(out)
        most = 2 ** (bits - 1) - 1
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "proj" in name:
                    blocks = parameter.reshape(-1, 32)
                    scale = blocks.abs().amax(1, keepdim=True) / most
                    parameter.copy_(((blocks / scale).round() * scale).reshape(parameter.shape))
        return Engine(adapted(out, base=base), models.tokenizer())

    return engine


def merged_and_rounded(out: Path) -> Engine:
    """PEFT's merge in blocks of 32 that share a scale, 4 bit."""
    merged = adapted(out).merge_and_unload()
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if "proj" in name:
                blocks = parameter.reshape(-1, 32)
                scale = blocks.abs().amax(1, keepdim=True) / 7
                parameter.copy_(((blocks / scale).round() * scale).reshape(parameter.shape))
    return Engine(merged, models.tokenizer())


def rows_not_permuted(out: Path) -> Engine:
    """B of q and k as it is, over a base whose rows lie as in llama.cpp."""
    model = adapted(out)
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for kind, count in heads.items():
                if kind in name and "lora_B" in name:
                    width = len(parameter) // count
                    turned = parameter.reshape(count, width // 2, 2, -1).transpose(1, 2)
                    parameter.copy_(turned.reshape(parameter.shape))
    return Engine(model, models.tokenizer())


RS = {"use_rslora": True}
HEAD = {"targets": ["q_proj", "down_proj", "embed_tokens", "lm_head"]}
EXPERTS = {
    "family": "mixtral",
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
FAULTS = {
    "base": Fault("the base, without the adapter", base_alone),
    "base, gpt2": Fault("the base, without the adapter", base_alone, {"family": "gpt2"}),
    "attention only": Fault("without its MLP modules", losing("mlp")),
    "MLP only": Fault("without its attention modules", losing("self_attn")),
    "MLP lost, qwen2": Fault("without its MLP modules", losing("mlp"), {"family": "qwen2"}),
    "q lost": Fault("without its q modules", losing("q_proj")),
    "down lost": Fault("without its down modules", losing("down_proj")),
    "first layer lost": Fault("without its layer 0", losing("layers.0.")),
    "last layer lost": Fault("without its layer 1", losing("layers.1.")),
    "last layer lost, gpt2": Fault("without its layer 1", losing("h.1."), {"family": "gpt2"}),
    "half strength": Fault("at half its strength", scaled(0.5)),
    "twice": Fault("at twice its strength", scaled(2.0)),
    "0.8 of its strength": Fault("of its strength", scaled(0.8)),
    "α lost": Fault("α lost, s = 1", with_config(lora_alpha=3)),
    "rsLoRA as LoRA": Fault("rsLoRA read as LoRA", with_config(use_rslora=False), RS),
    "LoRA as rsLoRA": Fault("LoRA read as rsLoRA", with_config(use_rslora=True)),
    "DoRA as LoRA": Fault("DoRA's magnitudes lost", without_magnitude, {"use_dora": True}),
    "head and embeddings lost": Fault(
        "without its embeddings and head", losing("embed_tokens", "lm_head"), HEAD
    ),
    "head lost": Fault("without its unembed modules", losing("lm_head"), HEAD),
    "embeddings lost": Fault("without its embed modules", losing("embed_tokens"), HEAD),
    "experts lost": Fault("without its MLP modules", losing("experts"), EXPERTS),
    "a BOS in front": Fault("after a BOS", bos_in_front),
    "q and k not permuted": Fault("rows of q and k", rows_not_permuted),
    "4 bit base": Fault("base in 4 bit", over_rounded_base(4)),
    "merged, then 4 bit": Fault("merged, and then rounded to 4 bit", merged_and_rounded),
    "8 bit base": Fault("base in 8 bit", over_rounded_base(8)),
}
QUICK = (
    *("base", "q lost", "last layer lost", "α lost", "a BOS in front", "4 bit base"),
    "merged, then 4 bit",
)


def found(name: str, shipment, **options):
    fault = FAULTS[name]
    out = shipment(**fault.ships)
    return verified(lens_of(out), fault.engine(out), **options)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_found_and_named(name: str, shipment):
    result = found(name, shipment)
    assert result.outcome == "failed", result.checks
    assert FAULTS[name].says in result.explanations[0].words, result.to_frame()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAULTS if name not in QUICK])
def test_every_fault_is_found_and_named(name: str, shipment):
    result = found(name, shipment)
    assert result.outcome == "failed", result.checks
    assert FAULTS[name].says in result.explanations[0].words, result.to_frame()


def test_another_dtype_than_was_said(shipment):
    """bfloat16 where float32 was said: its rounding is as large, so nothing is decided."""
    out = shipment(family="llama")
    engine = Engine(adapted(out, torch.bfloat16), models.tokenizer())
    result = verified(lens_of(out), engine, dtype="float32")
    check = of(result, "served as trained")
    assert result.outcome == "undecided"
    assert check.where.startswith("rounding in bfloat16 would explain this")
    assert verified(lens_of(out), engine, dtype="bfloat16").outcome == "passed"


def test_a_stale_adapter_is_named(shipment, tmp_path):
    """An older checkpoint in its place; the newer one is what was trained."""
    out = shipment(family="llama")
    older = shipment(family="llama", size=0.2)
    result = verified(
        lens_of(out),
        Engine(adapted(older), models.tokenizer()),
        others=[ll.load_adapter(older / "adapter").named("checkpoint-10")],
    )
    assert result.outcome == "failed"
    assert result.explanations[0].words == "the adapter checkpoint-10"


def test_what_no_candidate_explains_fails_all_the_same(shipment):
    """Noise in every weight: beyond rounding, and nothing is named as its cause."""
    out = shipment(family="llama")
    model = adapted(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=models.seeded(5))
    check = of(verified(lens_of(out), Engine(model, models.tokenizer())), "served as trained")
    assert check.outcome == "failed"
    assert check.where.startswith("no candidate explains it")


def test_an_adapter_that_hardly_moves_the_texts_is_undecided(shipment):
    """Below the rounding of bfloat16 nobody can tell it from the base."""
    out = shipment(family="llama")
    lens = lens_of(out).with_adapter(ll.load_adapter(out / "adapter").scaled(1e-3))
    result = verified(lens, Engine(no_ops.base_of(out), models.tokenizer()), dtype="bfloat16")
    assert result.outcome == "undecided"


# --- Other readings of a text


def with_template(template: str):
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = (
    "{% for m in messages %}w5 w6 {{ m['content'] }} w7{% endfor %}"
    "{% if add_generation_prompt %} w8 w9{% endif %}"
)
CONVERSATIONS = [[{"role": "user", "content": text}] for text in TEXTS]
TEMPLATES = {
    "its own": (TEMPLATE, "passed", ""),
    "none": (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}", "failed", "without a chat template"
    ),
    "no turn": (TEMPLATE.partition("{% if")[0], "failed", "without the assistant's turn"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_of_the_server(name: str, shipment):
    """A server that takes conversations alone, in the template of the training or in another."""
    template, outcome, says = TEMPLATES[name]
    out = shipment(family="llama")
    lens = lens_of.__wrapped__(out)
    lens.model.tokenizer.chat_template = TEMPLATE
    engine = Engine(adapted(out), with_template(template))
    result = verified(lens, engine, chat, name="tuned", texts=CONVERSATIONS)
    assert result.outcome == outcome, result.to_frame()
    if says:
        assert says in result.explanations[0].words


def test_texts_that_a_way_cannot_send_are_counted(shipment):
    """A chat API takes no plain text: what was not compared is said."""
    out = shipment(family="llama")
    lens = lens_of.__wrapped__(out)
    lens.model.tokenizer.chat_template = TEMPLATE
    engine = Engine(adapted(out), with_template(TEMPLATE))
    left_out: list[int] = []
    for texts in (CONVERSATIONS[:2], [*CONVERSATIONS[:2], *TEXTS[:3]]):
        result = verified(lens, engine, chat, name="tuned", texts=texts, new_tokens=2)
        found = re.search(
            r"; (\d+) of \d+ texts cannot be sent in this way", result.checks[0].measured
        )
        left_out.append(int(found[1]) if found else 0)
    assert left_out[1] - left_out[0] == 3


@pytest.mark.parametrize("token", [10**15, -5, 61])
def test_a_token_beyond_the_vocabulary(token: int, shipment):
    """Of another model: read otherwise in a prompt, and refused where it was generated."""
    out = shipment(family="llama")
    lens = lens_of(out)
    engine = Engine(adapted(out), models.tokenizer())

    def with_token(answer) -> None:
        (choice,) = answer["choices"]
        if "prompt_logprobs" in choice:
            choice["prompt_logprobs"][2] = {str(token): {"logprob": -1.0}}
        else:
            choice["logprobs"]["content"][1]["id"] = token

    options = {"name": "tuned", "texts": TEXTS[:1]}
    with pytest.raises(ServerError, match=f"generated the token {token}.*another model"):
        verified(lens, engine, replaced(llama_cpp, with_token), **options)
    if token > 0:
        result = verified(lens, engine, replaced(vllm, with_token), **options)
        check = of(result, "served tokens")
        assert check.outcome == "failed"
        assert f"has the token {token} there" in check.where


def test_another_tokenizer_of_the_server(shipment):
    """Two words in each other's place: the check of tokens names both readings."""
    out = shipment(family="llama")
    swapped = models.tokenizer()
    other = {"w5": "w6", "w6": "w5"}

    class Swapping(Engine):
        def ids(self, prompt):
            words = [other.get(word, word) for word in str(prompt).split()]
            return super().ids(" ".join(words))

    texts = [*TEXTS, "w4 w5 w8 w9"]
    result = verified(lens_of(out), Swapping(adapted(out), swapped), tgi, name="", texts=texts)
    check = of(result, "served tokens")
    assert check.outcome == "failed"
    assert "'w6' there, and 'w5' here" in check.where


# --- What is sent, and what is not


def test_what_is_sent(shipment, monkeypatch):
    """The key of the environment and no other header of ours; the ids, one token, temperature 0."""
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret")
    out = shipment(family="llama")
    with served(Engine(adapted(out), models.tokenizer())) as (url, log):
        result = ll.verify_served(lens_of(out), f"{url}/v1/", dtype="float32", **QUIET)
    assert "secret" not in repr(result)
    paths = [path for path, *_ in log]
    assert paths == ["/v1/models", *["/v1/completions"] * (len(log) - 1)]
    for _, headers, body in log[1:]:
        assert headers["Authorization"] == "Bearer secret"
        assert body.keys() == {"model", "prompt", "max_tokens", "temperature", "prompt_logprobs"}
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("tuned", 1, 0)


def refused(out, answer, words: str, error=ServerError, **options) -> int:
    """The number of requests until it is refused."""
    with serving(answer) as (url, log), pytest.raises(error, match=words):
        ll.verify_served(lens_of(out), url, **{"name": "tuned", **QUIET, **options})
    return len(log)


def test_no_redirect_is_followed(shipment):
    out = shipment(family="llama")
    with serving(lambda path, body: None) as (other, seen):
        place = {"Location": f"{other}/v1/completions"}
        count = refused(out, lambda path, body: (307, place), "which is not followed")
    assert count == 1
    assert not seen


def test_nothing_is_tried_again(shipment, monkeypatch):
    """An error of the server, a refused key, an answer that is no JSON: one request each."""
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret")
    out = shipment(family="llama")
    assert refused(out, lambda path, body: (500, {}), "answered with 500") == 1
    assert refused(out, lambda path, body: (401, {}), "LENS_LORA_API_KEY has .* not taken") == 1
    assert refused(out, lambda path, body: b"<html>", "no JSON") == 1


def test_a_server_without_log_probabilities(shipment):
    """Each way is tried once, and the message says what each was answered."""
    out = shipment(family="llama")
    plain = {"choices": [{"text": "x"}]}
    count = refused(out, lambda path, body: plain, "tells no log-probabilities", texts=TEXTS)
    assert count == 4
    assert refused(out, lambda path, body: None, "no /v1/completions", texts=TEXTS) == 4


def replaced(kind, edit):
    """A server whose answers are edited."""

    def answer(engine, path, body):
        found = kind(engine, path, body)
        if found is not None and path != "/v1/models":
            edit(found)
        return found

    return answer


def without_a_number(value):
    """The third token's log p is this, in each form of an answer."""

    def edit(answer) -> None:
        if "details" in answer:
            answer["details"]["prefill"][2]["logprob"] = value
            return
        (choice,) = answer["choices"]
        if "prompt_logprobs" in choice:
            (entry,) = choice["prompt_logprobs"][2].values()
            entry["logprob"] = value
        elif "content" in choice["logprobs"]:
            choice["logprobs"]["content"][2]["logprob"] = value
        else:
            choice["logprobs"]["token_logprobs"][2] = value

    return edit


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf"), 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_a_number_is_not_left_out(kind: str, value, shipment):
    """A served model that computes NaN: no verdict from the tokens that remain."""
    out = shipment(family="llama")
    broken = replaced(KINDS[kind], without_a_number(value))
    options = {"name": "tuned", "texts": TEXTS[:1]}
    with pytest.raises(ServerError, match="log-probabilit"):
        verified(lens_of(out), Engine(adapted(out), models.tokenizer()), broken, **options)


STRANGE = (
    [],
    {"data": [{}]},
    {"data": 1},
    {"choices": [{"prompt_logprobs": [None, {"x": {"logprob": -1.0}}]}]},
    {"choices": [{"prompt_logprobs": [None, {}]}]},
    {"choices": [{"logprobs": {"tokens": ["token_id:x"], "token_logprobs": ["a"]}}]},
    {"choices": [{"logprobs": {"content": [1]}}]},
    {"details": {"prefill": 3}},
    {"details": {"prefill": [{"logprob": None}]}},
)


@pytest.mark.parametrize("answer", STRANGE, ids=str)
def test_an_answer_of_another_form(answer, shipment):
    out = shipment(family="llama")
    options = {"texts": TEXTS[:1], "name": None}
    assert refused(out, lambda path, body: answer, "tells no log-probabilities", **options) == 5


def test_a_key_that_the_server_repeats_is_not_printed(shipment, monkeypatch):
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret")
    out = shipment(family="llama")

    def answer(path, body):
        return {"error": "bad key secret"} if path == "/v1/models" else None

    with serving(answer) as (url, _), pytest.raises(ServerError) as raised:
        ll.verify_served(lens_of(out), url, **QUIET)
    assert "secret" not in str(raised.value)
    in_numbers = {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": ["secret"]}}]}
    with serving(lambda path, body: in_numbers) as (url, _), pytest.raises(ServerError) as raised:
        ll.verify_served(lens_of(out), url, name="tuned", **QUIET)
    assert "no number, but a str" in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_key_is_not_printed_in_part(monkeypatch):
    """A message of the server is cut at 200 characters: here in the middle of the key."""
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret")
    answer = (400, {}, 197 * b"x" + b"secret")
    with (
        serving(lambda path, body: answer) as (url, _),
        pytest.raises(Refused) as raised,
    ):
        Server(url, 5.0, 1).get("/v1/models")
    assert "xxx" in str(raised.value)
    assert "sec" not in str(raised.value)


def test_a_key_that_ends_in_a_line_break(monkeypatch):
    """It is sent without; one with a line break inside is refused, and not quoted."""
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret\r\n")
    with serving(lambda path, body: {}) as (url, log):
        Server(url, 5.0, 1).get("/v1/models")
    assert log[0][1]["Authorization"] == "Bearer secret"
    for key in ("sec\nret", "secr\u2026et"):
        monkeypatch.setenv("LENS_LORA_API_KEY", key)
        with pytest.raises(ArgumentError, match="cannot be sent in a header") as raised:
            Server("http://127.0.0.1:1", 5.0, 1)
        assert key not in str(raised.value)


def test_a_server_that_does_not_answer(shipment):
    """No connection, or nothing within the time-out."""
    out = shipment(family="llama")
    with pytest.raises(ServerError, match="no answer"):
        ll.verify_served(lens_of(out), "http://127.0.0.1:1", name="tuned", **QUIET)

    def slow(path, body):
        time.sleep(0.5)
        return {}

    assert refused(out, slow, "no answer", timeout=0.1) == 1


DRIPS = {
    "its body": b"HTTP/1.0 200 OK\r\n\r\n",
    "a body of known length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n",
    "its headers": b"HTTP/1.1 200 OK\r\nX: ",
}


@pytest.mark.parametrize("name", DRIPS)
def test_a_server_that_drips_is_ended_in_time(name: str):
    """One byte every tenth of a second: no socket times out, and the request ends all the same."""
    with dripping(DRIPS[name]) as url:
        began = time.monotonic()
        with pytest.raises(ServerError, match="no answer to GET /v1/models .within 0.3 seconds"):
            Server(url, 0.3, 1).get("/v1/models")
        assert time.monotonic() - began < 2


def test_several_names_are_listed(shipment, monkeypatch):
    monkeypatch.setenv("LENS_LORA_API_KEY", "secret")
    out = shipment(family="llama")
    many_names = {"data": [{"id": f"m{i}"} for i in range(300)]}
    words = "'m4' and 295 more"
    assert refused(out, lambda path, body: many_names, words, ArgumentError, name=None) == 1
    repeated = {"data": [{"id": "base"}, {"id": "secret"}]}
    words = "serves 'base', '.key.'"
    assert refused(out, lambda path, body: repeated, words, ArgumentError, name=None) == 1
    listed = {"data": [{"id": "base"}, {"id": "tuned"}]}
    words = "serves 'base', 'tuned'"
    assert refused(out, lambda path, body: listed, words, ArgumentError, name=None) == 1


WRONG_URLS = {
    "ftp://x": "no URL of a server",
    "http://": "no URL of a server",
    "http://me:secret@x": "user or password",
    "ftp://me:secret@x": "user or password",
    "http://x?key=secret": "after '[?]'",
    "http://x:99999999": "out of range",
    "http://[::1": "IPv6",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_url_that_is_none(url: str):
    with pytest.raises(ArgumentError, match=WRONG_URLS[url]) as raised:
        Server(url, 5.0, 1)
    assert "secret" not in str(raised.value)


def test_passes_end_where_one_candidate_leaves_nothing(shipment, monkeypatch):
    """The base is the first candidate: on 4 of 16 texts, and then on all, after three passes."""
    passes: list[int] = []
    of_rows = served_measure.token_log_probs

    def counted(lens, gates, rows, *others, **options):
        passes.append(len(rows))
        return of_rows(lens, gates, rows, *others, **options)

    monkeypatch.setattr(served_measure, "token_log_probs", counted)
    assert found("base", shipment).outcome == "failed"
    assert passes == [16, 16, 16, 4, 16]


def test_a_part_of_the_effect_is_no_pass_where_rounding_is_large():
    """c of 0.6 is no rounding over 206 tokens, though the residual alone would be."""
    near = ServedInstead("the adapter without its layer 4", 0.35)
    for c, outcome in ((1.0, "passed"), (0.93, "passed"), (0.6, "undecided"), (1.4, "undecided")):
        comparison = Comparison(c, 0.45, 0.18, 0.7, 206, 0.04, (near,), along_nearest=0.3)
        assert served_module._served_check(comparison, "bfloat16").outcome == outcome


def test_what_a_server_told_is_kept_in_double_precision(shipment):
    """Rows of unequal length; in float32 a tenth would be off by 1.5e-9."""
    lens = lens_of(shipment(family="llama"))
    rows = [
        ServedRow([3, 4, 5], [math.nan, -0.1, -1 / 3], 3),
        ServedRow([3, 4], [math.nan, -0.7], 2),
    ]
    assert served_measure.ServedTokens(lens, rows).served.tolist() == [-0.1, -1 / 3, -0.7]


@pytest.mark.parametrize("is_shown", [True, False])
def test_every_pass_over_served_tokens_shows_a_bar_or_none(shipment, capsys, is_shown: bool):
    lens = lens_of(shipment(family="llama"))
    row = ServedRow([3, 4, 5], [math.nan, -0.1, -0.2], 3)
    tokens = served_measure.ServedTokens(lens, [row, row], progress=is_shown)
    few = tokens.only_rows([0])
    capsys.readouterr()
    passes = {
        "some rows": lambda: few.log_probs_at(lens.gates(1.0)),
        "other tokens before": lambda: few.with_beginnings([[4, 5]]),
        "rounded": lambda: few.rounded(1e-3),
    }
    for name, run in passes.items():
        run()
        assert ("log-probabilities" in capsys.readouterr().err) == is_shown, name


@pytest.mark.parametrize("is_shown", [True, False])
def test_verification_shows_a_bar_of_its_passes_or_none(shipment, capsys, is_shown: bool):
    """A right server: the only passes are those of the base and of the adapted model."""
    out = shipment(family="llama")
    engine = Engine(adapted(out), models.tokenizer())
    lens = lens_of(out)
    capsys.readouterr()
    assert verified(lens, engine, progress=is_shown).outcome == "passed"
    assert ("log-probabilities" in capsys.readouterr().err) == is_shown


def test_of_two_that_agree_equally_well_the_likelier_is_named():
    """llama.cpp without the adapter: the base, and the adapter at 0.1, are both off by rounding."""
    base = served_comparison._Fit("the base", residual=0.1030, along=1.0, left=0.1)
    weak = served_comparison._Fit("at 0.1", residual=0.1029, along=1.0, left=0.1)
    other = served_comparison._Fit("at 0.25", residual=0.05, along=1.1, left=0.05)
    comparison = Comparison(0.004, 1.0, 0.07, 0.7, 288, 0.04)
    for fits, named in (([base, weak], "the base"), ([base, weak, other], "at 0.25")):
        assert comparison.explained_by(fits).nearest.words == named
    order = comparison.explained_by([base, weak, other]).explanations
    assert [explanation.words for explanation in order] == ["at 0.25", "at 0.1", "the base"]


def test_rounding_is_not_explained_by_a_candidate():
    """A candidate that takes a little of the rounding away is no explanation of it."""
    near = ServedInstead("the adapter without its layer 4", 0.18)
    for residual, along, is_explained in (
        (0.21, 1.0, False),
        (0.40, 1.0, True),
        (0.40, 0.3, False),
        (0.90, 1.1, True),
    ):
        comparison = Comparison(1.0, residual, 0.2, 0.7, 206, 0.0, (near,), along)
        assert comparison.is_explained == is_explained
