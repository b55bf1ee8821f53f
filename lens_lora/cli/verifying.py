"""`lens-lora verify`: did this adapter ship as it was trained?"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from lens_lora.cli import files, options, running
from lens_lora.cli.beside_base import Inputs, LensMade, read_given, verification_of
from lens_lora.cli.expecting import prompts_of, read_expectations
from lens_lora.cli.forecast import Work
from lens_lora.errors import LensLoraError, heard_by
from lens_lora.ship.server import Server

if TYPE_CHECKING:
    from lens_lora.cli.written_card import WrittenCard
    from lens_lora.core import Adapter, LoraLens
    from lens_lora.ship.checks import Check
    from lens_lora.ship.combined import CombinedVerification
    from lens_lora.ship.served import ServedVerification
    from lens_lora.ship.verify import Verification

_COMBINED = "A combined adapter that should be the sum of ADAPTER and those after it."
_WEIGHTS = "Weights of the sum, one for each adapter: 0.7,0.3. Default: 1 each."
_OTHERS = "Further adapters, which were combined with ADAPTER into --combined."
_to_write = functools.partial(typer.Option, dir_okay=False)

_EXPECT = "A .jsonl file: prompt (or messages), doc, pre, and flips or margin_at_least."
_SERVED = "A server that should run the adapter. It is asked for log-probabilities."
_CARD = "README.md or JSON that lens-lora card wrote: check that each line still holds."
_TEXTS = "Texts to ask the server for: one a line, or .jsonl with prompt or messages."
ServedDtype = Literal["float32", "float16", "bfloat16", "int8"]
# The seconds of the checks with SmolLM2-135M-Instruct on one core; see `forecast`.
_SECONDS = 6.0
_SECONDS_WITH_SERVER = 20.0
# The adapters next to this one that a server may have loaded instead, and how many of them are
# tried.
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
    others: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER...]", help=_OTHERS)
    ] = None,
    *,
    card: Annotated[Path | None, options.input_file(_CARD)] = None,
    combined: Annotated[str | None, typer.Option(metavar="ADAPTER", help=_COMBINED)] = None,
    weights: Annotated[str | None, typer.Option(metavar="W,W", help=_WEIGHTS)] = None,
    merged: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .gguf file that should be base plus adapter."),
    ] = None,
    lora: Annotated[
        Path | None, options.input_file("A .gguf file that should be the adapter.")
    ] = None,
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
    timeout: Annotated[
        float, options.least(1, "Seconds in which the server has to answer a request.")
    ] = 60.0,
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

    lens-lora verify a b --combined path/to/a_and_b --weights 0.7,0.3
    """
    named = _adapter_or_folder_of(card, adapter)
    numbers = _weights_of(weights, others, combined)
    outputs = files.writable({"--json": json_file, "--junit": junit, "--report": report})
    expectations = [] if expect is None else read_expectations(expect)
    inputs = Inputs(merged, lora, expectations, max_kl)
    if served is not None:
        # Making a server sends nothing, and refuses a URL that cannot be asked.
        Server(served, timeout, most_requests=0)
    own_texts = [] if texts is None else prompts_of(texts)
    folder, parts = _folders_of(named, others or [], combined, within, quiet=quiet)
    read = [card, expect, texts, lora, *_files_of(merged)]
    files.require_apart(outputs, base, [folder, *parts], *read)

    question = None
    if served is not None:
        question = _Question(
            url=served,
            name=name,
            texts=own_texts,
            dtype=served_dtype,
            timeout=timeout,
            adapter=folder,
            progress=not quiet,
        )
    comparison = None
    if parts:
        comparison = _Comparison(parts, numbers, own_texts, progress=not quiet)
    work = _work_of(merged, lora, served, card, combined)
    with running.at_work(base, quiet=quiet, work=work, adapter=folder) as progress:
        written = None
        if card is not None:
            written = _read_card(card, folder)
            inputs = written.inputs(inputs, expect)
        results = _verified(
            folder, base.placed("cpu"), inputs, written, question, comparison, progress
        )
        results.write(outputs)
        results.tell()
        for option, path in outputs.items():
            running.say(f"{_LABELS[option]}: {path.absolute()}")
    raise typer.Exit(results.verification.exit_code)


