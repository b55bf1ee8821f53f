"""Messages hold a fact and remedies as data, for Python and for the shell; none is rewritten."""

from __future__ import annotations

import ast
import copy
import pickle
import re
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli, errors
from lens_lora.cli.adapters import repair
from lens_lora.cli.explaining import explain
from lens_lora.cli.options import options_of
from lens_lora.cli.sweeping import sweep
from lens_lora.cli.verifying import verify

run = CliRunner().invoke
PACKAGE = Path(errors.__file__).parent


def said(text: str) -> str:
    """What is printed, without colours and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


EVERY = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, errors.LensLoraError | errors.LensLoraWarning)
]


@pytest.mark.parametrize("cls", EVERY)
def test_a_message_is_its_fact_and_the_remedy_of_its_reader(cls):
    error = cls("x is 1", remedy="pass 2.", in_shell="give --x 2.")
    assert str(error) == "x is 1; pass 2."
    assert str(cls("It is 1.", remedy="Pass 2.")) == "It is 1. Pass 2."
    with errors.within_command({}):
        assert str(error) == "x is 1; give --x 2."
        assert f"prompt 3: {error}" == "prompt 3: x is 1; give --x 2."
        assert str(cls("It is 1.", remedy="Pass 2.")) == "It is 1. Pass 2."
        assert str(cls("It is 1.", remedy="Pass 2.", in_shell="")) == "It is 1."
    assert str(error) == "x is 1; pass 2."


@pytest.mark.parametrize("cls", EVERY)
def test_a_place_is_put_before_the_fact_and_the_remedies_stay(cls):
    error = cls("x is 1", remedy="pass 2.", in_shell="give --x 2.")
    moved = error.at("folder")
    assert (type(moved), str(moved)) == (cls, "folder: x is 1; pass 2.")
    assert (moved.remedy, moved.in_shell, moved.args) == (
        "pass 2.",
        "give --x 2.",
        ("folder: x is 1",),
    )
    assert str(error) == "x is 1; pass 2."
    for twin in (copy.copy(moved), pickle.loads(pickle.dumps(moved))):
        assert (str(twin), twin.in_shell) == (str(moved), moved.in_shell)


def test_an_argument_is_named_as_its_reader_knows_it():
    assert errors.setting("out", "a b") == "out='a b'"
    with errors.within_command({"out": "--out"}):
        assert errors.setting("out", "a b") == "--out 'a b'"
        assert errors.setting("keep", 0.5) == "keep=0.5"
        assert errors.worded("Python", "shell") == "shell"
    assert errors.named("out") == "out"


def test_the_options_of_a_command_are_known_by_argument():
    assert (
        options_of(repair).items() >= {"keep_share": "--keep-share", "adapter": "ADAPTER"}.items()
    )
    assert options_of(verify).items() >= {"json_file": "--json", "max_kl": "--max-kl"}.items()
    assert options_of(explain)["kind"] == options_of(explain)["model_class"] == "--class"
    assert options_of(sweep)["resume"] == "--resume"


def warns() -> None:
    errors.warn("x is 1", remedy="pass 2.", in_shell="give --x 2.")


def test_warnings_are_python_s_unless_somebody_listens():
    with pytest.warns(ll.errors.LensLoraWarning, match="x is 1; pass 2") as caught:
        warns()
    assert caught[0].filename == __file__, "the line that called what warns"
    heard: list[errors.LensLoraWarning] = []
    with warnings.catch_warnings(), errors.heard_by(heard.append):
        warnings.simplefilter("error")
        warns()
    assert [warning.in_shell for warning in heard] == ["give --x 2."]


# --- At the command line


@pytest.mark.parametrize("name", ["max_kl", "test_keep", "resume=False", "ll.patch_sites"])
def test_a_path_is_quoted_as_it_is(name, tmp_path):
    """`lens-lora verify runs/max_kl/a` answered `runs/--max-kl/a: no such folder`."""
    folder = f"{tmp_path}/{name}/a"
    for command in ("verify", "inspect"):
        result = run(cli.app, [command, folder])
        assert result.exit_code == 2
        assert f"{folder}: no such folder" in said(result.stderr)


def test_a_prompt_is_quoted_as_it_is(tmp_path):
    prompt = "max_kl= and keep_share, steps=3"
    options = ["--prompt", prompt, "--doc", " a", "--pre", " a", "--report", f"{tmp_path}/a.html"]
    result = run(cli.app, ["explain", *options])
    assert result.exit_code == 2
    assert "doc and pre are both ' a'" in said(result.stderr)
    result = run(cli.app, ["explain", *options[:4], "--report", f"{tmp_path}/a.html"])
    assert f"the prompt {prompt!r} needs both answers" in said(
        re.sub("[│╭╮╰╯─]", "", result.stderr)
    )


def test_an_argument_is_named_as_an_option():
    result = run(cli.app, ["inspect", "x", "--load-in-4bit", "--load-in-8bit"])
    assert "--load-in-4bit and --load-in-8bit exclude each other" in said(result.stderr)
    with pytest.raises(ll.errors.ArgumentError, match="load_in_4bit and load_in_8bit exclude"):
        ll.load("x", "y", load_in_4bit=True, load_in_8bit=True)


def calls(source: str) -> list[str]:
    """Calls that replace a part of the text of an error, or of a warning."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        is_replaced = node.func.attr in ("replace", "sub", "subn", "translate")
        if is_replaced and names & {"error", "warning", "message", "story"}:
            found.append(ast.unparse(node))
    return found


@pytest.mark.sample(70)
@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_no_message_is_searched_and_replaced(path):
    assert calls(path.read_text(encoding="utf-8")) == []


def test_a_replaced_message_is_seen():
    """Negative control."""
    assert calls("str(error).replace('a', 'b')")
    assert calls("re.sub('a', 'b', f'{error}')")
