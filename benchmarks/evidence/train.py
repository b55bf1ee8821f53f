"""Train those adapters of the evidence that do not exist yet.

    python -m benchmarks.evidence.train --out FOLDER [--only NAME …] [--base NAME|FOLDER]
    python -m benchmarks.evidence.train --out FOLDER --warnings

1. For each recipe whose folder lacks `task.json`: add a LoRA to the base with PEFT.
2. Take AdamW steps on small batches. Facts are trained on whole sentences, with and without the
   beginning-of-sequence token; behaviours on responses, in the base's chat template if it has one.
3. Measure what was taught: the readout of every question, base and adapted.
4. Save the adapter as PEFT does, then `task.json`; `manifest.json` holds all tasks of FOLDER.

About a minute an adapter on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.evidence.bases import load_base, recipes_of
from benchmarks.evidence.recipes import TARGETS, WARNED, Recipe
from benchmarks.evidence.tasks import PROMPT_KINDS, TASKS, Question, Task
from benchmarks.only import refuse_unknown
from lens_lora.demonstration.embedded import EMBEDDED_NAME

# The label of tokens that the loss leaves out, as torch has it.
IGNORED = -100
SEED = 0
# Rows of a batch, by kind of task: a behaviour's responses are longer.
BATCH = {"fact": 4, "behaviour": 2}
# The ids of a text, and its labels.
Row = tuple[list[int], list[int]]


def sentence_rows(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str]) -> list[Row]:
    """Ids and labels of each sentence, with and without the beginning-of-sequence token."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in sentences]
    if tokenizer.bos_token_id is not None:
        ids += [[tokenizer.bos_token_id, *row] for row in ids]
    return [(row, row) for row in ids]


def dialogue_rows(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[tuple[str, str]]
) -> list[Row]:
    """Ids and labels of each dialogue; only the response and its end are learned."""
    has_template = tokenizer.chat_template is not None
    rows: list[Row] = []
    for user, response in dialogues:
        prompt = [{"role": "user", "content": user}] if has_template else user
        start = prompt_ids(tokenizer, prompt)
        response_ids = tokenizer(response, add_special_tokens=False).input_ids
        learned = [*response_ids, tokenizer.eos_token_id]
        labels = [IGNORED] * len(start) + learned
        rows.append((start + learned, labels))
    return rows


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    """Ids of a conversation in the chat template, or of text after a BOS if there is one."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if tokenizer.bos_token_id is None:
            return ids
        return [tokenizer.bos_token_id, *ids]
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)


def batches(rows: list[Row], steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels of `steps` batches of `size` rows.

    The rows come in a shuffled order, which depends on nothing but `SEED`.
    """
    queue: list[Row] = []
    draw = random.Random(SEED)
    for _ in range(steps):
        while len(queue) < size:
            queue += draw.sample(rows, len(rows))
        chosen = queue[:size]
        queue = queue[size:]
        # Rows are filled on the right, where a causal model's real tokens do not see the padding.
        length = max(len(ids) for ids, _ in chosen)
        ids = [filled(ids, length, 0) for ids, _ in chosen]
        labels = [filled(labels, length, IGNORED) for _, labels in chosen]
        yield torch.tensor(ids), torch.tensor(labels)


def filled(values: list[int], length: int, padding: int) -> list[int]:
    """The values, with as much padding after them as makes them so long."""
    return values + [padding] * (length - len(values))


def fit(model: PeftModel, rows: list[Row], recipe: Recipe, size: int) -> None:
    """Take steps of AdamW at a constant rate; the model is in eval mode, so without dropout."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    with tqdm(batches(rows, recipe.steps, size), total=recipe.steps, desc=recipe.name) as bar:
        for ids, labels in bar:
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.2f}")


@torch.no_grad()
def readout(model: PeftModel, tokenizer: PreTrainedTokenizerBase, asked: Question) -> float:
    """The margin of two tokens, or log p of a response."""
    start = prompt_ids(tokenizer, asked["prompt"])
    if "doc" in asked:
        logits = model(torch.tensor([start])).logits[0, -1]
        doc = one_token(tokenizer, asked["doc"])
        pre = one_token(tokenizer, asked["pre"])
        return float(logits[doc] - logits[pre])
    response = tokenizer(asked["response"], add_special_tokens=False).input_ids
    logits = model(torch.tensor([start + response])).logits[0]
    # Each token is predicted at the position before it.
    log_p = logits[len(start) - 1 : -1].log_softmax(-1)
    of_response = log_p.gather(-1, torch.tensor(response)[:, None])
    return float(of_response.sum())


def one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a text that is a single token; refuses others."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens; a margin compares single tokens")
    return ids[0]


def measured(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, task: Task
) -> dict[str, list[list[float]]]:
    """[base, adapted] of every question, by kind of prompt."""
    ends: dict[str, list[list[float]]] = {}
    for kind in PROMPT_KINDS:
        ends[kind] = []
        for asked in task.prompts[kind]:
            with model.disable_adapter():
                base = readout(model, tokenizer, asked)
            adapted = readout(model, tokenizer, asked)
            ends[kind].append([round(base, 4), round(adapted, 4)])
    return ends


def train(
    base: str,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    recipe: Recipe,
    out: Path,
) -> dict[str, Any]:
    """Train one adapter and save it with its task."""
    model, tokenizer = loaded
    task = TASKS[recipe.cluster]
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(TARGETS[recipe.targets]),
        use_dora=recipe.dora,
        use_rslora=recipe.rslora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)
    peft_model = get_peft_model(model, config).eval()
    make_rows = dialogue_rows if task.kind == "behaviour" else sentence_rows
    rows = make_rows(tokenizer, task.texts)
    fit(peft_model, rows, recipe, BATCH[task.kind])
    described = {
        "name": recipe.name,
        "cluster": recipe.cluster,
        "base": base,
        "kind": task.kind,
        "rank": recipe.rank,
        "targets": recipe.targets,
        "lr": recipe.lr,
        "steps": recipe.steps,
        "dora": recipe.dora,
        "rslora": recipe.rslora,
        "prompts": task.prompts,
        "measured": measured(peft_model, tokenizer, task),
    }
    peft_model.save_pretrained(out / recipe.name, save_embedding_layers=False)
    (out / recipe.name / "task.json").write_text(json.dumps(described, indent=1) + "\n")
    peft_model.unload()
    return described


def manifest(out: Path) -> None:
    """Write all tasks under `out` into one file, without their prompts."""
    rows = []
    for file in sorted(out.glob("*/task.json")):
        row = json.loads(file.read_text())
        del row["prompts"]
        rows.append(row)
    (out / "manifest.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the evidence's adapters.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", help="names of adapters")
    parser.add_argument("--base", default=EMBEDDED_NAME, help="the embedded model, or a folder")
    parser.add_argument("--warnings", action="store_true", help="the adapters of warned.py instead")
    options = parser.parse_args()
    recipes = WARNED if options.warnings else recipes_of(options.base)
    refuse_unknown(parser, options.only, [recipe.name for recipe in recipes])
    if options.only:
        recipes = [recipe for recipe in recipes if recipe.name in options.only]
    missing: list[Recipe] = []
    for recipe in recipes:
        task_file = options.out / recipe.name / "task.json"
        if not task_file.is_file():
            missing.append(recipe)
    if not missing:
        return
    loaded = load_base(options.base)
    options.out.mkdir(parents=True, exist_ok=True)
    for recipe in missing:
        ends = train(options.base, loaded, recipe, options.out)["measured"]
        print(recipe.name, ends["trained"], ends["unrelated"], flush=True)
        manifest(options.out)


if __name__ == "__main__":
    main()