def _folders_of(
    named: str,
    others: Sequence[str],
    combined: str | None,
    within: options.Within,
    *,
    quiet: bool,
) -> tuple[Path, list[Path]]:
    """Find the folder of the adapter to be verified, and those of which it was combined, if any.

    Args:
        named: the adapter that the command names first.
        others: the adapters after it.
        combined: the combined adapter; None if none is verified.
        within: the place of the named adapters within their folders.
        quiet: whether nothing is said about a run whose last checkpoint is taken.
    """
    if combined is None:
        return files.folder_of(named, within, quiet=quiet), []
    folder = files.folder_of(combined, quiet=quiet)
    parts = [files.folder_of(part, within, quiet=quiet) for part in (named, *others)]
    return folder, parts


def _verified(
    folder: Path,
    base: options.BaseModel,
    inputs: Inputs,
    written: WrittenCard | None,
    question: _Question | None,
    comparison: _Comparison | None,
    progress: Console,
) -> _Results:
    """Run all checks, and those of a card's lines if there is one.

    Args:
        folder: the folder of the adapter.
        base: the options of the base.
        inputs: what is verified besides the adapter.
        written: the card; None if there is none.
        question: the question to a server; None if there is no server.
        comparison: the comparison with the parts; None if there are none.
        progress: the console that shows progress.
    """
    given = read_given(folder, base, progress)
    lens_over = LensMade(base, given, progress)
    verification = verification_of(
        given,
        lens_over,
        inputs,
        ask_server=question,
        compare_parts=comparison,
        progress=not progress.quiet,
    )
    table_of = verification
    if written is not None:
        verification = written.checked(verification, given, lens_over.lens, base)
        table_of = written.brief
    answered = None if question is None else question.answered
    compared = None if comparison is None else comparison.compared
    return _Results(verification, table_of, answered, compared)


def _work_of(
    merged: Path | None,
    lora: Path | None,
    served: str | None,
    card: Path | None,
    combined: str | None,
) -> Work:
    """Forecast what the command will do, and how long that takes."""
    given_for = {
        "compare the merged model with it": merged,
        "compare the GGUF file with it": lora,
        "ask the server for the same": served,
        "repeat what its card says": card,
        "compare it with the sum of its parts": combined,
    }
    steps = [step for step, given in given_for.items() if given]
    seconds = _SECONDS if served is None else _SECONDS_WITH_SERVER
    return Work(_in_words(steps), seconds)


def _adapter_or_folder_of(card: Path | None, adapter: str | None) -> str:
    """Return the named adapter, or else the folder of its card."""
    if adapter is not None:
        return adapter
    if card is None:
        raise typer.BadParameter("name one, or a --card.", param_hint="ADAPTER")
    return str(card.parent)


def _read_card(card: Path, folder: Path) -> WrittenCard:
    from lens_lora.cli.written_card import WrittenCard

    return WrittenCard.of(card, folder)


def _files_of(merged: Path | None) -> list[Path]:
    """List the files of a merged folder, or the single file."""
    if merged is None:
        return []
    return [merged] if merged.is_file() else list(merged.iterdir())


@dataclasses.dataclass
class _Question:
    """Asks a server, given the lens that the checks have made.

    Attributes:
        url: the server.
        name: the name by which it knows the adapter; None for the only name that it lists.
        texts: the user's own texts, on which the adapter shows.
        dtype: what the server computes in.
        timeout: the seconds in which each request has to be answered.
        adapter: the folder of the adapter, beside which others may lie that it has loaded instead.
        progress: whether to show bars.
        answered: what the server answered; None before it is asked.
    """

    url: str
    name: str | None
    texts: list[Any]
    dtype: ServedDtype
    timeout: float
    adapter: Path
    progress: bool
    answered: ServedVerification | None = None

    def __call__(self, lens: LoraLens) -> tuple[Check, ...]:
        from lens_lora.ship.served import verify_served

        running.say(f"Server:  {self.url} is asked for log-probabilities, once for each text")
        self.answered = verify_served(
            lens,
            self.url,
            name=self.name,
            texts=self.texts,
            dtype=self.dtype,
            others=_others_beside(self.adapter),
            timeout=self.timeout,
            progress=self.progress,
        )
        return self.answered.checks


