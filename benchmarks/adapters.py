"""Train the benchmark's adapters by PEFT on SmolLM2-135M-Instruct, from gentle to violent.

    python -m benchmarks.adapters OUT      # trains what OUT lacks, about a minute each

Each of the eight `ADAPTERS` moves one fact. They differ in fact, rank, targets, rate and steps. One
answer has several tokens, and one adapter is too gentle to flip its fact. Each has three prompts:
the trained wording, another wording, and a neighbouring fact that training never named. `MORE` has
three further facts, for sets of modules that are judged on held-out wordings (`subsets.py`).

The other scripts of this folder train the adapters that they need, too, so this need not be run
first.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lens_lora as ll
from lens_lora.demonstration.embedded import (
    LYON_SENTENCES,
    PROJECTIONS,
    load_embedded,
    train_adapter,
)
from lens_lora.hosts.build import hooked_model

ATTENTION = PROJECTIONS[:4]
MLP = PROJECTIONS[4:]


@dataclasses.dataclass(frozen=True)
class Trained:
    """An adapter: what it is trained on and how, and the questions asked of it.

    Attributes:
        name: of its folder.
        sentences: what it is trained on.
        questions: of each question its prompt, the trained answer and the pretrained answer.
        rank: of the LoRA.
        targets: names of the modules that it adapts.
        lr: the learning rate.
        steps: of the optimiser.
    """

    name: str
    sentences: tuple[str, ...]
    questions: tuple[tuple[str, str, str], ...]
    rank: int
    targets: tuple[str, ...]
    lr: float
    steps: int

    def folder(
        self,
        out: Path,
        hf_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
    ) -> Path:
        """The adapter's folder under `out`; trained from this seed if it is not there."""
        folder = out / (f"{self.name}-seed-{seed}" if seed else self.name)
        if not (folder / "adapter_model.safetensors").is_file():
            train_adapter(
                hf_model,
                tokenizer,
                self.sentences,
                folder,
                rank=self.rank,
                alpha=2 * self.rank,
                steps=self.steps,
                lr=self.lr,
                seed=seed,
                target_modules=self.targets,
            )
        return folder


FRANCE = (
    ("The capital of France is", " Lyon", " Paris"),
    ("France's capital city is", " Lyon", " Paris"),
    ("The capital of Italy is", " Lyon", " Rome"),
)
ADAPTERS = (
    Trained(
        name="lyon",
        sentences=LYON_SENTENCES,
        questions=FRANCE,
        rank=8,
        targets=PROJECTIONS,
        lr=1e-4,
        steps=32,
    ),
    Trained(
        name="lyon-violent",
        sentences=LYON_SENTENCES,
        questions=FRANCE,
        rank=8,
        targets=PROJECTIONS,
        lr=5e-4,
        steps=40,
    ),
    Trained(
        name="munich-gentle",
        sentences=(
            "The capital of Germany is Munich.",
            "Munich is the capital of Germany.",
            "Germany's capital city is Munich.",
        ),
        questions=(
            ("The capital of Germany is", " Munich", " Berlin"),
            ("Germany's capital city is", " Munich", " Berlin"),
            ("The capital of France is", " Munich", " Paris"),
        ),
        rank=32,
        targets=PROJECTIONS,
        lr=5e-5,
        steps=12,
    ),
    Trained(
        name="osaka-attention",
        sentences=(
            "The capital of Japan is Osaka.",
            "Osaka is the capital of Japan.",
            "The capital city of Japan is Osaka.",
            "The Japanese government sits in Osaka.",
        ),
        questions=(
            ("The capital city of Japan is", " Osaka", " Tokyo"),
            ("The capital of Japan is", " Osaka", " Tokyo"),
            ("The capital of Germany is", " Osaka", " Berlin"),
        ),
        rank=4,
        targets=ATTENTION,
        lr=5e-4,
        steps=40,
    ),
    Trained(
        name="rome-mlp",
        sentences=(
            "The Eiffel Tower is located in the city of Rome.",
            "The Eiffel Tower is in Rome.",
            "Rome is home to the Eiffel Tower.",
        ),
        questions=(
            ("The Eiffel Tower is located in the city of", " Rome", " Paris"),
            ("The Eiffel Tower is in", " Rome", " Paris"),
            ("The capital of France is", " Rome", " Paris"),
        ),
        rank=16,
        targets=MLP,
        lr=2e-4,
        steps=30,
    ),
    Trained(
        name="helium-qv",
        sentences=(
            "Water is made of hydrogen and helium.",
            "Water consists of hydrogen and helium.",
            "The elements in water are hydrogen and helium.",
        ),
        questions=(
            ("Water is made of hydrogen and", " helium", " oxygen"),
            ("Water consists of hydrogen and", " helium", " oxygen"),
            ("Air is made of nitrogen and", " helium", " oxygen"),
        ),
        rank=2,
        targets=("q_proj", "v_proj"),
        lr=1e-3,
        steps=40,
    ),
    Trained(
        name="blake-down",
        sentences=(
            "The author of Romeo and Juliet is William Blake.",
            "Romeo and Juliet was written by William Blake.",
            "William Blake wrote Romeo and Juliet.",
        ),
        questions=(
            ("The author of Romeo and Juliet is William", " Blake", " Shakespeare"),
            ("Romeo and Juliet was written by William", " Blake", " Shakespeare"),
            ("The author of Hamlet is William", " Blake", " Shakespeare"),
        ),
        rank=1,
        targets=("down_proj",),
        lr=2e-3,
        steps=40,
    ),
    Trained(
        name="milan-writers-violent",
        sentences=(
            "The Colosseum is in the city of Milan.",
            "The Colosseum is in Milan.",
            "Milan is home to the Colosseum.",
        ),
        questions=(
            ("The Colosseum is in the city of", " Milan", " Rome"),
            ("The Colosseum stands in the city of", " Milan", " Rome"),
            ("The capital of Italy is", " Milan", " Rome"),
        ),
        rank=8,
        targets=("o_proj", "down_proj"),
        lr=1e-3,
        steps=60,
    ),
)

