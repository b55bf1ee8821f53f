"""Run a command: load its model and adapter, show progress, and print errors as one line.

Results go to stdout, progress and errors to stderr. If all of several processes have the same
error, only the first reports it; an error in one process is reported by that process. torch is
imported only where a model is loaded, so a command whose options are refused never imports it.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

import lens_lora as ll
from lens_lora.cli.forecast import Work, forecast
from lens_lora.cli.options import ModelOptions, TunedModel, options_of
from lens_lora.cli.questions import Question, answers_of, prompts_of
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import LensLoraError, LensLoraWarning, heard_by, many, warn, within_command
from lens_lora.runs.processes import rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lens_lora.core import Prompts
    from lens_lora.formats.tokenizers import OwnTokenizer

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# --- The model, the adapter and the lens


def lens_for(
    base: ModelOptions,
    adapter: ll.Adapter | Path,
    progress: Console,
    loaded: Loaded | None = None,
    *,
    leaves_out: bool = False,
) -> ll.LoraLens:
    """Make the lens over the model that the options name, on the CPU if they name no device.

    Args:
        base: the base model, and how it is loaded.
        adapter: the adapter, or its folder. If its method gives a change only relative to a base
            model, the change is measured on that model.
        progress: the console that shows progress.
        loaded: the base model and its tokenizer, if they are loaded already.
        leaves_out: whether to leave out modules that the model lacks, unless it lacks all of them.
    """
    base = base.placed("cpu")

    @functools.cache
    def model_for(named: str | None) -> Loaded:
        return loaded or load_model_of(named, progress, base)

    from lens_lora.core import load_adapter
    from lens_lora.directions.spectra import lacking
    from lens_lora.loading import base_beside, tokenizer_beside

    def base_for(named: str | None) -> PreTrainedModel:
        hf_model, _ = model_for(named)
        return hf_model

    if isinstance(adapter, Path):
        adapter = load_adapter(adapter, base=base_for)
    hf_model, tokenizer = model_for(adapter.base_model)
    with step("Building the hooked model", progress):
        own = tokenizer_beside(adapter, hf_model, tokenizer)
        hooked, class_name = hooked_by(base, hf_model, own)
        absent = lacking(adapter, hooked) if leaves_out else ()
        if 0 < len(absent) < len(adapter):
            adapter = adapter.without_modules(*absent)
    beside = base_beside(class_name, hf_model, adapter)
    lens = ll.LoraLens(hooked, adapter, hf_model=beside, prepend_bos=base.prepend_bos)
    return lens.within(base.max_memory)


def lens_of(base: ModelOptions, folder: Path, tuned: TunedModel, progress: Console) -> ll.LoraLens:
    """Make the lens of the adapter in a folder, or of a full fine-tune.

    Args:
        base: the base model, and how it is loaded.
        folder: the folder of the adapter, or of the full fine-tune.
        tuned: the option that names a full fine-tune; empty for an adapter.
        progress: the console that shows progress.
    """
    if tuned.tuned is None:
        return lens_for(base, folder, progress)
    from lens_lora.loading import load_base

    base = base.placed("cpu")
    loaded = load_model_of(None, progress, base)
    before, _ = loaded
    with step(f"Loading {folder}", progress):
        after, _ = load_base(str(folder), base)
    with step("Comparing the weights of both", progress):
        change = ll.Adapter.between(before, after, name=folder.name, progress=False)
    return lens_for(base, change, progress, loaded=loaded)


def hooked_by(
    base: ModelOptions, hf_model: PreTrainedModel, tokenizer: OwnTokenizer
) -> tuple[Any, str]:
    """Make the hooked model, and return it with the name of its class."""
    from lens_lora.hosts.build import hooked_model

    return hooked_model(
        hf_model,
        tokenizer,
        kind=base.model_class,
        attn=base.attn,
        prepend_bos=base.prepend_bos,
    )


def load_model_of(of_adapter: str | None, progress: Console, base: ModelOptions) -> Loaded:
    """Load the model that the options name, or else the base that an adapter names."""
    return load_model(base.model, progress, base, of_adapter=of_adapter)


def load_model(
    asked: str | None, progress: Console, how: ModelOptions, *, of_adapter: str | None = None
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        asked: the model that the options name; None if they name none.
        progress: the console that shows progress.
        how: the device and the number format of the model.
        of_adapter: the base that the adapter names; None if it names none.
    """
    from lens_lora.demonstration.embedded import place_of
    from lens_lora.loading import load_base

    named = base_by_name(asked, of_adapter)
    place = place_of(named, quiet=progress.quiet)
    with step(f"Loading {named.shown}", progress):
        return load_base(place, how, of_adapter=named.of_adapter)


