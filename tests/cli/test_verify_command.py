"""`lens-lora verify`: mistakes re-created on a tiny model, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from xml.etree import ElementTree

import models
import no_ops
import pytest
from gguf_base import write_base
from loopback import Engine, served
from no_ops import NO_OPS
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli.expecting import prompts_of
from lens_lora.errors import LensLoraError

run = CliRunner().invoke


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    return no_ops.ship(tmp_path_factory.mktemp("shipped"))


@pytest.fixture
def out(shipped, tmp_path):
    """A copy, to be spoiled; its adapter names the copied base."""
    copied = shutil.copytree(shipped, tmp_path / "out")
    no_ops.set_config(copied / "adapter", base_model_name_or_path=str(copied / "base"))
    return copied


def said(result) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def verified(out, *options):
    return run(cli.app, ["verify", str(out / "adapter"), "--quiet", *options])


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", NO_OPS)
def test_a_mistake_is_named(name: str, out):
    """With its exit code: 1 where two facts disagree, 2 unreadable, 3 undecided."""
    mistake = NO_OPS[name]
    result = verified(out, *mistake.make(out))
    assert result.exit_code == mistake.code, result.output
    assert mistake.says in said(result)


def test_the_page_has_every_mistake():
    """As `benchmarks/verify.py --write` puts it there."""
    page = (Path(cli.__file__).parents[2] / "docs" / "shipping_data.md").read_text()
    table = page.partition("<!-- mistakes -->")[2].partition("<!-- end of mistakes -->")[0]
    rows = {row.split(" | ")[0][2:]: row.split(" | ") for row in table.strip().splitlines()[2:]}
    assert list(rows) == [mistake.what for mistake in NO_OPS.values()]
    for mistake in NO_OPS.values():
        _, code, what = rows[mistake.what]
        assert int(code) == mistake.code and mistake.says in what


@pytest.mark.parametrize("is_lost", [False, True], ids=["kept", "lost"])
def test_a_template_that_lies_alone_beside_the_adapter(is_lost: bool, out):
    """The tokenizer of the training is the base's with this template."""
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w4"
    (out / "adapter" / "chat_template.jinja").write_text(template)
    if not is_lost:
        (out / "merged" / "chat_template.jinja").write_text(template)
    result = verified(out, "--merged", str(out / "merged"))
    assert result.exit_code == int(is_lost), result.output
    assert ("no chat template, and there was one" in said(result)) == is_lost


FACT = {"prompt": "w5 w6 w7", "doc": "w9", "pre": "w26", "margin_at_least": -1000}


