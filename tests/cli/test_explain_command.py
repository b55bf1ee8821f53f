"""`lens-lora explain`: what it asks, refuses, prints and writes; once on the real model."""

from __future__ import annotations

import base64
import copy
import gzip
import html
import json
import re

import chats
import limits
import models
import pytest
import torch
from browser import browser, drawn
from real import ADAPTER
from results_by_hand import without_plotly
from rich.console import Console
from terminal import plain
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli import running
from lens_lora.cli.options import BaseModel
from lens_lora.cli.questions import Questions
from lens_lora.errors import ModelStateError, NumericsError

run = CliRunner().invoke
CLASSES = list(models.MAKERS)

# --- the command


ANSWERS = ["--doc", "w9", "--pre", "w26"]
# What is warned of them, also with --quiet.
SPACES = "Warning: the answers 'w9' and 'w26' do not both begin with a space; is that meant?\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Give --prompts FILE, or --prompt 'The"),
        (["--prompt", "a", "--doc", "b"], "needs both answers: --doc ' Lyon' --pre ' Paris'"),
        (["--prompt", "a", "--response", "b", "--doc", "c"], "give a response, or two answers"),
        (["--prompt", "a", "--nulls", "2"], "random adapters are compared on a margin"),
        (["--prompt", "a", "--max-new-tokens", "0"], "for '--max-new-tokens'"),
        (["--chat", " "], "--chat: it is empty: the user says nothing"),
        (["--prompt", "a", "--system", "b", *ANSWERS], "--system: it goes before what --chat says"),
        (["--prompt", "a", *ANSWERS, "--nulls", "1"], "at least 2 random adapters"),
        (
            ["--prompt", "a", *ANSWERS, "--report", "/dev/null/x.html"],
            "cannot be made in /dev/null",
        ),
        (
            ["--prompt", "a"] * 17 + ANSWERS,
            "17 prompts are too many for one page, which holds 16 at most",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message):
    result = run(cli.app, ["explain", *options])
    assert result.exit_code == 2 and message in plain(result.stderr)


def test_prompts_come_from_every_kind_of_file(tmp_path):
    lines, csv, jsonl = (tmp_path / f"p.{kind}" for kind in ("txt", "csv", "jsonl"))
    lines.write_text("one two\n\nthree\n")
    csv.write_text('prompt,doc,pre\n"a, b", x, y\n')
    jsonl.write_text(json.dumps({"prompt": "a", "doc": " x", "pre": " y"}) + "\n")

    def ask(file=None, *typed, doc=None, pre=None, response=None):
        return Questions([*typed], file, doc=doc, pre=pre).checked(response, answered=False)

    assert ask(lines, "first", doc="d", pre="p") == [
        (prompt, "d", "p", None) for prompt in ("first", "one two", "three")
    ]
    assert ask(csv) == [("a, b", " x", " y", None)]
    assert ask(jsonl) == [("a", " x", " y", None)]
    assert ask(jsonl, doc=" z") == [("a", " z", " y", None)]
    assert ask(jsonl, doc=" z", pre=" w") == [("a", " z", " w", None)]
    assert ask(None, "a", response=" r") == [("a", None, None, " r")]
    assert ask(lines)[1] == ("three", None, None, None)
    jsonl.write_text(json.dumps({"messages": chats.ASK, "doc": " x", "pre": " y"}) + "\n")
    assert ask(jsonl, doc=" z", pre=" w") == [(chats.ASK, " z", " w", None)]
    said = Questions(prompts=jsonl, chat=["w7"], system="w20", doc=" z", pre=" w").checked()
    system, user = {"role": "system", "content": "w20"}, {"role": "user", "content": "w7"}
    assert said == [([system, user], " z", " w", None), (chats.ASK, " z", " w", None)]


def test_bad_record_is_one_line_with_its_place(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "doc": " x", "pre": " y"}\n{"prompt": "b", "doc": " x"}\n')
    result = run(cli.app, ["explain", "--prompts", str(file)])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"{file}, line 2: no pre." in result.stderr


def test_file_without_a_prompt_is_named(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("\n\n")
    result = run(cli.app, ["explain", "--prompts", str(file), *ANSWERS])
    assert result.exit_code == 2 and "holds no prompt" in plain(result.stderr)


@pytest.fixture(scope="module")
def tiny_command(tmp_path_factory):
    """`explain` on a tiny model and adapter, as the command loads them."""
    folder = tmp_path_factory.mktemp("tiny")
    base = models.hf_model("llama", dtype=torch.float32)
    peft = models.peft_model("llama", copy.deepcopy(base))
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)

    def call(monkeypatch, *options):
        def load(name, progress, how, **of):
            return copy.deepcopy(base).to(how.device or "cpu"), models.tokenizer()

        monkeypatch.setattr(running, "load_model", load)
        paths = [str(folder / "adapter"), "--report", str(folder / "page.html")]
        return run(cli.app, ["explain", *paths, *options]), folder / "page.html"

    return call


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_command_explains_two_prompts_on_either_class(tiny_command, monkeypatch, kind):
    prompts = ["--prompt", "w13 w14", "--prompt", "w5 w6 w7"]
    result, page = tiny_command(monkeypatch, *prompts, *ANSWERS, "--class", kind, "--nulls", "2")
    assert result.exit_code == 0, result.output
    text = plain(result.stdout)
    assert f"as {kind} of transformer-lens" in text and "14 modules of rank" in text
    assert "1 of 2: w13 w14 The base model prefers" in text and "2 of 2: w5 w6 w7 The" in text
    assert len(result.stdout.splitlines()) < 30
    assert re.search(r"prompt +answers +base +adapted", result.stdout)
    assert f"Report: {page}" in text
    assert "Explaining prompt 2 of 2" in result.stderr and "Done in" in result.stderr
    assert page.read_text(encoding="utf-8").count('<details class="prompt"') == 2


