"""What a user meets: wrong base, wrong token, long prompt, missing γ, Ctrl-C, on both doors.

Each message names the place, the facts that disagree, and the remedy; on the command line it is
one line, without a traceback.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
from folders import save_base, save_naming
from peft import PeftModel
from sweep_runs import GOOD, two_processes, write_jsonl
from terminal import plain
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora import cli
from lens_lora.cli import running

run = CliRunner().invoke
MAKE = next(iter(models.MAKERS.values()))
R = ll.Margin("w8", "w9")
PROMPT = "w5 w6 w7"


def another(**changes):
    model = LlamaForCausalLM(LlamaConfig(**{**models._ROTARY, **changes})).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    return MAKE(model)


@pytest.fixture(scope="module")
def tiny():
    base = models.hf_model("llama", dtype=torch.float32)
    peft = models.peft_model("llama", base)
    adapter = dataclasses.replace(ll.Adapter.from_peft(peft), base_model="some/base")
    model = MAKE(base)
    return SimpleNamespace(
        base=base, peft=peft, adapter=adapter, model=model, lens=ll.LoraLens(model, adapter)
    )


# --- in Python

LENSES = {
    "another width": (lambda t: ll.LoraLens(another(hidden_size=32), t.adapter),
        "blocks.0.attn.q .*maps 16→16, the model 32→32.*another base model.*some/base"),
    "fewer layers": (lambda t: ll.LoraLens(another(num_hidden_layers=1), t.adapter),
        r"layers\.1\..*1 layers.*nearest.*some/base.*adapter.without"),
    "another family": (lambda t: ll.LoraLens(MAKE(models.hf_model("gpt2")), t.adapter),
        "model.layers.0.*nearest are transformer.h.0.*some/base.*none of its .* modules exists"),
    "Hugging Face model": (lambda t: ll.LoraLens(t.base, t.adapter),
        "LlamaForCausalLM has no hook points; pass a HookedTransformer"),
    "path": (lambda t: ll.LoraLens(t.model, "some/path"), r"a str; .*load_adapter\('some/path'\)"),
    "PeftModel": (lambda t: ll.LoraLens(t.model, t.peft), "a PeftModel.*; .*Adapter.from_peft"),
    "name of the base": (lambda t: ll.LoraLens(t.model, t.adapter, hf_model="some/base"),
        "hf_model is a str; .*from_pretrained"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("make, words", LENSES.values(), ids=LENSES)
def test_lens_that_cannot_be(tiny, make, words):
    with pytest.raises(ll.errors.LensLoraError, match=words):
        make(tiny)


@models.NEEDS_HOOKED_TRANSFORMER
def test_missing_gamma_names_the_norm_and_both_remedies(tiny):
    folded = models.hooked_transformer(tiny.base, **models.PROCESSED)
    words = r"blocks\.0.*input_layernorm.*hf_model=.*from_pretrained_no_processing"
    with pytest.raises(ll.errors.ModelStateError, match=words):
        ll.LoraLens(folded, tiny.adapter)


@pytest.mark.slow
def test_train_mode_with_dropout_names_the_module_and_eval():
    base = models.hf_model("gpt2", dtype=torch.float32)
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("a HookedTransformer has no dropout")
    model = models.bridge(base)
    lens = ll.LoraLens(model, ll.Adapter.from_peft(models.peft_model("gpt2", base)))
    model.train()
    with pytest.raises(ll.errors.ModelStateError, match=r"dropout 0\.1 is active.*model\.eval\(\)"):
        lens.logits("w5")


def half(logits):
    return logits[:, 0].detach()


CALLS = {
    "a group for an axis": (lambda t: ll.first_order(t.lens, PROMPT, R, by="layer"),
        r"by='layer': expected any of .*\.sum\('layer'\) of the result, or group='layer'"),
    "a token for a readout": (lambda t: ll.remainder(t.lens, PROMPT, "w8"), r"ll\.Logit\('w8'\)"),
    "a function": (lambda t: ll.coupling(t.lens, PROMPT, half), r"ll\.Readout\.of\(fn\)"),
    "nothing": (lambda t: ll.null_test(t.lens, PROMPT, None), "None is not a readout: use ll"),
    "no derivative": (lambda t: ll.first_order(t.lens, PROMPT, ll.Readout.of(half)),
        "'half' cuts its derivative.*differentiable"),
    "other shape": (lambda t: ll.first_order(t.lens, PROMPT, ll.Readout.of(lambda f: f)),
        r"gave \(1, 61\) for logits \(1, 61\); expected one number a row"),
    "a float": (lambda t: ll.first_order(t.lens, PROMPT, ll.Logit(1.5)), "the token is 1.5; exp"),
    "no answer": (lambda t: ll.fact_margin(t.lens, PROMPT, None, "w8"), "the answer is None; exp"),
    "same answer": (lambda t: ll.fact_margin(t.lens, PROMPT, "w8", "w8"), "same token.*zero"),
    "no prompt": (lambda t: ll.first_order(t.lens, None, R), "prompts are None; expected a string"),
    "empty prompt": (lambda t: ll.explain(t.lens, "", "w8", "w9"), "the prompt is empty.*one word"),
    "one long of two": (lambda t: ll.first_order(t.lens, ["w5", "w5 " * 40], R),
        r"prompt 1 of 2 .* has 41 tokens, and .* holds 32 \(cfg\.n_ctx\); shorten it"),
    "long with its answer": (lambda t: ll.explain(t.lens, "w5 " * 31, "w8 w9", "w9 w8"),
        "the prompt with its answer has 33 tokens, and .* holds 32"),
    "no such hook point": (lambda t: ll.tangents(t.lens, PROMPT, "nope"), "no hook point 'nope'"),
    "no ranking": (lambda t: ll.faithfulness(t.lens, PROMPT, R, "best"), "'best' ranks nothing"),
    "no strengths": (lambda t: ll.remainder_curve(t.lens, PROMPT, R, scales=[]), "no scales"),
    "one null": (lambda t: ll.explain(t.lens, PROMPT, "w8", "w9", null=1), "null=1; expected 0"),
    "no such file": (lambda t: ll.sweep(t.lens, "no/such.jsonl"), "no/such.jsonl: there is no"),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("call, words", CALLS.values(), ids=CALLS)
def test_argument_that_cannot_be(tiny, call, words):
    with pytest.raises(ll.errors.LensLoraError, match=words):
        call(tiny)


CELL = """import lens_lora as ll