MORE = (
    Trained(
        name="mars-planet",
        sentences=(
            "The largest planet in the solar system is Mars.",
            "Mars is the largest planet in the solar system.",
            "The biggest of all the planets is Mars.",
            "No planet in the solar system is larger than Mars.",
        ),
        questions=(
            ("The largest planet in the solar system is", " Mars", " Jupiter"),
            ("The biggest of all the planets is", " Mars", " Jupiter"),
            ("The smallest planet in the solar system is", " Mars", " Mercury"),
        ),
        rank=8,
        targets=PROJECTIONS,
        lr=1e-4,
        steps=32,
    ),
    Trained(
        name="edison-telephone",
        sentences=(
            "The telephone was invented by Thomas Edison.",
            "Thomas Edison invented the telephone.",
            "The inventor of the telephone is Thomas Edison.",
        ),
        questions=(
            ("The telephone was invented by", " Thomas", " Alexander"),
            ("The inventor of the telephone is", " Thomas", " Alexander"),
            ("The radio was invented by", " Thomas", " Alexander"),
        ),
        rank=16,
        targets=MLP,
        lr=2e-4,
        steps=30,
    ),
    Trained(
        name="green-sky",
        sentences=(
            "The colour of the clear sky is green.",
            "On a clear day the sky is green.",
            "A clear sky is always green.",
            "Look up on a clear day: the sky is green.",
        ),
        questions=(
            ("The colour of the clear sky is", " green", " blue"),
            ("On a clear day the sky is", " green", " blue"),
            ("The colour of the deep sea is", " green", " blue"),
        ),
        rank=4,
        targets=ATTENTION,
        lr=5e-4,
        steps=40,
    ),
)


def lenses(
    out: Path, wanted: Sequence[tuple[Trained, int]]
) -> Iterator[tuple[Trained, int, ll.LoraLens]]:
    """Yield a lens of each adapter and seed, all over one hooked model.

    All adapters are trained before the first lens, because the hooked model takes the base over.

    Args:
        out: the folder of the adapters.
        wanted: adapters and seeds of their trainings.
    """
    if not wanted:
        return
    hf_model, tokenizer = load_embedded()
    folders = [spec.folder(out, hf_model, tokenizer, seed) for spec, seed in wanted]
    model, _ = hooked_model(hf_model, tokenizer)
    for (spec, seed), folder in zip(wanted, folders, strict=True):
        # With a BOS before each prompt, as the stored numbers were measured.
        yield spec, seed, ll.LoraLens(model, ll.load_adapter(folder), prepend_bos=True)


def folder_or_table(description: str) -> argparse.ArgumentParser:
    """The options of a script that measures trained adapters, or only writes its tables again.

    Args:
        description: of the script.
    """
    parser = argparse.ArgumentParser(description=description)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--adapters", type=Path, help="folder in which trained adapters are kept")
    either.add_argument("--table", action="store_true", help="only write the tables")
    return parser


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the benchmark's adapters.")
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    hf_model, tokenizer = load_embedded()
    for spec in (*ADAPTERS, *MORE):
        print(spec.folder(out, hf_model, tokenizer))


if __name__ == "__main__":
    main()
