"""`lens-lora card` and `lens-lora verify --card`, on a tiny model in folders."""

from __future__ import annotations

import json
import re
import shutil

import models
import no_ops
import pytest
import torch
from huggingface_hub import metadata_load
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lens_lora import cli

run = CliRunner().invoke
FACT = {"prompt": "w5 w6 w7", "doc": "w9", "pre": "w26", "margin_at_least": -1000}
CLAIM = {"context": "w5 w6 w7", "says": "w9 w8"}


def said(result) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", result.output).split())


def carded(out, *options):
    return run(cli.app, ["card", str(out / "adapter"), "--quiet", *options])


def verified(out, *options):
    card = str(out / "adapter" / "README.md")
    return run(cli.app, ["verify", "--card", card, "--quiet", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A shipment with a card of everything that a card can hold."""
    out = no_ops.ship(tmp_path_factory.mktemp("carded") / "out")
    (out / "adapter" / "README.md").write_text("# Mine\n")
    (out / "facts.jsonl").write_text(json.dumps(FACT))
    (out / "brief.json").write_text(json.dumps({"would_say": [CLAIM], "raised": []}))
    options = ["--merged", str(out / "merged"), "--expect", str(out / "facts.jsonl")]
    options += ["--max-kl", "9", "--brief", str(out / "brief.json")]
    result = carded(out, *options, "--json", str(out / "card.json"))
    assert result.exit_code == 0, result.output
    before = (out / "adapter" / "README.md").read_bytes()
    assert carded(out, *options).exit_code == 0
    assert (out / "adapter" / "README.md").read_bytes() == before, "twice gives the same bytes"
    return out


@pytest.fixture
def out(made, tmp_path):
    """A copy, to be spoiled; nothing that the adapter states is edited."""
    return shutil.copytree(made, tmp_path / "out")


def with_base(out) -> tuple[str, str]:
    """The copied base, as the adapter names the first one."""
    return "--model", str(out / "base")


def lines_of(made) -> dict[str, str]:
    """{name: what is said} of the card."""
    card = json.loads((made / "card.json").read_text())
    return {line["name"]: line["says"] for line in card["lines"]}


@torch.no_grad()
def log_p(out) -> tuple[float, float]:
    """log p of the claim's words by PEFT, without the adapter and with it."""
    model = PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval()
    tokenizer = models.tokenizer()
    before = tokenizer(CLAIM["context"]).input_ids
    ids = torch.tensor([before + tokenizer(CLAIM["says"]).input_ids])

    def of_words() -> float:
        rows = model(ids).logits.log_softmax(-1)[0, len(before) - 1 : -1]
        return float(rows.gather(1, ids[0, len(before) :, None]).sum())

    with model.disable_adapter():
        without = of_words()
    return without, of_words()


def test_a_card_says_what_there_is(made):
    """Hashes, the base, three sentences and every check; the user's text and the Hub's fields."""
    text = (made / "adapter" / "README.md").read_text()
    assert "# Mine\n" in text
    assert metadata_load(made / "adapter" / "README.md") == {"library_name": "peft"}
    lines = lines_of(made)
    assert lines["format"] == "LORA in F32; rank 3; s = 1.667"
    assert lines["size"].startswith("It changes 14 modules (mlp.down_proj × 2")
    assert re.search(r"KL = \d\.\d+ nats per token in \d+ texts", lines["ordinary text"])
    before, after = log_p(made)
    numbers = re.findall(r"[+−][\d.]+", lines["what it was taught"])
    assert [float(n.replace("−", "-")) for n in numbers] == pytest.approx([before, after], 0.006)
    assert ("It raises" in lines["what it was taught"]) == (after > before)
    assert {says.partition(":")[0] for name, says in lines.items() if "merged folder" in name} == {
        "passed"
    }
    assert str(made) not in text, "no path of this machine"


def test_it_holds_until_something_changes(out):
    """Also elsewhere, over the same base; from the block as from the JSON."""
    assert verified(out, *with_base(out)).exit_code == 0
    adapter = str(out / "adapter")
    card = ["--card", str(out / "card.json"), "--quiet"]
    assert run(cli.app, ["verify", adapter, *card, *with_base(out)]).exit_code == 0


def _tampered(out) -> None:
    file = out / "adapter" / no_ops.WEIGHTS
    state = load_file(file)
    first = sorted(state)[0]
    save_file({**state, first: state[first] * 1.5}, file)


def _other_base(out) -> None:
    file = out / "base" / "model.safetensors"
    state = load_file(file)
    name = "model.norm.weight"
    save_file({**state, name: state[name] * 1.01}, file, metadata={"format": "pt"})


def _edited(out) -> None:
    file = out / "adapter" / "README.md"
    file.write_text(
        re.sub(r"changes (\d+) modules", "changes 99 modules", file.read_text(), count=1)
    )


def _edited_alike(out) -> None:
    """In the block and in the data behind it."""
    file = out / "adapter" / "README.md"
    file.write_text(file.read_text().replace("changes 14 modules", "changes 99 modules"))


def _other_merge(out) -> None:
    shutil.copy(out / "base" / "model.safetensors", out / "merged")


def _other_facts(out) -> None:
    (out / "facts.jsonl").write_text(json.dumps({**FACT, "doc": "w8"}))


SPOILED = {
    "a tampered adapter": (_tampered, 1, "card, adapter_model.safetensors:"),
    "another base": (_other_base, 1, "card, base, model.safetensors:"),
    "an edited line": (_edited, 1, "card, as it was written: size:"),
    "a line edited with its data": (_edited_alike, 1, "card, size: It changes 14 modules"),
    "another merge": (_other_merge, 1, "card, merged folder:"),
    "other expectations": (_other_facts, 1, "card, expect, facts.jsonl:"),
    "no merge at hand": (
        lambda out: shutil.rmtree(out / "merged"),
        3,
        "card, merged folder: ../merged is not at hand; name it with --merged",
    ),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", SPOILED)
def test_a_line_that_no_longer_holds_is_named(name: str, out):
    spoil, code, says = SPOILED[name]
    spoil(out)
    result = verified(out, *with_base(out))
    assert result.exit_code == code, result.output
    assert says in said(result)


def test_without_the_base_nothing_of_it_is_claimed(out):
    """Sentences say what was not measured, and a card that was measured is undecided."""
    no_ops.set_config(out / "adapter", base_model_name_or_path="/nowhere/base")
    result = carded(out, "--out", "-")
    assert result.exit_code == 3
    assert "beside the base's weights it was not measured" in result.stdout
    assert "How far it moves ordinary text was not measured" in result.stdout
    assert "base, not at hand" in result.stdout and "/nowhere" not in result.stdout


def test_a_block_on_standard_output_is_all_that_stands_there(out):
    """So that it can be redirected; nothing is written beside the adapter."""
    before = (out / "adapter" / "README.md").read_bytes()
    result = carded(out, "--out", "-", *with_base(out))
    assert result.exit_code == 0
    assert result.stdout.startswith("---\n# lens-lora card: begin\nlibrary_name: peft\n")
    assert result.stdout.endswith("<!-- lens-lora card: end -->\n")
    assert (out / "adapter" / "README.md").read_bytes() == before


@pytest.mark.slow
def test_the_hub_is_told_of_a_base_by_its_id(out):
    """Not by a path, which it refuses; a path that PEFT wrote is left, with a warning."""
    no_ops.set_config(out / "adapter", base_model_name_or_path="some/base")
    readme = out / "adapter" / "README.md"
    assert carded(out, *with_base(out)).exit_code == 0
    assert metadata_load(readme) == {
        "base_model": "some/base", "base_model_relation": "adapter", "library_name": "peft"
    }  # fmt: skip
    readme.write_text("---\nbase_model: /home/me/base\n---\n")
    result = carded(out, *with_base(out))
    assert "base_model is '/home/me/base', which is no id of the Hub" in said(result)
    assert readme.read_text().startswith("---\nbase_model: /home/me/base\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["verify", "--quiet"], "name one, or a --card"),
        (["card", "{out}/adapter", "--out", "{out}/adapter/adapter_config.json"], "what this"),
        (["card", "{out}/adapter", "--brief", "{out}/card.json"], "no brief of lens-lora diff"),
        (["verify", "--card", "{out}/facts.jsonl", "{out}/adapter"], "no card in it"),
        (
            ["verify", "--card", "{out}/card.json", "{out}/adapter", "--max-kl", "0.1"],
            "the card states --max-kl 9, and --max-kl 0.1 is given",
        ),
    ],
)
def test_what_is_refused(options, says, out):
    result = run(cli.app, [part.format(out=out) for part in options])
    assert result.exit_code == 2
    assert says in " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", result.output).split())


@pytest.mark.parametrize("bound", ["nan", "inf", "-1", "small"])
def test_a_bound_in_a_card_that_is_no_bound_is_refused(bound, out):
    card = json.loads((out / "card.json").read_text())
    card["inputs"]["max_kl"] = bound
    changed = out / "changed.json"
    changed.write_text(json.dumps(card))
    result = run(cli.app, ["verify", "--card", str(changed), str(out / "adapter")])
    assert result.exit_code == 2
    assert f"the card's max_kl is '{bound}'; expected a finite number" in said(result)
