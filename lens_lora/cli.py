"""The command line: `lens-lora demo`.

Results go to stdout, progress and errors to stderr. An error of this package is one red line and
exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lens_lora import LoraLens, Margin, __version__, fact_margin, first_order, load_adapter
from lens_lora.calculus.logit_shift import logit_shift
from lens_lora.errors import LensLoraError
from lens_lora.inspect_command import inspect
from lens_lora.show import tables
from lens_lora.show.report import margin_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lens_lora.adapter import Adapter
    from lens_lora.attribution import Attribution
    from lens_lora.calculus.logit_shift import LogitShift
    from lens_lora.calculus.margin import FactMargin

__all__ = ["app"]

app = typer.Typer(
    name="lens-lora", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)


@dataclasses.dataclass(frozen=True)
class _Analysis:
    margin: FactMargin
    positions: Attribution
    shift: LogitShift


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lens-lora {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """What did this LoRA do to this model, on this prompt, where, and how far to trust it?"""


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Base model, a hub id or folder. Default: SmolLM2-135M-Instruct."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="LoRA, a hub id or folder. Default: one that moves a capital to Lyon."),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Read at its last token.")
    ] = "The capital of France is",
    doc: Annotated[str, typer.Option(help="The document's fact, one token.")] = " Lyon",
    pre: Annotated[str, typer.Option(help="The pretrained fact, one token.")] = " Paris",
    report: Annotated[
        Path, typer.Option(help="HTML page to write.", dir_okay=False, writable=True)
    ] = Path("lens_lora_demo.html"),
    train: Annotated[
        bool, typer.Option("--train", help="Train a new adapter, about half a minute, and use it.")
    ] = False,
    train_out: Annotated[
        Path, typer.Option(help="Folder for the adapter of --train.", file_okay=False)
    ] = Path("lens_lora_adapter"),
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Explain how a LoRA moves one fact: the story, the numbers, and a page of figures."""
    if train and adapter is not None:
        raise typer.BadParameter("--train makes an adapter; leave --adapter out.")
    if not report.parent.is_dir():
        raise typer.BadParameter(f"--report: there is no folder {report.parent}.")
    started, progress = time.perf_counter(), Console(stderr=True, quiet=quiet)
    with _one_line_errors():
        chosen = None if train else load_adapter(adapter or _shipped_adapter())
        hf_model, tokenizer = _base(model, progress)
        chosen = chosen or _train(hf_model, tokenizer, model, train_out, quiet)
        lens = _lens(hf_model, tokenizer, chosen, progress)
        analysis = _analyse(lens, prompt, doc, pre, progress)
        _print(analysis)
        page = margin_report(
            analysis.margin, logit_shift=analysis.shift, positions=analysis.positions
        )
        report.write_text(page, encoding="utf-8")
        _say(f"Report: {report.absolute()}")
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)


@contextlib.contextmanager
def _one_line_errors() -> Generator[None]:
    """Print an error of this package as one line, and leave with exit code 2."""
    try:
        yield
    except LensLoraError as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        Console(stderr=True, soft_wrap=True).print(Text(line, style="red"))
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _step(message: str, progress: Console) -> Generator[None]:
    """A spinner on a terminal, else a line; the libraries' own noise is silenced."""
    from lens_lora.demo.hooked import quiet_libraries

    if not progress.is_terminal:
        progress.print(message)
    with progress.status(message), quiet_libraries():
        yield


def _base(model: str | None, progress: Console) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from lens_lora.demo.embedded import EMBEDDED_NAME, embedded_model_folder, load_embedded
    from lens_lora.demo.hooked import load_base

    if model is not None:
        with _step(f"Loading {model}", progress):
            return load_base(model)
    embedded_model_folder(quiet=progress.quiet)
    with _step(f"Loading {EMBEDDED_NAME}", progress):
        return load_embedded(quiet=True)


def _shipped_adapter() -> Path:
    import lens_lora.demo

    return Path(lens_lora.demo.__file__ or "").with_name("lyon_adapter")


def _train(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    model: str | None,
    out: Path,
    quiet: bool,
) -> Adapter:
    from lens_lora.demo.embedded import EMBEDDED_HUB_ID
    from lens_lora.demo.hooked import quiet_libraries
    from lens_lora.demo.train import LYON_SENTENCES, train_adapter

    base_name = model or EMBEDDED_HUB_ID
    try:
        with quiet_libraries():
            train_adapter(
                hf_model, tokenizer, LYON_SENTENCES, out, base_name=base_name, quiet=quiet
            )
    except ValueError as error:
        raise LensLoraError(f"{base_name}: the demo cannot train on it ({error}).") from error
    return load_adapter(out)


def _lens(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter,
    progress: Console,
) -> LoraLens:
    from lens_lora.demo.hooked import hooked_model, transformer_lens_version

    with _step("Building the hooked model", progress):
        model, class_name = hooked_model(hf_model, tokenizer)
    lens = LoraLens(model, adapter)
    about = lens.describe()
    _say(
        f"Model:   {about['model']} as {class_name} of transformer-lens "
        f"{transformer_lens_version()}, {about['dtype']}"
    )
    ranks = ", ".join(str(r) for r in sorted({site.rank for site in lens.sites}))
    base = f", trained on {adapter.base_model}" if adapter.base_model else ""
    _say(f"Adapter: {adapter.name}, {len(adapter)} modules of rank {ranks}{base}")
    return lens


def _analyse(lens: LoraLens, prompt: str, doc: str, pre: str, progress: Console) -> _Analysis:
    readout, shown = Margin(doc, pre), not progress.quiet
    with _step("The margin along the path", progress):
        margin = fact_margin(lens, prompt, doc, pre, progress=False)
        positions = first_order(lens, prompt, readout, by="position")
    shift = logit_shift(lens, prompt, by_site=True, progress=shown)
    return _Analysis(margin, positions, shift)


def _print(analysis: _Analysis) -> None:
    console = Console()
    for paragraph in analysis.margin.story().split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    console.print(tables.margin_table(analysis.margin))
    console.print(tables.modules_table(analysis.margin.attribution, k=10, prompt=0))
    console.print(tables.tokens_table(analysis.shift, k=10))


def _say(line: str) -> None:
    Console(soft_wrap=True).print(Text(line))


app.command("inspect")(_one_line_errors()(inspect))

if __name__ == "__main__":
    app()
