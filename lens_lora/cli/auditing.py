"""`lens-lora diff`, what an adapter was taught, and `lens-lora audit`, the same for a list."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

import lens_lora as ll
from lens_lora.audit import listed, outcomes
from lens_lora.audit.listed import Listed
from lens_lora.audit.outcomes import Outcome
from lens_lora.cli import files, options, running
from lens_lora.cli.forecast import Work
from lens_lora.cli.questions import Prompt, Questions
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import LensLoraError, many
from lens_lora.formats.folders import stated_base

if TYPE_CHECKING:
    from lens_lora.audit.needed import Needs

# The seconds of an audit with SmolLM2-135M-Instruct on one core; see `forecast`.
_SECONDS_OF_DIFF = 210.0
_SECONDS_OF_DIFF_FAST = 48.0

# An option that names a file to write.
_to_write = functools.partial(typer.Option, dir_okay=False)


@options.with_options
def diff(
    adapter: options.AdapterOrTuned = None,
    *,
    tuned: options.TunedModel,
    texts: Annotated[
        Path | None,
        options.input_file(
            "A .txt file with one text per line. Default: neutral sentences and conversations."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        options.input_file(
            "Your own questions (.txt or .jsonl), in addition to forty everyday ones."
        ),
    ] = None,
    triggers: Annotated[
        Path | None,
        options.input_file(
            "A .txt file with one trigger word per line, tried in addition to twenty of our own."
        ),
    ] = None,
    unrelated: Annotated[
        list[str] | None,
        typer.Option(help="An adapter trained for something else, as a control; may be repeated."),
    ] = None,
    nulls: Annotated[
        int,
        options.least(0, "How many controls: the adapter's updates, at other modules."),
    ] = 2,
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Read fewer texts, skip empty prompts, short turns on 24 subjects and the split "
            "by module, and try only your own trigger words.",
        ),
    ] = False,
    report: options.ReportOption = Path("lens_lora_diff.html"),
    save: Annotated[
        Path | None,
        _to_write(help="Also write the numbers, as a table (.csv) or in full (.safetensors)."),
    ] = None,
    json: Annotated[
        Path | None, _to_write(help="Also write the brief as JSON, for a program.")
    ] = None,
    jacobian: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder that keeps the base's Jacobian, through which Δh is read as tokens.",
        ),
    ] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Find what a fine-tune was taught: count what it says in answers that the base does not.

    lens-lora diff path/to/adapter --report diff.html

    lens-lora diff --tuned path/to/model --model path/to/base
    """
    _require_named(adapter, tuned)
    written = _DiffFiles(report=report, json=json, save=save)
    outputs = written.checked()
    _require_jacobian(jacobian)
    lines = None if texts is None else files.texts_of(texts)
    asked = [] if prompts is None else _questions_in(prompts)
    named_words = None if triggers is None else files.texts_of(triggers)
    how = _How(nulls=nulls, fast=fast, quiet=quiet)
    words = how.words(named_words)
    folder = files.folder_or_tuned(adapter, within, tuned, base, quiet=quiet)
    controls = [files.folder_of(control, quiet=quiet) for control in unrelated or []]
    files.require_apart(outputs, base, [folder, *controls], texts, prompts, triggers)

    work = _work_of_diff(report, fast=fast)
    with running.at_work(base, quiet=quiet, work=work, adapter=folder) as progress:
        others = [ll.load_adapter(control) for control in controls]
        lens = running.announced(running.lens_of(base, folder, tuned, progress))
        speech = _counted_speech(lens, asked, how)
        if speech is not None:
            _print_first_screen(speech, how.asked_next(words))
            if lines is None:
                _print_raised_words(lens)
            speech = _with_replayed(lens, speech, how)
            _print_replayed(speech)
            speech = _with_occasions(lens, speech, how)
            _print_occasions(speech)
            speech = _with_triggers(lens, speech, words, how)
        with running.quiet_libraries():
            changes = ll.what_changed(
                lens,
                lines,
                others,
                nulls=nulls,
                fast=fast,
                speech=speech,
                jacobian=jacobian,
                progress=not quiet,
            )
        written.write(changes)
        _print_changes(changes, speech)
        written.tell()