def mine(path):
    return ll.load_adapter(path)

mine("nowhere")
"""


def test_a_notebook_shows_the_callers_lines_and_the_message(capsys):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    shell.run_cell(CELL)
    assert capsys.readouterr().out.splitlines() == [
        '---> 6 mine("nowhere")',
        "---> 4 return ll.load_adapter(path)",
        "",
        "AdapterError: nowhere: no such folder, nor a hub id ('owner/name').",
    ]
    shell.run_cell(CELL.replace("ll.load_adapter(path)", "[][0]"))
    assert "Traceback" in capsys.readouterr().out, "control: any other error has its traceback"


def test_a_notebook_shows_lines_of_a_folder_whose_name_begins_as_the_package():
    package = Path(ll.__file__).parent
    mine = package.with_name(f"{package.name}_notes") / "run.py"
    code = compile("load(path)", str(mine), "exec")
    with pytest.raises(ll.errors.AdapterError) as caught:
        exec(code, {"load": ll.load_adapter, "path": "nowhere"})
    # The first frame is this test's, the second is of the caller's file.
    lines = caught.value._render_traceback_()
    assert [line.split()[1] for line in lines if line.startswith("--->")][1:] == ["1"]


def test_output_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.parquet").mkdir()
    for out, words in [("file/r.parquet", "cannot be written .*another out"),
                       ("folder.parquet", "is a folder; name a file in it")]:  # fmt: skip
        with pytest.raises(ll.errors.SweepError, match=words):
            ll.sweep(tiny.lens, GOOD, out=tmp_path / out, progress=False)


# --- on the command line


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_base(tiny.base, folder / "base")
    for name, base in {"lora": str(folder / "base"), "elsewhere": "some/other"}.items():
        save_naming(tiny.peft, folder / name, base=base)
    (folder / "empty").mkdir()
    pickled = folder / "pickled"
    PeftModel.save_pretrained(tiny.peft, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    write_jsonl(folder / "r.jsonl", GOOD)
    return folder


ANSWERS = ["--doc", "w9", "--pre", "w26"]


def call(command, files, out, *options):
    """A command with what it needs, all but what `options` say; the first may be an adapter."""
    own = {
        "explain": ["--prompt", PROMPT, *ANSWERS, "--report", out / "page.html", "--fast"],
        "demo": ["--prompt", PROMPT, *ANSWERS, "--report", out / "page.html"],
        "sweep": ["--prompts", files / "r.jsonl", "--out", out / "r.parquet"],
        "inspect": [files / "lora", "--model", files / "base"],
    }[command]
    if "--chat" in options:
        own = own[2:]
    has_adapter = command == "inspect" or (options and not str(options[0]).startswith("-"))
    adapter = [] if has_adapter else [files / "lora"]
    return run(cli.app, [command, *map(str, [*own, *adapter, *options])])


COMMANDS = ("explain", "demo", "sweep", "inspect")


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_command_is_quiet(files, tmp_path, command):
    """Progress is silenced, and a warning is not: of answers without a space before them, say."""
    result = call(command, files, tmp_path, "--quiet")
    assert result.exit_code == 0 and result.stdout, result.output
    has_answers = command == "explain"
    lines = plain(result.stderr).splitlines()
    assert len(lines) == has_answers
    assert all(line.startswith("Warning: ") for line in lines)


def test_demo_of_answers_of_several_tokens(files, tmp_path):
    """One of two tokens, against one of three: in nats, on the page as well."""
    several = ["--doc", "w9 w10", "--pre", "w26 w9 w5", "--quiet"]
    result = call("demo", files, tmp_path, *several)
    assert result.exit_code == 0, result.output
    assert "nats" in plain(result.stdout)


REFUSED = {
    "no folder": ("explain", ["{files}/nothing"], "nothing: no such folder"),
    "folder without adapter": ("sweep", ["{files}/empty"], "no adapter_config.json"),
    "pickled": ("demo", ["{files}/pickled"], "pickled weights are not read"),
    "another base": ("sweep", ["--model", "{files}/nothing"], "neither a folder nor a reachable"),
    "long prompt": ("explain", ["--prompt", "w5 " * 40], "40 tokens, and .* holds 32"),
    "empty prompt": ("explain", ["--prompt", ""], "a prompt is empty"),
    "empty prompt of the demo": ("demo", ["--prompt", ""], "a prompt is empty"),
    "no token": ("demo", ["--doc", "zebra"], "'zebra' is not in the vocabulary"),
    "no chat template": ("demo", ["--chat", "w9"], "tokenizer.chat_template is None"),
    "system alone": ("demo", ["--system", "w9"], "--system.*it goes before what --chat says"),
    "no file of prompts": ("explain", ["--prompts", "no.txt"], "'no.txt' does not exist"),
    "other file of prompts": ("explain", ["--prompts", "{files}/base/config.json"],
        r"config.json: expected a file that ends in \.txt, \.jsonl or \.csv"),
    "page in a file": ("explain", ["--report", "{files}/r.jsonl/page.html"], "cannot be made in"),
    "page that is a folder": ("demo", ["--report", "{files}"], "is a directory"),
    "half a device": ("explain", ["--device", "cpu", "--device-map", "auto"],
        "--device cpu and --device-map auto exclude each other"),
    "two kinds of prompt": ("demo", ["--prompt", "w5", "--chat", "w9", "--chat", "w9"],
        "give --prompt or --chat alone"),
    "too much memory": ("sweep", ["--max-memory", "10"], "--max-memory 10 bytes, and a forward"),
    "no such device": ("sweep", ["--device", "gpu"], "'gpu' cannot be used: Expected one of cpu"),
}  # fmt: skip


@pytest.mark.parametrize("command, options, words", REFUSED.values(), ids=REFUSED)
def test_refusal_is_one_message_without_a_traceback(files, tmp_path, command, options, words):
    options = [option.format(files=files) for option in options]
    result = call(command, files, tmp_path, *options, "--quiet")
    assert result.exit_code == 2 and re.search(words, plain(result.stderr)), result.output
    assert "Traceback" not in result.output
    assert result.exception.__class__ is SystemExit


def test_page_that_cannot_be_written_is_found_before_the_model_is_loaded(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "load_model", None)
    page = tmp_path / "page.html"
    monkeypatch.setattr(type(page), "open", _not_permitted)
    for command in ("explain", "demo"):
        result = call(command, files, tmp_path)
        assert result.exit_code == 2
        assert not page.exists()
        assert re.search("--report.* cannot be written", plain(result.stderr))


def test_result_that_cannot_be_written_is_found_before_the_model_is_loaded(
    files, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "load_model", None)
    (tmp_path / "folder.parquet").mkdir()
    for out, words in [
        (files / "r.jsonl" / "r.parquet", "the folder .* cannot be made in .*r.jsonl"),
        (tmp_path / "folder.parquet", "is a directory"),
    ]:
        result = call("sweep", files, tmp_path, "--out", out)
        assert result.exit_code == 2
        assert re.search(f"--out.*{words}", plain(result.stderr))


def test_result_in_folders_to_be_made(files, tmp_path):
    out = tmp_path / "new" / "folder" / "r.parquet"
    assert call("sweep", files, tmp_path, "--out", out, "--limit", 1).exit_code == 0
    assert out.is_file()


def _not_permitted(path, *args, **kwargs):
    raise PermissionError(13, "Permission denied", str(path))


def test_error_of_the_system_is_one_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_model", _not_permitted)
    result = call("sweep", files, tmp_path, "--quiet")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "PermissionError: [Errno 13] Permission denied" in result.stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("command", ["explain", "demo", "sweep"])
def test_base_under_another_name_is_noted(files, tmp_path, command):
    options = [files / "elsewhere", "--model", files / "base"]
    result = call(command, files, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert "the adapter names the base some/other, and this model is" in plain(result.stderr)


def test_base_that_the_adapter_names_is_taken_without_a_note(files, tmp_path):
    result = call("sweep", files, tmp_path)
    assert result.exit_code == 0
    assert "Warning" not in result.stderr
    assert f"Loading {files}/base" in "".join(result.stderr.split("\n"))


def test_sweep_of_something_else_is_refused_before_the_model_is_loaded(
    files, tmp_path, monkeypatch
):
    assert call("sweep", files, tmp_path, "--limit", 1).exit_code == 0
    monkeypatch.setattr(running, "load_model", None)
    for options, words in [(["--analysis", "add_one"], "analyses"), ([""], "adapter")]:
        result = call("sweep", files, tmp_path, *options)
        assert result.exit_code == 2
        assert re.search(f"holds another sweep: {words}.*--no-resume", plain(result.stderr))


@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_command_is_one_line_and_130(files, tmp_path, monkeypatch, command):
    """At the second pass, or at the first update that is measured."""
    passes = []
    plain_run = ll.LoraLens.run

    def interrupted(lens, prompts):
        passes.append(prompts)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return plain_run(lens, prompts)

    def at_once(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(ll.LoraLens, "run", interrupted)
    monkeypatch.setattr("lens_lora.directions.spectra.summarise", at_once)
    result = call(command, files, tmp_path, "--quiet")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert result.exit_code == 130 and len(lines) == 1, result.output
    assert lines[0].startswith("Interrupted.")
    said = dict.fromkeys(("sweep", "explain"), "No prompt was finished")
    assert said.get(command, "") in result.stderr


def test_a_later_process_gives_the_first_one_time_to_tell_of_an_error(monkeypatch, capsys):
    """The launcher ends all processes with the first that ends, and all have the same error."""
    waited: list[float] = []
    monkeypatch.setattr(running.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    running._print_error("no such folder")
    assert waited == []
    assert capsys.readouterr().err == "no such folder\n"
    monkeypatch.setenv("RANK", "1")
    running._print_error("no such folder")
    assert waited == [running._SECONDS_FOR_THE_FIRST]
    assert waited[0] >= 1
    assert capsys.readouterr().err == "process 2: no such folder\n"


@pytest.mark.slow
def test_two_processes_tell_of_an_error_once(files, tmp_path):
    done = two_processes("--prompts", files / "r.jsonl", files / "empty")
    assert done.returncode != 0
    assert done.stderr.count("no adapter_config.json") == 1, done.stderr