@pytest.mark.slow
def test_fast_explains_all_at_once(tiny_command, monkeypatch):
    prompts = ["--prompt", "w13 w14", "--prompt", "w5 w6 w7"]
    result, page = tiny_command(monkeypatch, *prompts, *ANSWERS, "--fast")
    assert result.exit_code == 0 and "Explaining prompt 1 to 2 of 2" in result.stderr
    assert "2 of 2: w5 w6 w7" in plain(result.stdout)
    assert page.read_text(encoding="utf-8").count('<details class="prompt"') == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_command_explains_a_response_given_and_generated(tiny_command, monkeypatch, kind):
    given = ["--prompt", "w13 w14", "--response", "w9 w26 w5", "--class", kind]
    result, page = tiny_command(monkeypatch, *given)
    assert result.exit_code == 0, result.output
    text = plain(result.stdout)
    assert "the response that was given has 3 tokens" in text and "tokens that changed most" in text
    assert "Layer by layer, token by token" in page.read_text(encoding="utf-8")
    said = ["--prompt", "w13 w14", "--max-new-tokens", "4", "--fast", "--class", kind]
    result, page = tiny_command(monkeypatch, *said)
    assert result.exit_code == 0, result.output
    assert "the adapted model says, in" in plain(result.stdout)
    assert "Layer by layer, token by token" not in page.read_text(encoding="utf-8")


def test_a_response_that_does_not_fit_is_one_line(tiny_command, monkeypatch):
    long = ["--prompt", "w13 w14", "--max-new-tokens", "40", "--quiet"]
    result, _ = tiny_command(monkeypatch, *long)
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "--max-new-tokens 40 more do not fit" in result.stderr


@pytest.mark.slow
def test_command_explains_what_is_said_to_a_chat_model(tiny_command, monkeypatch):
    """The tokens are the template's, the system's message first; without a template, one line."""
    asked = ["--chat", "w13 w14", "--system", "w20", "--fast", *ANSWERS]
    result, _ = tiny_command(monkeypatch, *asked)
    assert result.exit_code == 2 and "tokenizer.chat_template is None" in result.stderr
    with_template = models.tokenizer()
    with_template.chat_template = chats.TEMPLATE
    monkeypatch.setattr(models, "tokenizer", lambda: with_template)
    result, page = tiny_command(monkeypatch, *asked)
    assert result.exit_code == 0, result.output
    text = without_plotly(page.read_text(encoding="utf-8"))
    (said,) = re.findall(r"On the prompt “([^”]*)”", html.unescape(text))
    assert said == "w13 w14"
    packed = re.findall(r'data-figure="([^"]*)"', text)
    figures = "".join(gzip.decompress(base64.b64decode(figure)).decode() for figure in packed)
    tokens = ["0 ", *(f"{i} w{n}" for i, n in ((1, 5), (2, 20), (4, 4), (5, 13), (6, 14), (8, 6)))]
    assert all(token in figures for token in tokens)
    assert "Warning:" not in result.stderr


def test_quiet_command_says_nothing_on_stderr(tiny_command, monkeypatch):
    result, _ = tiny_command(monkeypatch, "--prompt", "w13 w14", *ANSWERS, "--fast", "--quiet")
    assert (result.exit_code, result.stderr) == (0, SPACES)
    assert "1 of 1:" not in result.stdout


def errors_of(result) -> list[str]:
    """What a quiet command says besides warnings, which nothing silences."""
    return [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]


def test_wrong_answer_is_one_line_before_anything_long_runs(tiny_command, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("explained")

    monkeypatch.setattr(ll, "explain", never)
    options = ["--prompt", "w13", "--prompt", "w4", "--doc", "w9", "--pre", "w9 ", "--quiet"]
    result, _ = tiny_command(monkeypatch, *options)
    assert result.exit_code == 2 and len(errors_of(result)) == 1
    assert "prompt 1, 'w13': doc and pre are the same token" in result.stderr


def test_equal_answers_are_one_line_with_their_prompt(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "a", "doc": " x", "pre": " y"}\n{"prompt": "b", "doc": "z", "pre": "z"}\n'
    )
    result = run(cli.app, ["explain", "--prompts", str(file)])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "p.jsonl, line 2: doc and pre are both 'z', so their margin" in result.stderr