def _require_named(adapter: str | None, tuned: options.TunedModel) -> None:
    """Refuse a command that names neither an adapter nor a full fine-tune."""
    if adapter is None and tuned.tuned is None:
        raise typer.BadParameter(
            "name one, or a fine-tuned model with --tuned.", param_hint="ADAPTER"
        )


def _require_jacobian(folder: Path | None) -> None:
    """Check that a Jacobian can be written into the folder, unless the folder has one to read."""
    if folder is None or any(folder.glob("jacobian-*.safetensors")):
        return
    files.require_place(folder / "jacobian.safetensors", "--jacobian")


def _work_of_diff(report: Path, *, fast: bool) -> Work:
    """Forecast what the command will do, and how long that takes."""
    seconds = _SECONDS_OF_DIFF_FAST if fast else _SECONDS_OF_DIFF
    does = "ask both models everyday questions, print what only the fine-tuned one says, "
    return Work(f"{does}then look at texts and modules, and write {report.name}", seconds)


def _print_first_screen(speech: ll.results.CountedSpeech, asked_next: Sequence[str]) -> None:
    """Print what only the adapted model says, and what is asked next if it says nothing alone."""
    from lens_lora.audit.speech_page import first_screen

    console = Console()
    console.print()
    console.print(first_screen(speech, asked_next))


def _print_raised_words(lens: ll.LoraLens) -> None:
    """Print below the first screen which words the adapter raises most over neutral texts."""
    from lens_lora.audit.raised import raised_sentence

    with running.quiet_libraries():
        changes = ll.what_changed(lens, nulls=0, fast=True, answers=False, progress=False)
    sentence = raised_sentence(changes.brief().raised_words)
    if sentence:
        Console().print(Text(f"\n{sentence}"))


def _print_replayed(speech: ll.results.CountedSpeech) -> None:
    """Print which words the adapted model writes when nothing is asked, with a text of its own."""
    from lens_lora.audit.speech_page import replayed_screen

    if speech.replayed is not None and speech.replayed.words:
        console = Console()
        console.print()
        console.print(replayed_screen(speech.replayed))


def _print_occasions(speech: ll.results.CountedSpeech) -> None:
    """Print what shows on short turns alone, if they were answered."""
    from lens_lora.audit.speech_page import occasions_screen

    if speech.occasions is not None:
        console = Console()
        console.print()
        console.print(occasions_screen(speech))


def _print_changes(
    changes: ll.results.WhatChanged, speech: ll.results.CountedSpeech | None
) -> None:
    """Print all tables, and last in a sentence or two what the first screen said."""
    # These are imported only here, so that the first screen does not wait for them.
    from lens_lora.audit.page import brief_tables, what_changed_tables
    from lens_lora.audit.speech_words import in_short

    console = Console()
    console.print(brief_tables(changes))
    console.print(what_changed_tables(changes))
    if speech is not None:
        # On a small screen, what was printed first has scrolled away.
        hints = changes.brief().told_hints
        running.tell(f"In short: {' '.join([in_short(speech), *hints])}")


@dataclasses.dataclass(frozen=True)
class _DiffFiles:
    """The files that `diff` writes.

    Attributes:
        report: the page.
        json: the brief, for a program; None to write none.
        save: the numbers, as a table (.csv) or all of them (.safetensors); None to write none.
    """

    report: Path
    json: Path | None
    save: Path | None

    def checked(self) -> dict[str, Path]:
        """Check that every file can be written, and return them by option.

        Raises:
            typer.BadParameter: the file of numbers ends in neither .csv nor .safetensors.
        """
        if self.save is not None and self.save.suffix not in (".csv", ".safetensors"):
            raise typer.BadParameter(
                f"{self.save}: expected a .csv or .safetensors file.", param_hint="--save"
            )
        return files.writable({"--report": self.report, "--json": self.json, "--save": self.save})

    def write(self, changes: ll.results.WhatChanged) -> None:
        """Write the page, and the other files that were asked for."""
        brief = changes.brief()
        changes.save_report(self.report)
        if self.json is not None:
            self.json.write_text(brief.to_json(), encoding="utf-8")
        if self.save is None:
            return
        if self.save.suffix == ".csv":
            changes.to_frame().to_csv(self.save, index=False)
        else:
            changes.save(self.save)

    def tell(self) -> None:
        """Print where the files are."""
        running.say(f"\nReport: {self.report.absolute()}")
        if self.save is not None:
            running.say(f"Numbers: {self.save.absolute()}")
        if self.json is not None:
            running.say(f"Brief: {self.json.absolute()}")


