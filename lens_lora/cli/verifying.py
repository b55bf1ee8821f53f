"""`lens-lora verify`: did this adapter ship as it was trained?"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lens_lora.cli import files, options, running
from lens_lora.cli.beside_base import LensMade, read_given, training_tokenizer
from lens_lora.cli.expecting import prompts_of, read_expectations
from lens_lora.errors import (
    LensLoraError,
    heard_by,
)

if TYPE_CHECKING:
    from lens_lora.core import Adapter, LoraLens
    from lens_lora.ship.checks import Check
    from lens_lora.ship.served import ServedVerification
    from lens_lora.ship.verify import Verification

_to_write = functools.partial(typer.Option, dir_okay=False)

_EXPECT = "A .jsonl file: prompt (or messages), doc, pre, and flips or margin_at_least."
_SERVED = "A server that is to answer as the adapter does. Its log-probabilities are asked for."
_CARD = "A README.md with a card, or its JSON (lens-lora card): each of its lines is to hold."
_TEXTS = "Texts to ask the server for: one a line, or .jsonl with prompt or messages."
ServedDtype = Literal["float32", "float16", "bfloat16", "int8"]
# Adapters beside this one that a server may have in its place.
_CHECKPOINTS = "checkpoint-*"
_MOST_OTHERS = 8
_LABELS = {"--json": "JSON", "--junit": "JUnit", "--report": "Report"}


@options.with_options
def verify(
    adapter: Annotated[
        str | None,
        typer.Argument(
            metavar="ADAPTER", help=f"{options.ADAPTER} Default with --card: the card's folder."
        ),
    ] = None,
    *,
    card: Annotated[Path | None, options.input_file(_CARD)] = None,
    merged: Annotated[
        Path | None,
        typer.Option(exists=True, help="A folder or a .gguf file, to be base plus adapter."),
    ] = None,
    lora: Annotated[Path | None, options.input_file("A .gguf file, to be the adapter.")] = None,
    expect: Annotated[Path | None, options.input_file(_EXPECT)] = None,
    max_kl: Annotated[
        float | None, options.least(0, "Nats per token allowed on neutral texts.")
    ] = None,
    served: Annotated[str | None, typer.Option(metavar="URL", help=_SERVED)] = None,
    name: Annotated[
        str | None, typer.Option(help="The name by which the server knows the adapter.")
    ] = None,
    texts: Annotated[Path | None, options.input_file(_TEXTS)] = None,
    served_dtype: Annotated[
        ServedDtype, typer.Option(help="The dtype in which the server computes.")
    ] = "bfloat16",
    json_file: Annotated[Path | None, _to_write("--json", help="The checks as JSON.")] = None,
    junit: Annotated[Path | None, _to_write(help="The checks as JUnit's XML.")] = None,
    report: Annotated[Path | None, _to_write(help="HTML page to write.")] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Did this adapter ship as trained? Exit 0 passed, 1 failed, 2 unreadable, 3 undecided.

    lens-lora verify path/to/adapter --merged path/to/merged --expect facts.jsonl

    lens-lora verify path/to/adapter --served http://127.0.0.1:8000 --name my-adapter

    lens-lora verify --card path/to/adapter/README.md
    """
    if adapter is None:
        if card is None:
            raise typer.BadParameter("name one, or a --card.", param_hint="ADAPTER")
        adapter = str(card.parent)
    outputs = files.writable({"--json": json_file, "--junit": junit, "--report": report})
    expectations = [] if expect is None else read_expectations(expect)
    own_texts = [] if texts is None else prompts_of(texts)
    folder = files.folder_of(adapter, within, quiet=quiet)
    read = [card, expect, texts, lora, *_files_of(merged)]
    files.require_apart(outputs, base, [folder], *read)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.ship.expectations import Expectation
        from lens_lora.ship.page import explanations_table, verification_table
        from lens_lora.ship.verify import verify as verification_of

        base = base.placed("cpu")
        given = read_given(folder, base, progress)
        written = None
        if card is not None:
            from lens_lora.cli.written_card import WrittenCard

            written = WrittenCard.of(card, folder)
            merged = written.path_of("merged", merged)
            lora = written.path_of("lora", lora)
            expect_of_card = written.path_of("expect", expect)
            if expect_of_card is not None:
                expectations = read_expectations(expect_of_card)
            max_kl = written.bound_of_kl(max_kl)
        lens_over = LensMade(base, given, progress)
        question = None
        if served is not None:
            question = _Question(
                served, name, own_texts, served_dtype, _others_beside(folder), quiet=quiet
            )
        with running.quiet_libraries():
            verification = verification_of(
                given.adapter,
                given.why_no_base if given.loaded is None else given.loaded[0],
                lens_over,
                merged=merged,
                lora=lora,
                tokenizer=training_tokenizer(given),
                expectations=[Expectation(*row) for row in expectations],
                max_kl=max_kl,
                notes=given.notes,
                ask_server=question,
                progress=not quiet,
            )
        if written is not None:
            verification = written.checked(verification, given, lens_over.lens, base)
        answered = None if question is None else question.answered
        _write(verification, answered, outputs)
        console = running.tell(verification.story())
        console.print(verification_table(verification if written is None else written.brief))
        if answered is not None:
            console.print(explanations_table(answered))
        for option, path in outputs.items():
            running.say(f"{_LABELS[option]}: {path.absolute()}")
    raise typer.Exit(verification.exit_code)


def _files_of(merged: Path | None) -> list[Path]:
    """The files of a merged folder, or the one file."""
    if merged is None:
        return []
    return [merged] if merged.is_file() else list(merged.iterdir())


class _Question:
    """Asks a server, over the lens that the checks have made.

    Attributes:
        answered: what the server answered; None before it was asked.
    """

    def __init__(
        self,
        url: str,
        name: str | None,
        texts: list[Any],
        dtype: ServedDtype,
        others: list[Adapter],
        *,
        quiet: bool,
    ) -> None:
        self.answered: ServedVerification | None = None
        self._url = url
        self._options: dict[str, Any] = {
            "name": name,
            "texts": texts,
            "dtype": dtype,
            "others": others,
            "progress": not quiet,
        }

    def __call__(self, lens: LoraLens) -> tuple[Check, ...]:
        from lens_lora.ship.served import verify_served

        running.say(f"Server:  {self._url} is asked for log-probabilities, once for each text")
        self.answered = verify_served(lens, self._url, **self._options)
        return self.answered.checks


def _others_beside(folder: Path) -> list[Adapter]:
    """Other checkpoints of the same run, which a server may have in the adapter's place."""
    from lens_lora.core import load_adapter

    others: list[Adapter] = []
    for place in sorted(folder.parent.glob(_CHECKPOINTS)):
        if place.samefile(folder) or not place.is_dir():
            continue
        # One that cannot be read is not what is verified.
        with contextlib.suppress(LensLoraError), heard_by(lambda _: None):
            others.append(load_adapter(place))
    return others[-_MOST_OTHERS:]


def _write(
    verification: Verification, served: ServedVerification | None, outputs: dict[str, Path]
) -> None:
    from lens_lora.ship.files import as_json, as_junit

    if "--json" in outputs:
        outputs["--json"].write_text(as_json(verification, served), encoding="utf-8")
    if "--junit" in outputs:
        tree = as_junit(verification)
        tree.write(outputs["--junit"], encoding="utf-8", xml_declaration=True)
    if "--report" in outputs:
        verification.save_report(outputs["--report"])