def written(out, *rows: object):
    """A file of expectations."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (out / "facts.jsonl").write_text("\n".join(lines))
    return ["--expect", str(out / "facts.jsonl")]


def test_a_pass_in_four_formats(out):
    """Exit 0; one screen, and a file of each kind says the same."""
    files = {kind: out / f"checks.{kind}" for kind in ("json", "junit", "report")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", str(path))]
    options += ["--merged", str(out / "merged"), "--max-kl", "9", *written(out, FACT, "", FACT)]
    result = verified(out, *options)
    assert result.exit_code == 0, result.output
    assert "adapter passes: every check that was asked for passed." in said(result)
    assert len(result.stdout.splitlines()) <= 31
    stored = json.loads(files["json"].read_text())
    assert stored["schema"] == "lens_lora verification 1" and stored["exit_code"] == 0
    names = [check["name"] for check in stored["checks"]]
    assert names[-5:] == [
        "expectation, line 1",
        "expectation, line 3",
        "merged folder",
        "merged folder, config.json",
        "merged folder, tokenizer",
    ]
    assert {check["outcome"] for check in stored["checks"]} == {"passed"}
    assert [tensor["kept"] for tensor in stored["tensors"]].count(None) == 7
    suite = ElementTree.parse(files["junit"]).getroot()
    assert [case.get("name") for case in suite] == names
    assert suite.attrib | {"name": ""} == {
        "name": "", "tests": "9", "failures": "0", "errors": "0", "skipped": "0"
    }  # fmt: skip
    page = files["report"].read_text()
    assert "Did adapter ship as it was trained?" in page and "Merged tensors" in page


def test_a_failure_in_junit(out):
    """A failed check, one that is undecided, and one that was not asked for; any text is XML."""
    file = out / "checks.xml"
    rows = [{**FACT, "prompt": "w5\x0b<w6>", "margin_at_least": 1000}]
    no_ops.set_config(out / "adapter", base_model_name_or_path=str(out / "base"))
    result = verified(out, "--junit", str(file), *written(out, *rows))
    assert result.exit_code == 1, result.output
    suite = ElementTree.parse(file).getroot()
    tags = {case.get("name"): [part.tag for part in case] for case in suite}
    assert tags["expectation, line 1"] == ["failure"] and tags["merged folder"] == ["skipped"]
    (failure,) = suite.iter("failure")
    assert "expected: at least 1000; 'w9' against 'w26' after 'w5" in failure.get("message")
    shutil.rmtree(out / "base")
    verified(out, "--junit", str(file))
    assert ElementTree.parse(file).getroot().get("errors") == "2"


BAD_ROWS = {
    "{": "line 2: unreadable",
    '{"prompt": "w5", "doc": "w9"}': "line 2: no pre",
    json.dumps({**FACT, "flips": "yes"}): "line 2: flips is 'yes'; expected true or false",
    json.dumps({**FACT, "margin_at_least": True}): "line 2: margin_at_least is True",
    json.dumps({**FACT, "margin_at_least": float("nan")}): "line 2: margin_at_least is nan",
    json.dumps({**FACT, "flip": True}): "line 2: 'flip' is no key of an expectation",
    json.dumps({**FACT, "messages": [{"role": "user", "content": "w5"}]}): "line 2: it has both",
    json.dumps({**FACT, "pre": "w9"}): "line 2: doc and pre are both 'w9'",
    json.dumps({**FACT, "doc": "w9w9w9 <bos>", "prompt": "w5 " * 40}): "line 2: ",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_bad_row_is_named_by_its_line(row: str, out):
    result = verified(out, *written(out, FACT, row))
    assert result.exit_code == 2 and BAD_ROWS[row] in said(result), result.output


@pytest.mark.slow
def test_many_expectations_take_one_screen(out):
    """Those that passed share a row."""
    rows = [FACT] * 20 + [{**FACT, "margin_at_least": 1000}]
    result = verified(out, *written(out, *rows))
    assert result.exit_code == 1 and "20 of them" in said(result)
    assert len(result.stdout.splitlines()) <= 31 and "expectation, line 21" in said(result)


def test_what_cannot_be_read_is_2(out, tmp_path):
    """An adapter, a base that was named, a merged folder; nothing is written over what is read."""
    assert run(cli.app, ["verify", str(tmp_path / "nowhere")]).exit_code == 2
    assert verified(out, "--model", str(out / "gone")).exit_code == 2
    assert verified(out, "--merged", str(out / "adapter" / "..")).exit_code == 2
    assert verified(out, "--expect", str(out / "adapter" / "adapter_config.json")).exit_code == 2
    config = out / "adapter" / "adapter_config.json"
    assert verified(out, "--json", str(config)).exit_code == 2
    assert json.loads(config.read_text())["r"] == 3
    index = out / "merged" / "config.json"
    assert verified(out, "--merged", str(out / "merged"), "--json", str(index)).exit_code == 2
    assert "vocab_size" in json.loads(index.read_text())
    (out / "adapter" / no_ops.WEIGHTS).write_bytes(b"cut")
    assert verified(out).exit_code == 2


# --- An adapter that brings tokens of its own


def with_more_tokens(out, tokenizer) -> None:
    """Train an adapter as PEFT does after two tokens were added, and merge it."""
    tokenizer.add_tokens(["<tool>", "<think>"])
    base = no_ops.base_of(out)
    base.resize_token_embeddings(models.VOCAB + 2)
    config = LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = models.with_random_factors(get_peft_model(base, config), base)
    model.peft_config["default"].base_model_name_or_path = str(out / "base")
    for place in ("adapter", "merged"):
        shutil.rmtree(out / place)
        if place == "merged":
            model = model.merge_and_unload()
        model.save_pretrained(out / place)
        tokenizer.save_pretrained(out / place)


def test_a_base_gets_the_tokens_that_an_adapter_brings(out):
    """Where embedding and head were trained; a merge that lost them fails."""
    with_more_tokens(out, models.tokenizer())
    result = verified(out, "--merged", str(out / "merged"))
    assert result.exit_code == 0, result.output
    assert "resized from 61 to 63 tokens" in said(result)
    no_ops.base_of(out).save_pretrained(out / "merged")
    result = verified(out, "--merged", str(out / "merged"))
    assert result.exit_code == 1 and "(61, 16), the base's is (63, 16)" in said(result)


def test_a_base_of_another_tokenizer_gets_none(out):
    """Where a token of the base has another id, the adapter is of another base."""
    tokenizer = models.tokenizer()
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = fields["model"]["vocab"]
    vocab["w5"], vocab["w6"] = vocab["w6"], vocab["w5"]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(fields))
    with_more_tokens(out, tokenizer)
    result = verified(out, "--merged", str(out / "merged"))
    assert result.exit_code == 1 and "resized" not in said(result)


# --- A server


def test_a_server_that_answers_as_trained(out):
    """Passed, with the comparison in the JSON."""
    file = out / "checks.json"
    with served(engine_of(out)) as (url, _):
        result = verified(out, *asked(out, url), "--json", str(file))
    assert result.exit_code == 0, result.output
    comparison = json.loads(file.read_text())["served"]
    assert comparison["c"] == pytest.approx(1, abs=1e-3) and comparison["url"] == url
    assert comparison["requests"] == 19


def test_texts_of_a_server_need_no_answers(tmp_path):
    """A prompt or a conversation a line is enough."""
    talk = [{"role": "user", "content": "w5"}]
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, ({"prompt": "w5 w6"}, {"messages": talk}))))
    assert prompts_of(file) == ["w5 w6", talk]
    file.write_text(json.dumps({"doc": "w5"}))
    with pytest.raises(LensLoraError, match="line 1"):
        prompts_of(file)


def test_a_server_that_answers_as_the_base(out):
    """Failed, and said to be the base; also in JUnit."""
    file = out / "checks.xml"
    with served(Engine(no_ops.base_of(out), models.tokenizer())) as (url, _):
        result = verified(out, *asked(out, url), "--junit", str(file))
    assert result.exit_code == 1, result.output
    assert "the server answers as the base, without the adapter" in said(result)
    (failure,) = ElementTree.parse(file).getroot().iter("failure")
    assert "c = " in failure.get("message")


def test_a_server_that_cannot_be_asked_is_2(out):
    result = verified(out, "--served", "http://127.0.0.1:1", "--name", "tuned")
    assert result.exit_code == 2 and "no answer" in said(result)


def engine_of(out) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Engine(
            PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval(),
            models.tokenizer(),
        )


def asked(out, url: str) -> list[str]:
    """Two texts of a file, and the neutral ones."""
    texts = out / "texts.txt"
    texts.write_text("w5 w6 w7 w8 w9\nw10 w11 w12\n")
    return ["--served", url, "--texts", str(texts), "--served-dtype", "float32"]


# --- GGUF files


def test_gguf_files(out):
    """The adapter's file passes, another one fails, a folder without config is 2."""
    pytest.importorskip("gguf")
    adapter = ll.load_adapter(out / "adapter")
    right = adapter.save(out / "right.gguf", format="gguf", base=out / "base")
    wrong = adapter.scaled(2.0).save(out / "wrong.gguf", format="gguf", base=out / "base")
    assert verified(out, "--lora", str(right)).exit_code == 0
    result = verified(out, "--lora", str(wrong))
    assert result.exit_code == 1 and "merged twice, or α doubled" in said(result)
    merged = write_base(no_ops.base_of(out), out / "merged.gguf")
    report = out / "report.html"
    result = verified(out, "--merged", str(merged), "--report", str(report))
    assert result.exit_code == 1 and "no ΔW (nothing was merged)" in said(result)
    page = report.read_text()
    assert "Merged tensors" in page and "The merged folder" not in page
    (out / "none.gguf").write_bytes(b"x")
    assert verified(out, "--merged", str(out / "none.gguf")).exit_code == 2