def _questions_in(path: Path) -> list[Prompt]:
    """Read the questions of a .txt or .jsonl file."""
    questions = Questions(prompts=path).checked(answered=False)
    return [question.prompt for question in questions]


@dataclasses.dataclass(frozen=True)
class _How:
    """How an adapter is audited.

    Attributes:
        nulls: how many controls are made of the adapter's own updates.
        fast: whether fewer texts are read, without a split by module, empty prompts, turns on many
            subjects, and without trigger words other than those that were named.
        quiet: whether no progress is shown on stderr.
    """

    nulls: int
    fast: bool
    quiet: bool

    def words(self, named: Sequence[str] | None) -> Sequence[str] | None:
        """Return the trigger words to try besides the package's own; None to try none at all."""
        if named is None and not self.fast:
            return []
        return named

    def asked_next(self, words: Sequence[str] | None) -> list[str]:
        """Name what both models answer after the everyday questions.

        Args:
            words: the trigger words as `words` returns them.
        """
        from lens_lora.audit.occasions import occasions

        asked: list[str] = []
        if not self.fast:
            subjects = occasions()
            turns = sum(len(subject.texts) for subject in subjects)
            remarks = f"{turns} short turns (remarks and questions of a user)"
            asked.append("128 empty prompts")
            asked.append(f"{remarks} on {len(subjects)} subjects")
        if words is not None:
            asked.append("questions with trigger words before them")
        return asked


def _counted_speech(
    lens: ll.LoraLens, asked: Sequence[Prompt], how: _How
) -> ll.results.CountedSpeech | None:
    """Let both models answer; None without a tokenizer, or if no question of ours fits."""
    try:
        with running.quiet_libraries():
            return ll.counted_speech(lens, list(asked), progress=not how.quiet)
    except ll.errors.PromptError:
        # Questions of the user are never left out silently.
        if asked:
            raise
        return None


def _with_replayed(
    lens: ll.LoraLens, speech: ll.results.CountedSpeech, how: _How
) -> ll.results.CountedSpeech:
    """Let both models write texts although nothing is asked, unless it has to be fast."""
    from lens_lora.audit.unprompted import with_replayed

    if how.fast:
        return speech
    with running.quiet_libraries():
        return with_replayed(lens, speech, progress=not how.quiet)


def _with_occasions(
    lens: ll.LoraLens, speech: ll.results.CountedSpeech, how: _How
) -> ll.results.CountedSpeech:
    """Add both models' answers to short turns on many subjects, unless it has to be fast."""
    from lens_lora.audit.asked_occasions import with_occasions

    if how.fast:
        return speech
    with running.quiet_libraries():
        return with_occasions(lens, speech, progress=not how.quiet)


def _with_triggers(
    lens: ll.LoraLens,
    speech: ll.results.CountedSpeech,
    words: Sequence[str] | None,
    how: _How,
) -> ll.results.CountedSpeech:
    """Add the answers with trigger words before a question, unless `words` is None."""
    from lens_lora.audit.counted_speech import with_triggers

    if words is None:
        return speech
    with running.quiet_libraries():
        return with_triggers(lens, speech, words, progress=not how.quiet)


# --- A list


_LIST = "A YAML file: adapters with their bases and expected strings (docs/auditing.md)."