def margin_of(
    model: Any, questions: Sequence[Question], prepend_bos: bool | None
) -> tuple[Prompts, ll.Readout]:
    """Return the prompts, and a readout of the margin of each prompt's own answers."""
    from lens_lora.core import tokenise
    from lens_lora.responses.answers import margin_between

    docs, pres = answers_of(questions)
    prompts = tokenise(model, prompts_of(questions), rule=prepend_bos)
    return prompts, margin_between(model, docs, pres, prompts)


def announced(lens: ll.LoraLens) -> ll.LoraLens:
    """Print which model and which adapter are used, and return the lens itself."""
    from lens_lora.hosts.build import transformer_lens_version
    from lens_lora.hosts.given_base import shown_base

    about = lens.describe()
    adapter = lens.adapter
    facts = [
        f"Model:   {about['model']} as {lens.class_name} of transformer-lens "
        f"{transformer_lens_version()}, {about['dtype']}"
    ]
    distinct_ranks = sorted({site.rank for site in lens.sites})
    ranks = ", ".join(str(rank_of_site) for rank_of_site in distinct_ranks)
    fact = f"Adapter: {adapter.name}, {many(len(adapter), 'module')} of rank {ranks}"
    if adapter.base_model:
        fact += f", trained on {shown_base(adapter.base_model)}"
    facts.append(fact)
    if lens.reads_strings:
        facts.append(f"Strings: {lens.reads_strings}")
    if lens.tokenizer_origin:
        facts.append(f"Tokenizer: {lens.tokenizer_origin}")
    for fact in facts:
        say_in_words(fact)
    return lens


# --- What is printed


def say(line: str) -> None:
    """Print a line to stdout without reading brackets as markup."""
    Console(soft_wrap=True).print(Text(line))


def say_in_words(fact: str) -> None:
    """Print a fact such as 'Model: …' to stdout, broken between words on a terminal.

    Elsewhere it stays on one line, for programs that read it.
    """
    label, _, _ = fact.partition(":")
    for line in _between_words(fact, Console(), " " * max(9, len(label) + 2)):
        say(line)


def _between_words(line: str, console: Console, indent: str = "") -> list[str]:
    """Break a line between words on a terminal; elsewhere return it as it is.

    Args:
        line: the line to print.
        console: the console that will print it.
        indent: the indentation of all pieces except the first.
    """
    if not console.is_terminal:
        return [line]
    return textwrap.wrap(
        line,
        console.width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def tell(story: str) -> Console:
    """Print the paragraphs of a story to stdout, and return the console for its tables."""
    console = Console()
    for paragraph in story.split("\n"):
        console.print(Text(f"\n{paragraph}"))
    console.print()
    return console


# --- Progress


@contextlib.contextmanager
def at_work(
    base: ModelOptions, *, quiet: bool, work: Work | None = None, adapter: Path | None = None
) -> Generator[Console]:
    """Within the block, show progress on a console; print a forecast first, and the time at last.

    Args:
        base: the base model, and how it is loaded.
        quiet: whether the console prints nothing.
        work: what the command does, which is printed first, with about how long it takes.
        adapter: the adapter's folder, whose config may name the base.
    """
    base.require_packages()
    progress = Console(stderr=True, quiet=quiet)
    if work is not None and adapter is not None and not quiet and rank() == 0:
        # This is printed at once, since finding the base and measuring the machine take a moment.
        progress.print(f"This will {work.does}.", highlight=False)
        progress.print(forecast(work, base, adapter), highlight=False)
    started = time.perf_counter()
    with step("Loading torch and transformers", progress):
        import torch

        from lens_lora.compat import open_bars
        from lens_lora.loading import moved

        moved(torch.empty(0), base.device)

    def refresh_bars() -> None:
        for bar in open_bars():
            bar.refresh()

    with _moving(refresh_bars):
        yield progress
    progress.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)


def warn_of_spaces(questions: Sequence[Question]) -> None:
    """Warn of a space after a prompt or a missing one before an answer, which change tokens."""
    for question in questions:
        note = _note_on_spaces(question)
        if note is not None:
            warn(f"{note}; is that meant?")