def test_page_holds_what_was_explained_before_an_error(tiny_command, monkeypatch):
    def once(lens, prompts, doc, pre, plain=ll.explain, **options):
        if len(prompts) > 1:
            raise NumericsError("one of them is not finite")
        if prompts == ["w5"]:
            raise NumericsError("not finite")
        return plain(lens, prompts, doc, pre, **options)

    monkeypatch.setattr(ll, "explain", once)
    options = ["--prompt", "w13 w14", "--prompt", "w5", *ANSWERS, "--fast", "--quiet"]
    result, page = tiny_command(monkeypatch, *options)
    assert (result.exit_code, errors_of(result)) == (2, ["NumericsError: not finite"])
    text = without_plotly(page.read_text(encoding="utf-8"))
    assert re.findall(r"On the prompt “([^”]*)”", text) == ["w13w14"]


def test_device_that_is_not_there_is_one_line(tiny_command, monkeypatch):
    monkeypatch.setattr(running, "lens_for", None)
    result, _ = tiny_command(monkeypatch, "--prompt", "w13", *ANSWERS, "--quiet", "--device", "gpu")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert "ModelStateError: 'gpu' cannot be used: Expected one of cpu" in result.stderr


def test_a_package_that_is_not_there_is_named_before_anything_loads(tiny_command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(running, "step", None)
    result, _ = tiny_command(monkeypatch, "--prompt", "w13", *ANSWERS, "--load-in-4bit")
    assert result.exit_code == 2
    assert result.stderr == (
        "ModelStateError: --load-in-4bit and --load-in-8bit need the package bitsandbytes, which "
        "is not installed: pip install bitsandbytes (this package's extra: [quantised]).\n"
    )


def test_an_error_of_a_device_is_not_one_of_the_base(monkeypatch):
    def load(name, progress, how, **of):
        raise ModelStateError("'cuda' cannot be used: CUDA out of memory")

    monkeypatch.setattr(running, "load_model", load)
    with pytest.raises(ModelStateError, match="out of memory$"):
        running.load_model_of("its/base", Console(quiet=True), BaseModel())


@pytest.mark.slow
def test_slips_of_the_space_are_noted(tiny_command, monkeypatch):
    result, _ = tiny_command(monkeypatch, "--prompt", "w13 ", *ANSWERS, "--fast")
    assert "Warning: the prompt 'w13 ' ends in a space" in result.stderr
    twice = ["--prompt", "w13", "--prompt", "w14"]
    result, _ = tiny_command(monkeypatch, *twice, *ANSWERS, "--fast")
    words = "Warning: the answers 'w9' and 'w26' do not both begin with a space"
    assert result.stderr.count(words) == 1, "of two prompts the same warning is printed once"


# --- once, on the real model


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A third of the demo adapter's modules, each of which is added and left out."""
    report = (folder := tmp_path_factory.mktemp("explain")) / "page.html"
    ll.load_adapter(ADAPTER).only("model.layers.2*").save(late := folder / "late_adapter")
    asked = ["--prompt", "The capital of France is", "--doc", " Lyon", "--pre", " Paris"]
    options = [str(late), *asked, "--model", "embedded"]
    with pytest.MonkeyPatch.context() as patch:
        limits.answers_of_an_explanation(patch, 6)  # in place of 48, the third of the time
        return run(cli.app, ["explain", *options, "--report", str(report)]), report


PLOTS = (
    *("path", "remainder", "second_order", "sites", "positions", "coupling", "faithfulness"),
    *("add_one", "leave_one_out", "leave_one_out@1"),
    *("reliability/add_one", "reliability/leave_one_out"),
)


class TestReal:
    pytestmark = pytest.mark.real

    @pytest.mark.slow
    def test_tells_the_story(self, real):
        assert real[0].exit_code == 0, real[0].output
        text = plain(real[0].stdout)
        assert "late_adapter, 77 modules of rank 8" in text
        assert "the base model prefers “Paris” to “Lyon” by 6.89 logits" in text
        assert "flips at ε = 0.813" in text
        assert "“·Paris” (77%) for the base model and “·Lyon” (72%) with the adapter" in text
        assert "Measured, adding one module at a time agrees with first order" in text

    @pytest.mark.slow
    def test_shows_progress_and_no_noise(self, real):
        assert "each site left out" in real[0].stderr
        assert not re.search(r"warn|deprecat|traceback", real[0].stderr, flags=re.IGNORECASE)

    @pytest.mark.browser
    @browser
    def test_page_opens(self, real, tmp_path, opened):
        dom, console = opened(real[1].read_text(encoding="utf-8"), tmp_path)
        assert console == [] and drawn(dom) == len(PLOTS)
        assert 'data-wide="false at 1200"' in dom