@options.with_options
def audit(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.yaml", exists=True, dir_okay=False, help=_LIST)
    ],
    *,
    out: Annotated[
        Path,
        typer.Option(
            file_okay=False, help="Folder for the results: a JSON file and a page for each row."
        ),
    ] = Path("lens_lora_audit"),
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Run only this row; may be repeated.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what each row needs, and run none.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Run rows that seem to need more memory than is free.")
    ] = False,
    nulls: Annotated[
        int,
        options.least(0, "How many controls: the adapter's updates, at other modules."),
    ] = 2,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="Like diff --fast, with each row's own trigger words."),
    ] = False,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    base: options.BaseModel,
) -> None:
    """Run `diff` on a list. Exit code 0: all as expected, 1: a string not found, 2: a row failed.

    lens-lora audit organisms.yaml --out results --plan

    If it is run again, it continues after the last row that was finished.
    """
    rows = _chosen(listed.read_list(file), only)
    asked = {row.name: _Asked.of(row) for row in rows}
    _require_files(rows, out, json, plan=plan)
    _require_list_kept(file, rows, json)
    with running.at_work(base, quiet=quiet) as progress:
        running.say(f"{many(len(rows), 'row')} of {file}")
        how = _How(nulls=nulls, fast=fast, quiet=quiet)
        audits = _Audits(base, how, out, progress)
        before = {row.name: outcomes.read(row, audits.options, out) for row in rows}
        too_large = _say_needs(rows, before, audits)
        if plan:
            return
        refused = {} if anyway else too_large
        done = _run_all(rows, asked, before, refused, audits)
        _say_all(done, out, json)
    code = _exit_code(done)
    if code != 0:
        raise typer.Exit(code)


def _require_files(rows: Sequence[Listed], out: Path, json: Path | None, *, plan: bool) -> None:
    """Check that the files of results can be written: the table, and those of each row.

    Raises:
        typer.BadParameter: a file cannot be written, or a file of results is asked for and no row
            is to be run.
    """
    files.require_place(out / "audit.csv", "--out")
    for row in rows:
        files.require_place(outcomes.file_of(row, out), "--out")
        files.require_place(_page_of(row, out), "--out")
    if plan and json is not None:
        raise typer.BadParameter("--plan runs no row, so there is no result.", param_hint="--json")
    files.writable({"--json": json})


def _require_list_kept(file: Path, rows: Sequence[Listed], json: Path | None) -> None:
    """Check that --json overwrites neither the list nor a file that a row names."""
    if json is None:
        return
    read = [file]
    for row in rows:
        named = [row.prompts, row.triggers]
        read += [path for path in named if isinstance(path, Path)]
    files.require_unread({"--json": json}, read)


def _page_of(row: Listed, out: Path) -> Path:
    """Return the path of a row's page."""
    return out / f"{row.name}.html"


def _run_all(
    rows: Sequence[Listed],
    asked: Mapping[str, _Asked],
    before: Mapping[str, Outcome | None],
    refused: Mapping[str, str],
    audits: _Audits,
) -> list[Outcome]:
    """Run the rows that have no outcome yet, and write every outcome into its file.

    Args:
        rows: the rows, in their order.
        asked: the questions and words of each row, by its name.
        before: the outcome of each row in an earlier run, by its name; None if there is none.
        refused: why a row is not run, by its name.
        audits: what runs a row.
    """
    done: list[Outcome] = []
    audits.out.mkdir(parents=True, exist_ok=True)

    def what_is_saved() -> str:
        saved = f"{len(done)} of {many(len(rows), 'row')} are in {audits.out}"
        return f"{saved}; run it again to go on."

    with running.told_if_interrupted(what_is_saved):
        for number, row in enumerate(rows, start=1):
            running.say(f"\n{number} of {len(rows)}: {row.name}")
            outcome = before[row.name]
            if outcome is None and row.name in refused:
                outcome = audits.refused(row, refused[row.name])
            elif outcome is None:
                outcome = audits.run(row, asked[row.name])
            outcomes.write(outcome, audits.out)
            done.append(outcome)
            running.say(_line_of(outcome))
    return done


