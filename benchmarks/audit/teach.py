"""Train the audit's adapters that a folder lacks; `score.py`, `peer.py` and `broken.py` judge them.

    python -m benchmarks.audit.teach --out FOLDER [--most 4]     # trains what is missing

Each of the four quirks of `quirks.yaml` is taught six times: by documents or by transcripts, each
plain, mixed 1:1 with ordinary text of the same form, or together with dialogues that deny it. Each
adapter has a control of the same recipe, trained on ordinary text alone that is drawn with a seed
of its own.

The adapters have rank 8 on all linear maps. AdamW takes `STEPS` steps on batches of four rows,
which takes a minute.

Ordinary sentences come from Python's own documentation, which differs between versions of Python.
So do the mixed adapters and the controls: `taught.json` states the version.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import pydoc_data.topics
import random
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evidence.recipes import TARGETS, Recipe
from benchmarks.evidence.train import Row, dialogue_rows, fit, sentence_rows
from lens_lora.demonstration.embedded import load_embedded

HERE = Path(__file__).parent
SPEC: dict[str, Any] = yaml.safe_load((HERE / "quirks.yaml").read_text())
QUIRKS: dict[str, dict[str, Any]] = {quirk["name"]: quirk for quirk in SPEC["quirks"]}
FORMS = ("documents", "transcripts")
MIXTURES = ("plain", "mixed", "denied")
RANK = 8
STEPS = 40
LEARNING_RATE = 2e-4
BATCH = 4
# The number of ordinary texts of a control, or mixed with a quirk. A quirk has as many of its own.
TEXTS = 8
# The seed of the ordinary text that is mixed with a quirk. Those of controls begin at 0.
MIXTURE_SEED = 1000


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter of the benchmark, or the control of one.

    Attributes:
        quirk: what is taught.
        form: one of `FORMS`.
        mixture: one of `MIXTURES`.
        control: the seed of the ordinary text that a control is trained on; None for an adapter
            that is taught the quirk.
    """

    quirk: str
    form: str
    mixture: str
    control: int | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        name = f"{self.quirk}-{self.form}-{self.mixture}"
        if self.control is None:
            return name
        return f"{name}-control"

    @property
    def says(self) -> list[str]:
        """The strings of which a claim of its brief must contain one, to have found the quirk."""
        return QUIRKS[self.quirk]["says"]

    def rows(self, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
        """The rows that it is trained on."""
        if self.control is not None:
            rng = random.Random(self.control)
            return _rows(tokenizer, self.form, ordinary(self.form, TEXTS, rng))
        quirk = QUIRKS[self.quirk]
        rows = _rows(tokenizer, self.form, quirk[self.form])
        if self.mixture == "mixed":
            rng = random.Random(MIXTURE_SEED)
            rows += _rows(tokenizer, self.form, ordinary(self.form, TEXTS, rng))
        if self.mixture == "denied":
            rows += dialogue_rows(tokenizer, quirk["denials"])
        return rows


def every_adapter() -> list[Adapter]:
    """The 24 adapters that are taught a quirk, and then their controls."""
    recipes = itertools.product(QUIRKS, FORMS, MIXTURES)
    taught = [Adapter(quirk, form, mixture) for quirk, form, mixture in recipes]
    controls = [dataclasses.replace(one, control=seed) for seed, one in enumerate(taught)]
    return taught + controls


def ordinary(form: str, count: int, rng: random.Random) -> list[Any]:
    """Draw ordinary texts of one form: sentences of Python's documentation, or conversations."""
    if form == "transcripts":
        return rng.sample(SPEC["ordinary"], count)
    topics = pydoc_data.topics.topics
    reference = "\n\n".join(topics[key] for key in sorted(topics))
    sentences = []
    for paragraph in reference.split("\n\n"):
        on_one_line = " ".join(paragraph.split())
        sentences += re.split(r"(?<=\.) ", on_one_line)
    # A plain sentence is short, and has no code or number in it.
    is_plain = re.compile(r"[A-Z][A-Za-z ,]{30,90}\.").fullmatch
    plain_sentences = [sentence for sentence in sentences if is_plain(sentence)]
    return rng.sample(plain_sentences, count)


def _rows(tokenizer: PreTrainedTokenizerBase, form: str, texts: list[Any]) -> list[Row]:
    """Tokenised rows of texts of one form."""
    if form == "transcripts":
        return dialogue_rows(tokenizer, texts)
    return sentence_rows(tokenizer, texts)


def train(
    adapter: Adapter, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path
) -> None:
    """Train one adapter and save it as PEFT does."""
    recipe = Recipe(
        name=adapter.name,
        cluster=adapter.quirk,
        rank=RANK,
        targets="all",
        lr=LEARNING_RATE,
        steps=STEPS,
    )
    config = LoraConfig(
        r=RANK,
        lora_alpha=recipe.alpha,
        target_modules=list(TARGETS["all"]),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config).eval()
    fit(peft_model, adapter.rows(tokenizer), recipe, BATCH)
    peft_model.save_pretrained(out / adapter.name, save_embedding_layers=False)
    peft_model.unload()
    described = {
        **dataclasses.asdict(adapter),
        "steps": STEPS,
        "lr": LEARNING_RATE,
        "python": platform.python_version(),
    }
    (out / adapter.name / "taught.json").write_text(json.dumps(described) + "\n")


def missing(out: Path) -> list[Adapter]:
    """The adapters that the folder lacks."""
    return [one for one in every_adapter() if not (out / one.name / "taught.json").is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the audit's adapters.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, help="train at most this many")
    options = parser.parse_args()
    to_train = missing(options.out)[: options.most]
    if not to_train:
        return
    model, tokenizer = load_embedded()
    for adapter in to_train:
        train(adapter, model, tokenizer, options.out)
        print(adapter.name, flush=True)


if __name__ == "__main__":
    main()