class _Comparison:
    """Compares a combined adapter with the sum of its parts, given the lens of the checks.

    Attributes:
        compared: the result; None before the comparison.
    """

    def __init__(
        self, parts: list[Path], weights: list[float] | None, texts: list[Any], *, progress: bool
    ) -> None:
        self.compared: CombinedVerification | None = None
        self._parts = parts
        self._weights = weights
        self._texts = texts
        self._progress = progress

    def __call__(self, lens: LoraLens) -> tuple[Check, ...]:
        from lens_lora.core import load_adapter
        from lens_lora.ship.combined import verify_combined

        parts = [load_adapter(part) for part in self._parts]
        self.compared = verify_combined(
            lens, parts, self._weights, texts=self._texts, progress=self._progress
        )
        return self.compared.checks


def _in_words(steps: Sequence[str]) -> str:
    """Say what the command will do, in words that follow “This will”.

    Args:
        steps: what is done in addition to the checks that are always made.
    """
    always = "check that the adapter loads on its base and changes what the model says"
    return ", and ".join([always, *steps])


def _weights_of(
    weights: str | None, others: list[str] | None, combined: str | None
) -> list[float] | None:
    """Read the numbers of --weights; None stands for 1 each."""
    if combined is None:
        if others:
            raise typer.BadParameter(
                f"{others[0]!r} is a second adapter; name the one into which they were combined.",
                param_hint="--combined",
            )
        if weights is not None:
            raise typer.BadParameter(
                "they are those of --combined; give both.", param_hint="--weights"
            )
        return None
    if weights is None:
        return None
    try:
        numbers = [float(weight) for weight in weights.split(",")]
    except ValueError:
        numbers = []
    count = 1 + len(others or ())
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise typer.BadParameter(
            f"{weights!r}; expected {count} numbers with commas between them, one per adapter.",
            param_hint="--weights",
        )
    return numbers


def _others_beside(folder: Path) -> list[Adapter]:
    """Load other checkpoints of the same run, which a server may have loaded instead."""
    from lens_lora.core import load_adapter

    others: list[Adapter] = []
    for place in sorted(folder.parent.glob(_CHECKPOINTS)):
        if place.samefile(folder) or not place.is_dir():
            continue
        # A checkpoint that cannot be read is skipped, since it is not what is verified.
        with contextlib.suppress(LensLoraError), heard_by(lambda _: None):
            others.append(load_adapter(place))
    return others[-_MOST_OTHERS:]


@dataclasses.dataclass(frozen=True)
class _Results:
    """The results of the checks, which are written into files and printed.

    Attributes:
        verification: the checks.
        table_of: the same checks for a table, where all lines of a card that hold are one.
        answered: what a server answered; None if none was asked.
        compared: a combined adapter beside its parts; None if none was compared.
    """

    verification: Verification
    table_of: Verification
    answered: ServedVerification | None
    compared: CombinedVerification | None

    def write(self, outputs: dict[str, Path]) -> None:
        """Write the files that were asked for, given under their options."""
        from lens_lora.ship.files import as_json, as_junit

        if "--json" in outputs:
            text = as_json(self.verification, self.answered, self.compared)
            outputs["--json"].write_text(text, encoding="utf-8")
        if "--junit" in outputs:
            tree = as_junit(self.verification)
            tree.write(outputs["--junit"], encoding="utf-8", xml_declaration=True)
        if "--report" in outputs:
            self.verification.save_report(outputs["--report"])

    def tell(self) -> None:
        """Print the tables, and last the outcome in words, so that a small screen shows it."""
        from lens_lora.ship.page import explanations_table, sites_table, verification_table

        console = Console()
        console.print(verification_table(self.table_of))
        if self.answered is not None:
            console.print(explanations_table(self.answered))
        if self.compared is not None:
            console.print(sites_table(self.compared))
        running.tell(self.verification.story())