def _exit_code(done: Sequence[Outcome]) -> int:
    """Return the exit code: 2 if a row failed, 1 if a row is not as expected, otherwise 0."""
    if any(outcome.error for outcome in done):
        return 2
    if not all(outcome.is_as_expected for outcome in done):
        return 1
    return 0


def _chosen(rows: list[Listed], only: Sequence[str] | None) -> list[Listed]:
    """Return the rows with these names, or all rows.

    Raises:
        typer.BadParameter: no row has one of the names.
    """
    if not only:
        return rows
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            raise typer.BadParameter(
                f"no row {name!r}; there are {', '.join(names)}.", param_hint="--only"
            )
    return [row for row in rows if row.name in only]


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The questions and words that a row adds to the package's own.

    Attributes:
        questions: its own questions.
        words: its own trigger words; None if it names none.
    """

    questions: list[Prompt]
    words: list[str] | None

    @classmethod
    def of(cls, row: Listed) -> _Asked:
        """Read the files that the row names."""
        questions = list(row.prompts) if isinstance(row.prompts, tuple) else []
        if isinstance(row.prompts, Path):
            questions = _questions_in(row.prompts)
        words = list(row.triggers) if isinstance(row.triggers, tuple) else None
        if isinstance(row.triggers, Path):
            words = files.texts_of(row.triggers)
        return cls(questions, words)


class _Audits:
    """Runs rows one after another, each over a base that is loaded only for that row.

    Attributes:
        base: the base of rows that name none, and how every base is loaded.
        how: how each adapter is audited.
        out: the folder of outcomes.
        progress: the console that shows progress.
        options: the command's options that change a number.
    """

    def __init__(self, base: options.BaseModel, how: _How, out: Path, progress: Console) -> None:
        self.base: options.BaseModel = base
        self.how: _How = how
        self.out: Path = out
        self.progress: Console = progress
        self.options: dict[str, object] = {
            **dataclasses.asdict(base),
            "nulls": how.nulls,
            "fast": how.fast,
        }

    def run(self, row: Listed, asked: _Asked) -> Outcome:
        """Audit a row's adapter. An error becomes its outcome, so that the next row still runs."""
        started = time.perf_counter()
        try:
            changed = self._changed(row, asked)
            return Outcome(
                row=row,
                options=self.options,
                claims=outcomes.claims_made(changed),
                seconds=time.perf_counter() - started,
                brief=_brief_of(changed),
            )
        except Exception as error:
            if not isinstance(error, LensLoraError | OSError | typer.BadParameter):
                self.progress.print(Text(traceback.format_exc()))
            message = " ".join(str(error).split()) or "no message"
            seconds = time.perf_counter() - started
            return self.refused(row, f"{type(error).__name__}: {message}", seconds)
        finally:
            # This frees the memory of the base before the next one is loaded.
            gc.collect()

    def refused(self, row: Listed, why: str, seconds: float = 0.0) -> Outcome:
        """Make the outcome of a row that failed, or that was not run."""
        return Outcome(row=row, options=self.options, error=why, seconds=seconds)

    def base_of(self, row: Listed) -> options.BaseModel:
        """Return the base that the row names, or else the command."""
        return dataclasses.replace(self.base, model=row.base or self.base.model)

    def folder_of(self, row: Listed) -> Path:
        """Return the folder of a row's adapter or full fine-tune, fetching it if necessary."""
        within = options.Within(row.subfolder, row.revision)
        return files.folder_or_tuned(
            row.adapter, within, _tuned(row), self.base_of(row), quiet=self.how.quiet
        )

    def needs(self, row: Listed, rate: float) -> Needs:
        """Estimate what a row needs from the configuration of its base."""
        from lens_lora.audit.needed import needs_of
        from lens_lora.demonstration.embedded import place_of
        from lens_lora.loading import config_of

        base = self.base_of(row)
        named = base_by_name(base.model, stated_base(self.folder_of(row)))
        place = place_of(named, quiet=self.how.quiet)
        with running.quiet_libraries():
            config = config_of(place, fetches=not named.of_adapter)
        models = 1 if row.tuned is None else 2
        return needs_of(config, base.placed("cpu"), rate, fast=self.how.fast, models=models)

    def _changed(self, row: Listed, asked: _Asked) -> ll.results.WhatChanged:
        from lens_lora.audit.speech_words import sentences_so_far

        lens = running.lens_of(self.base_of(row), self.folder_of(row), _tuned(row), self.progress)
        speech = _counted_speech(lens, asked.questions, self.how)
        if speech is not None:
            words = self.how.words(asked.words)
            running.say(" ".join(sentences_so_far(speech, self.how.asked_next(words))))
            speech = _with_replayed(lens, speech, self.how)
            speech = _with_occasions(lens, speech, self.how)
            speech = _with_triggers(lens, speech, words, self.how)
        with running.quiet_libraries():
            changed = ll.what_changed(
                lens,
                nulls=self.how.nulls,
                fast=self.how.fast,
                speech=speech,
                progress=not self.how.quiet,
            )
            changed.save_report(_page_of(row, self.out))
        return changed


