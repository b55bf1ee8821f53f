"""Help holds its words at any width; `--tuned`, `compare`, `--json`, and folders that are made."""

from __future__ import annotations

import copy
import inspect
import io
import json
import re
import shutil
import typing

import models
import pytest
import torch
import typer
from folders import adapter_of, save_base
from rich.console import Console
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli import running

RUN = CliRunner()
COMMANDS = sorted(typer.main.get_command(cli.app).commands)


def words_of_help(name: str) -> set[str]:
    """The words of a command's help that a column of help could hold."""
    command = typer.main.get_command(cli.app).commands[name]
    texts = [parameter.help or "" for parameter in command.params]
    words = {word for text in texts for word in text.split()}
    return {word for word in words if len(word) <= 20}


@pytest.mark.sample(8)
@pytest.mark.parametrize("width", ["80", "100"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_breaks_in_no_word(name: str, width: str):
    shown_help = RUN.invoke(cli.app, [name, "--help"], env={"COLUMNS": width}).stdout
    lines = [line.strip("│ ") for line in shown_help.splitlines()]
    printed = set(" ".join(lines).replace("│", " ").split())
    assert words_of_help(name) - printed == set()


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_value_after_an_option_that_takes_none(name: str):
    shown_help = RUN.invoke(cli.app, [name, "--help"], env={"COLUMNS": "120"}).stdout
    lines = [line for line in shown_help.splitlines() if "--help" not in line]
    assert not [line for line in lines if "<bool>" in line]


def test_a_line_breaks_between_words_on_a_terminal_alone():
    """A path stays whole even where it is wider, so that it can be copied."""
    line = "Warning: the base is that of a package; name " + 50 * "x"
    narrow = Console(force_terminal=True, width=40)
    pieces = running._between_words(line, narrow)
    assert " ".join(pieces) == line and pieces[-1] == 50 * "x"
    assert all(len(piece) <= 40 for piece in pieces[:-1])
    assert running._between_words(line, Console(file=io.StringIO(), width=40)) == [line]


def choices_in(annotation) -> list[str]:
    """The words of a Literal, wherever in an annotation it stands."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in typing.get_args(annotation) for choice in choices_in(part)]


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_choice_is_not_broken_either(name: str):
    """At 100 columns; an option with long choices names them in its help instead."""
    shown_help = RUN.invoke(cli.app, [name, "--help"], env={"COLUMNS": "100"}).stdout
    for parameter in inspect.signature(getattr(cli, name)).parameters.values():
        for choice in choices_in(parameter.annotation):
            assert choice in shown_help, (parameter.name, choice)


def test_options_alike_have_one_name():
    """A number of random adapters is --nulls wherever it is asked for, and JSON is --json."""
    names: set[str] = set()
    for name in COMMANDS:
        command = typer.main.get_command(cli.app).commands[name]
        names.update(option for parameter in command.params for option in parameter.opts)
    assert "--nulls" in names
    assert not names & {"--null", "--draws", "--json-file", "--output"}
    for name in set(COMMANDS) - {"audit"}:  # which writes a folder of tables
        command = typer.main.get_command(cli.app).commands[name]
        assert any("--json" in parameter.opts for parameter in command.params), name


# --- a tiny base, an adapter, another, and a model that was fine-tuned whole


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = adapter_of(base, folder / "base")
    adapter.save(folder / "one")
    adapter.null(3).save(folder / "two")
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "q_proj" in name:
                weight += 0.1 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(0)
                )
    for name, model in (("base", base), ("tuned", tuned)):
        save_base(model, folder / name)
    return folder, base, tuned


ASKED = ["--prompt", "w5 w6", "--doc", "w8", "--pre", "w9", "--quiet"]


def test_a_model_that_was_fine_tuned_whole_is_explained(tiny, tmp_path):
    """The oracle is its own margin, of the Hugging Face model. Folders are made."""
    folder, base, tuned = tiny
    page = tmp_path / "no" / "such" / "page.html"
    numbers = tmp_path / "nor" / "this" / "one.json"
    places = ["--report", str(page), "--json", str(numbers)]
    models_named = ["--tuned", str(folder / "tuned"), "--model", str(folder / "base")]
    result = RUN.invoke(cli.app, ["explain", *models_named, *ASKED, "--fast", *places])
    assert result.exit_code == 0, result.output
    assert page.is_file()
    (written,) = json.loads(numbers.read_text())
    assert written["result"] == "Explanation"
    assert len(written["rows"]) == 2  # two layers' q
    tokenizer = models.tokenizer()
    ids = torch.tensor([tokenizer("w5 w6").input_ids])
    doc, pre = (tokenizer(word, add_special_tokens=False).input_ids[-1] for word in ("w8", "w9"))
    with torch.no_grad():
        ends = [model(ids).logits[0, -1] for model in (base, tuned)]
    before, after = (float(logits[doc] - logits[pre]) for logits in ends)
    assert f"prefers “w9” to “w8” by {-before:.2g} logits" in written["story"]
    assert f"it prefers “w8”, by {after:.2g}: a shift of {after - before:.2g}" in written["story"]


REFUSED = {
    "both": (["explain", "{f}/one", "--tuned", "{f}/tuned", *ASKED], "in place of ADAPTER"),
    "no base": (["explain", "--tuned", "{f}/tuned", *ASKED], "name that with --model"),
    "neither": (["diff", "--quiet"], "name one, or a fine-tuned model with --tuned"),
    "a whole model": (["explain", "{f}/tuned", *ASKED], "It holds a whole model.*--tuned"),
}


@pytest.mark.parametrize("given, words", REFUSED.values(), ids=REFUSED)
def test_what_is_no_adapter_is_named(tiny, given, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = RUN.invoke(cli.app, [part.format(f=tiny[0]) for part in given])
    assert result.exit_code == 2
    printed = " ".join(result.output.replace("│", " ").split())
    assert all(part in printed for part in words.split(".*"))


def test_python_names_the_change_of_a_whole_model(tiny):
    with pytest.raises(ll.errors.AdapterError, match=r"ll\.Adapter\.between\(base, tuned\)"):
        ll.load_adapter(tiny[0] / "tuned")


def test_the_story_is_what_remains_on_a_screen_of_few_rows(tiny, tmp_path):
    """Below the tables, above the path of the page; of 24 rows its three sentences."""
    page = ["--report", str(tmp_path / "page.html")]
    result = RUN.invoke(cli.app, ["explain", str(tiny[0] / "one"), *ASKED, "--fast", *page])
    assert result.exit_code == 0, result.output
    rows = result.stdout.splitlines()
    assert "Prompts were read as text" in " ".join(" ".join(rows[-40:]).split())
    assert "In short: The base model prefers" in " ".join(" ".join(rows[-20:]).split())


def test_help_names_the_class_that_is_taken_by_default(tiny):
    """It named the other one."""
    said = " ".join(RUN.invoke(cli.app, ["explain", "--help"]).stdout.replace("│", " ").split())
    assert "Default: TransformerBridge, if" in said
    taken = ll.load(tiny[0] / "one").class_name
    assert taken == ("TransformerBridge" if "TransformerBridge" in models.MAKERS else taken)


def test_two_adapters_are_compared(tiny, tmp_path):
    """The numbers are those of `ll.compare_adapters`, whose own tests have the oracle."""
    folder, _, _ = tiny
    numbers = tmp_path / "alike.json"
    both = [str(folder / "one"), str(folder / "two")]
    result = RUN.invoke(cli.app, ["compare", *both, "--quiet", "--json", str(numbers)])
    assert result.exit_code == 0, result.output
    lens = ll.load(folder / "one")
    expected = ll.compare_adapters(lens, folder / "two", progress=False)
    (written,) = json.loads(numbers.read_text())
    cosines = [row["cosine"] for row in written["rows"]]
    assert cosines == pytest.approx(expected.cosines.tolist(), abs=1e-6)
    assert "both change 14 sites" in result.stdout
    same = RUN.invoke(cli.app, ["compare", both[0], both[0], "--quiet", "--nulls", "0"])
    assert "cosine of ΔW" in same.stdout and "+1.00" in same.stdout
    assert "a cosine of 1.00 (1 is" in " ".join(same.stdout.split())
    said = " ".join(result.stdout.split())
    assert re.search(
        r"have a cosine of −?\d\.\d\d; of 97\.5 % of adapters .* at most −?\d\.\d\d \(", said
    )


def test_adapters_that_name_one_base_by_two_folders_are_compared_over_the_model_that_is_named(
    tiny, tmp_path
):
    folder, _, _ = tiny
    moved = tmp_path / "moved"
    shutil.copytree(folder / "two", moved)
    config = moved / "adapter_config.json"
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": "/elsewhere/base"}
    config.write_text(json.dumps(fields))
    both = ["compare", str(folder / "one"), str(moved), "--quiet"]
    refused = RUN.invoke(cli.app, both)
    said = " ".join(refused.output.split())
    assert refused.exit_code != 0 and "name it with --model" in said and "replace" not in said
    named = RUN.invoke(cli.app, [*both, "--model", str(folder / "base")])
    assert named.exit_code == 0 and "both change 14 sites" in named.stdout, named.output
    # A base of another name is compared as well, since the model was named, but not in silence.
    config.write_text(json.dumps(fields | {"base_model_name_or_path": "lab/other-model"}))
    warned = RUN.invoke(cli.app, [*both, "--model", str(folder / "base")])
    assert warned.exit_code == 0 and "both change 14 sites" in warned.stdout, warned.output
    assert "names the base lab/other-model" in " ".join(warned.output.split())


def test_checkpoints_of_two_runs_have_different_names(tiny, tmp_path):
    """Every trainer calls its folders checkpoint-40."""
    folder, _, _ = tiny
    names = []
    for run in ("seed0", "seed1"):
        shutil.copytree(folder / "one", tmp_path / run / "checkpoint-40")
        names.append(ll.load_adapter(tmp_path / run / "checkpoint-40").name)
    assert names == ["seed0/checkpoint-40", "seed1/checkpoint-40"]
    of_hub = tmp_path / "models--lab--zoo" / "snapshots" / "0a1b" / "checkpoint-40"
    shutil.copytree(folder / "one", of_hub)
    assert ll.load_adapter(of_hub).name == "zoo/checkpoint-40"


def test_an_option_that_there_is_not_is_answered_by_its_meaning():
    """Also a command; a slip of the finger is answered by typer itself."""
    expected = {
        ("explain", "a", "--answer", "x"): "No option --answer: it is --doc",
        ("explain", "a", "--foil", "x"): "No option --foil: it is --pre",
        ("diff", "a", "--gpu"): "No option --gpu: it is --device",
        ("diff", "a", "--lora", "b"): "it is the argument ADAPTER",
        ("diff", "--adapter", "a"): "No option --adapter: it is the argument ADAPTER",
        ("compare", "a", "--other", "b"): "it is the argument OTHER",
        ("explain", "a", "The capital"): "(The capital). A prompt is given as --prompt",
        ("diff", "a", "p.csv"): "(p.csv). A file of prompts is given as --prompts FILE",
        ("compare", "a", "b", "--prompt", "c"): "No option --prompt: it reads texts",
        ("explain", "a", "--layer", "3"): "No option --layer: every module and layer",
        ("diff", "a", "--samples", "3"): "--prompts FILE takes a list of your own",
        ("diff", "a", "--verbose"): "unless --quiet is given",
        ("verify", "a", "--against", "b"): "No option --against: it is --merged",
        ("plan", "--adapter", "a"): "No option --adapter: no adapter is read: --rank",
        ("inspect", "a", "b"): "Got unexpected extra argument(s) (b) ╰",
        ("diff", "a", "."): "`lens-lora compare ADAPTER OTHER` compares two adapters",
        ("explain", "a", "--text", "b"): "No option --text: it is --prompt or --prompts",
        ("generate", "a"): "No command 'generate': `lens-lora explain ADAPTER --prompt P`",
        ("diff", "a", "-o", "b"): "No option -o: it is --report",
        ("sweep", "a", "--workers", "4"): "--shard 1/4",
        ("explain", "a", "--prmpt", "b"): "No such option: --prmpt",
        ("explain", "a", "--frobnicate"): "No such option: --frobnicate",
        ("merge", "a"): "No command 'merge': PEFT merges; `lens-lora verify",
        ("evaluate", "a"): "`lens-lora sweep",
        ("ls",): "`lens-lora inspect ADAPTER` lists the modules",
        ("expalin", "a"): "Did you mean 'explain'",
        ("frobnicate",): "No command 'frobnicate'; `lens-lora --help`",
    }
    for arguments, words in expected.items():
        result = RUN.invoke(cli.app, list(arguments))
        said = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2 and words in said, (arguments, said)


def test_help_of_diff_promises_no_adapter_of_the_demo():
    """`diff` without an adapter is refused, so its help has no default."""
    shown = " ".join(RUN.invoke(cli.app, ["diff", "--help"]).output.replace("│", " ").split())
    assert "Not with --tuned." in shown and "Default: the demo's" not in shown
    refused = RUN.invoke(cli.app, ["diff"])
    assert refused.exit_code == 2 and "name one" in refused.output