def combination(out, kind: str):
    """PEFT's combination of the shipped adapter and a random one, in a folder."""
    base = no_ops.base_of(out)
    other = out / "other"
    ll.load_adapter(out / "adapter").null().save(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(base, out / "adapter", adapter_name="a")
        model.load_adapter(other, adapter_name="b")
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=kind)
        model.save_pretrained(out, selected_adapters=["both"])
    return [str(other), "--combined", str(out / "both"), "--weights"]


@pytest.mark.slow
def test_a_combination(out, tmp_path):
    """The sum passes, cross terms do not, and neither do other weights."""
    file = tmp_path / "checks.json"
    options = combination(out, "cat")
    result = verified(out, *options, "0.7,0.4", "--json", str(file))
    outcomes = {c["name"]: c["outcome"] for c in json.loads(file.read_text())["checks"]}
    assert outcomes["the sum of its parts"] == outcomes["the sum of its parts on texts"] == "passed"
    assert json.loads(file.read_text())["combined"]["weights"] == [0.7, 0.4]
    assert result.exit_code == 0, result.output
    wrong = verified(out, *options, "0.7,0.7")
    assert wrong.exit_code == 1 and "the sum of its parts" in said(wrong)
    crossed = verified(out, *combination(out, "linear"), "0.7,0.4")
    assert crossed.exit_code == 1 and "cross terms" in said(crossed)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["b"], "'b' is a second adapter"),
        (["--weights", "1"], "they are those of --combined"),
        (["b", "--combined", "c", "--weights", "1"], "expected 2 numbers"),
        (["b", "--combined", "c", "--weights", "1,nan"], "expected 2 numbers"),
        (["b", "--combined", "c", "--weights", "1,x"], "expected 2 numbers"),
    ],
)
def test_weights_that_are_none(options, says, out):
    result = verified(out, *options)
    assert result.exit_code == 2 and says in said(result)