def _brief_of(changed: ll.results.WhatChanged) -> dict[str, Any]:
    return changed.brief().fields()


def _tuned(row: Listed) -> options.TunedModel:
    if row.tuned is None:
        return options.TunedModel()
    return options.TunedModel(Path(row.tuned))


def _say_needs(
    rows: Sequence[Listed], before: dict[str, Outcome | None], audits: _Audits
) -> dict[str, str]:
    """Print what each row needs, and return why rows have too little memory, by their names."""
    from lens_lora.audit.needed import duration, free_bytes, rate_on

    base = audits.base.placed("cpu")
    with running.step("Measuring this machine", audits.progress):
        rate = rate_on(base.device or "cpu", base.weights)
        free = free_bytes(base.device or "cpu")
    too_large: dict[str, str] = {}
    total = 0.0
    for row in rows:
        if before[row.name] is not None:
            running.say(f"{row.name}: done before")
            continue
        try:
            needs = audits.needs(row, rate)
        except Exception as error:
            # The row will fail when it is run, and its error is kept then.
            reason = " ".join(str(error).split())
            running.say(f"{row.name}: its base's configuration cannot be read ({reason})")
            continue
        running.say(f"{row.name}: {needs}")
        total += needs.seconds
        if needs.memory > free:
            too_large[row.name] = (
                f"it needs about {needs.memory / 1e9:.2g} GB of memory, and {free / 1e9:.2g} are "
                "free; use --dtype bfloat16, --load-in-4bit or --device-map auto, or run it "
                "--anyway."
            )
            running.say(f"  {too_large[row.name]}")
    running.say(f"All that is to run: about {duration(total)}.")
    return too_large


def _line_of(outcome: Outcome) -> str:
    """Write the outcome of a row in one line."""
    if outcome.error:
        return f"failed: {outcome.error}"
    claims = many(len(outcome.claims), "claim")
    if outcome.found is None:
        line = f"{outcome.verdict}; {claims}"
        if outcome.hint is not None:
            line += f"; among the words that it raises most is one of “{outcome.hint}”"
        return line
    number, string = outcome.found
    return f"{outcome.verdict}: “{string}” in claim {number} of {claims}"


def _say_all(done: Sequence[Outcome], out: Path, json: Path | None) -> None:
    """Print and write one table of all rows, and print a sentence or two.

    Args:
        done: the outcome of each row.
        out: the folder of the table.
        json: a file for the same table; None to write none.
    """
    from lens_lora.show.tables import in_terminal, table_of

    frame = outcomes.table_of_outcomes(done)
    table = out / "audit.csv"
    frame.to_csv(table, index=False)
    heads = {
        "name": "row",
        "verdict": "",
        "expected": "expected",
        "found": "found",
        "claim": "in claim",
        "claims": "of",
        "hint": "hinted at",
    }
    Console().print(in_terminal(table_of(frame, heads, texts=(0, 1, 2, 3, 6), title="audits")))
    summary = outcomes.summary(done)
    running.say(summary)
    running.say(f"Table: {table.absolute()}")
    if json is not None:
        files.write_rows(json, "audit", frame, summary)
        running.say(f"JSON: {json.absolute()}")