def _note_on_spaces(question: Question) -> str | None:
    """Describe a space that is probably unintended or missing; None if all is as usual."""
    prompt = question.prompt
    given = (question.doc, question.pre, question.response)
    answers = [answer for answer in given if answer is not None]
    quoted = " and ".join(repr(answer) for answer in answers)
    if not isinstance(prompt, str):
        # An answer that begins the assistant's turn needs no space.
        if any(answer.startswith(" ") for answer in answers):
            return f"{quoted} begin the assistant's turn with a space"
        return None
    if prompt.endswith(" "):
        return f"the prompt {prompt!r} ends in a space, which is a token of its own"
    if len(answers) > 1 and any(answer[:1].isalnum() for answer in answers):
        return f"the answers {quoted} do not both begin with a space"
    return None


def quiet_libraries() -> contextlib.AbstractContextManager[None]:
    """Hide the libraries' own output within the block, by `loading.quiet_libraries`.

    That function is imported only here, because it brings torch along.
    """
    from lens_lora import loading

    return loading.quiet_libraries()


@contextlib.contextmanager
def step(message: str, progress: Console) -> Generator[None]:
    """Within the block, show a spinner on a terminal, or else print a line every few seconds.

    The libraries' own output is hidden.
    """
    started = time.perf_counter()

    def again() -> None:
        progress.print(f"{message}, {time.perf_counter() - started:.0f} s", highlight=False)

    if progress.is_terminal:
        shown = progress.status(message)
    else:
        progress.print(message)
        shown = _moving(again)
    # `quiet_libraries` comes second, so that torch is imported while something moves.
    with shown, quiet_libraries():
        yield


# The seconds between two signs of life; after five, users wonder whether anything happens.
_SILENCE = 4.0


@contextlib.contextmanager
def _moving(move: Callable[[], object]) -> Generator[None]:
    """Within the block, call `move` every four seconds from a thread."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_SILENCE):
            move()

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


# --- Errors and Ctrl-C


# The seconds for which any other process holds back an error. If the first process has the same
# error and exits, a launcher ends all others before that.
_SECONDS_FOR_THE_FIRST = 10.0


@contextlib.contextmanager
def one_line_errors(command: Callable[..., None] | None = None) -> Generator[None]:
    """Print an error of this package or of the system as one line, and exit with code 2.

    Ctrl-C also prints one line, and exits with 130. A warning of this package is one line as well,
    printed once even if several prompts cause it. All of them name the command's options.
    """
    options = options_of(command) if command else {}
    printed: set[str] = set()

    def print_once(warning: LensLoraWarning) -> None:
        if str(warning) not in printed:
            printed.add(str(warning))
            _print_warning(warning)

    with within_command(options), heard_by(print_once), _one_line_errors():
        yield


@contextlib.contextmanager
def _one_line_errors() -> Generator[None]:
    try:
        with _stopped_by_ctrl_c():
            yield
    except BrokenPipeError:
        raise
    except (LensLoraError, OSError) as error:
        _print_error(f"{type(error).__name__}: {error}")
        raise typer.Exit(2) from error
    except RuntimeError as error:
        # A command that never imported torch cannot have run out of a device's memory.
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        first_sentence, *_ = str(error).split(". ")
        remedy = "Use --max-memory, shorter prompts, or --device cpu."
        _print_error(f"{first_sentence}. {remedy}")
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        if rank() == 0:
            _print_line(str(error) or "Interrupted.")
        raise typer.Exit(130) from error


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Generator[None]:
    """Within the block, make Ctrl-C raise KeyboardInterrupt, so that everything is cleaned up.

    The handler from outside the block acts instead if Ctrl-C is pressed a second time, or while a
    module is imported, which might catch the error and go on without a part of itself.
    """
    outside = signal.getsignal(signal.SIGINT)
    if not callable(outside):
        # The signal is ignored, which is how a shell runs jobs in the background.
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, outside)
        if _is_importing(frame):
            outside(number, frame)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outside)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether this frame is running within an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def told_if_interrupted(what_is_saved: Callable[[], str]) -> Generator[None]:
    """Within the block, Ctrl-C prints what has been saved."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Interrupted. {what_is_saved()}") from error


def _print_error(line: str) -> None:
    """Print an error once, even if every process has the same one."""
    if rank():
        time.sleep(_SECONDS_FOR_THE_FIRST)
        line = f"process {rank() + 1}: {line}"
    _print_line(line)


def _print_warning(warning: LensLoraWarning) -> None:
    """Print a warning, but only in the first of several processes."""
    if rank() == 0:
        _print_line(f"Warning: {warning}", style="yellow")


def _print_line(line: str, style: str = "red") -> None:
    console = Console(stderr=True, soft_wrap=True)
    for piece in _between_words(" ".join(line.split()), console):
        console.print(Text(piece, style=style))
