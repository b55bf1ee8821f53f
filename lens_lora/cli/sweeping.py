"""Commands that write Parquet: `lens-lora sweep`, `scan`, and `gather`, which joins their shards.

`sweep` runs a file of prompts through chosen analyses, and `scan` a folder of adapters through one
bank. A record or an adapter that cannot be used is listed and stops nothing; the exit code is 1 if
nothing has numbers. Results of another sweep at `--out` are refused before the model is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

import lens_lora as ll
from lens_lora.cli import files, finished, options, running
from lens_lora.cli.questions import Questions
from lens_lora.errors import ArgumentError, many, setting, warn
from lens_lora.formats.folders import (
    folders_in,
    one_base,
    stated_base,
)
from lens_lora.runs.processes import Processes, launched, launched_count, rank
from lens_lora.sweeps.analyses import ANALYSES, BY_TOKEN, chosen, require_no_slopes
from lens_lora.sweeps.records import Record, each_record, read_records

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from lens_lora.formats.tokenizers import OwnTokenizer


_Out = Annotated[
    Path, typer.Option(dir_okay=False, help="File to write; its name ends in .parquet.")
]
_Resume = Annotated[
    bool, typer.Option(help="Continue the results at --out, or remove them and start over.")
]


def _require_parquet(out: Path) -> None:
    """Refuse another name than a Parquet file's."""
    if out.suffix != ".parquet":
        raise typer.BadParameter(f"--out {out}: expected a name that ends in .parquet.")


def _shard_of(given: str | None) -> tuple[int, int] | None:
    """Read the shard that `--shard i/n` names; None without this option."""
    if given is None:
        return None
    index, _, count = given.partition("/")
    if not (index.isdecimal() and count.isdecimal()) or not 1 <= int(index) <= int(count):
        raise typer.BadParameter(f"--shard {given}: expected i/n, shard i of n, counted from 1.")
    return int(index), int(count)


_Shard = Annotated[
    str | None,
    typer.Option(
        help="Run only shard i/n, counted from 1, such as a task of a Slurm array. `lens-lora "
        "gather` joins the shards."
    ),
]


@options.with_options
def sweep(
    adapter: options.AdapterIfOther = None,
    *,
    prompts: Annotated[
        Path,
        options.input_file(
            "A JSONL or CSV file with prompt (or messages, in JSONL), doc, pre and optionally id. "
            "For a --readout of a response, it has response in place of doc and pre."
        ),
    ],
    out: _Out = Path("results.parquet"),
    analysis: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Any of {', '.join(ANALYSES)}; may be repeated. Default: first_order. Or one of "
            f"{', '.join(BY_TOKEN)}, which need no doc and pre."
        ),
    ] = None,
    readout: Annotated[
        Literal["margin", "log-prob", "kl"],
        typer.Option(
            help="margin: of doc and pre. log-prob: of each record's response. kl: between the two "
            "models over the response (for path, add_one and leave_one_out)."
        ),
    ] = "margin",
    batch_size: Annotated[int, typer.Option(min=1, help="How many prompts are run together.")] = 8,
    limit: Annotated[
        int | None, typer.Option(min=1, help="How many records to run, counted from the first.")
    ] = None,
    resume: _Resume = True,
    shard: _Shard = None,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Ask the same of hundreds of prompts. If it is interrupted, run it again to resume.

    Over several processes, on GPUs or CPUs:

    accelerate launch --multi_gpu --num_processes 2 -m lens_lora sweep …
    """
    _require_parquet(out)
    part = _shard_of(shard)
    names = chosen(analysis or ["first_order"])
    if readout == "kl":
        require_no_slopes(names, setting("readout", readout))
    _require_result_for(json, names, shard)
    _require_devices_apart(base, launched_count())
    rows = _records(prompts, names, limit, has_margin=readout == "margin")
    asked = _Asked(rows, names, readout, out, part, resume)
    is_first_process = rank() == 0
    if is_first_process:
        files.require_place(out, "--out")
    is_quiet = quiet or not is_first_process
    written = files.writable({"--json": json})
    folder = files.folder_of(adapter, within, quiet=is_quiet)
    files.require_apart({"--out": out, **written}, base, [folder], prompts)

    with running.at_work(base, quiet=is_quiet) as progress:
        processes = launched()
        loaded = ll.load_adapter(folder)
        command: str | None = None
        if asked.may_have_finished:
            with running.step("Reading the files of model and adapter", progress):
                facts = {"analyses": list(names), "readout": readout}
                command = finished.command_digest(base, loaded, folder, facts)
        before = _finished_before(asked, command, loaded)
        if before is not None:
            _end(before, processes, json)
            return
        lens = running.lens_for(base.placed(processes.device), loaded, progress)
        result = _swept(lens, asked, batch_size, show_progress=not progress.quiet)
        if isinstance(result, ll.results.SweepShard):
            _tell_shard(result, out)
            return
        if processes.is_main:
            _remember(result, command)
        _end(result, processes, json)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The questions of a sweep, as the command line gives them.

    Attributes:
        rows: the records.
        names: the analyses.
        readout: 'margin', 'log-prob' or 'kl'.
        out: the file to write.
        shard: (i, n) for shard i of n; None for the whole.
        resume: whether what is at `out` is continued.
    """

    rows: Iterable[Record]
    names: tuple[str, ...]
    readout: str
    out: Path
    shard: tuple[int, int] | None
    resume: bool

    @property
    def kind_of_readout(self) -> type[ll.AnswerLogProb] | type[ll.KL] | None:
        """The class of readout of each record's response; None for the margin."""
        kinds = {"margin": None, "log-prob": ll.AnswerLogProb, "kl": ll.KL}
        return kinds[self.readout]

    @property
    def may_have_finished(self) -> bool:
        """Whether an earlier run may have finished it; shards and rows by token run again."""
        return self.shard is None and self.names[0] not in BY_TOKEN


def _finished_before(
    asked: _Asked, command: str | None, adapter: ll.Adapter
) -> ll.results.SweepResult | None:
    """Return the result of an earlier run of the same command, if it finished; otherwise None.

    Raises:
        SweepError: the file at `out` belongs to another sweep.
    """
    from lens_lora.sweeps.sweep import require_resumable

    if not asked.resume or asked.shard is not None:
        return None
    require_resumable(asked.out, adapter, asked.names, asked.kind_of_readout)
    if command is None:
        return None
    return finished.finished_sweep(asked.out, command, list(asked.rows), asked.names)


def _swept(
    lens: ll.LoraLens, asked: _Asked, batch_size: int, *, show_progress: bool
) -> ll.results.SweepResult | ll.results.ActivationsFile | ll.results.SweepShard:
    """Run the sweep; if it is interrupted, say which prompts are finished."""
    kept = functools.partial(_kept, asked.out)
    with warnings.catch_warnings(), running.told_if_interrupted(kept):
        # A sweep warns of bad records, which the command lists itself.
        warnings.simplefilter("ignore")
        return ll.sweep(
            lens,
            asked.rows,
            asked.names,
            out=asked.out,
            readout=asked.kind_of_readout,
            batch_size=batch_size,
            resume=asked.resume,
            shard=asked.shard,
            progress=show_progress,
        )


def _require_devices_apart(base: options.BaseModel, processes: int) -> None:
    """Refuse a device map for several processes.

    Args:
        base: how the base model is loaded.
        processes: how many processes were launched.

    Raises:
        ArgumentError: each process would place a model on the same devices.
    """
    if processes > 1 and base.device_map is not None:
        raise ArgumentError(
            f"--device-map and {processes} processes: each would place a model of its "
            "own on the same devices. Launch one process for a model over several devices, or "
            "leave --device-map out: each process then takes the device of its number."
        )


def _kept(out: Path) -> str:
    """Write the sentence of an interrupted sweep on the prompts that are finished."""
    from lens_lora.sweeps.sweep import is_begun

    if not is_begun(out):
        return "No prompt was finished."
    return f"Finished prompts are kept beside {out}; run the same command again to resume."


def _tell_shard(shard: ll.results.SweepShard, out: Path) -> None:
    """Print what a shard has done, and how to join the shards."""
    running.say(repr(shard))
    running.say(f"Once all shards are finished: lens-lora gather {out}")


def _remember(
    result: ll.results.SweepResult | ll.results.ActivationsFile, command: str | None
) -> None:
    """Write to a file which command finished the sweep."""
    if isinstance(result, ll.results.SweepResult) and command is not None:
        finished.remember(result, command)


def _require_result_for(json: Path | None, names: Sequence[str], shard: str | None) -> None:
    """Refuse --json for a sweep with a row for each token, and for a shard."""
    if json is not None and names[0] in BY_TOKEN:
        raise typer.BadParameter(
            f"--json: {names[0]} has a row for each token; read the file at --out."
        )
    _require_whole(json, shard)


def _require_whole(json: Path | None, shard: str | None) -> None:
    """Refuse --json for a shard, which has no result of its own."""
    if json is not None and shard is not None:
        raise typer.BadParameter(
            "--json: a shard is not a result yet; give --json to `lens-lora gather`."
        )


def _end(
    result: ll.results.SweepResult | ll.results.ActivationsFile,
    processes: Processes,
    json: Path | None,
) -> None:
    """Print what was found, and exit with 1 if no record has numbers."""
    if processes.is_main:
        _print(result, processes.count)
        if json is not None and isinstance(result, ll.results.SweepResult):
            files.write_rows(json, "SweepResult", result.prompts())
            running.say(f"JSON: {json.absolute()}")
    if not result.done:
        raise typer.Exit(1)


def _records(
    prompts: Path, names: Sequence[str], limit: int | None, *, has_margin: bool
) -> Iterable[Record]:
    """Read the first records of a file, each with what the analyses need."""
    if names[0] not in BY_TOKEN:
        records = read_records(prompts, with_answers=has_margin, with_response=not has_margin)
        return records[:limit]
    if not has_margin:
        raise typer.BadParameter(f"--readout: {names[0]} has no readout; leave it out.")
    return islice(each_record(prompts, with_answers=False), limit)


@options.with_options
def scan(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A folder or hub id with adapters in it, at any depth."
        ),
    ],
    *,
    asked: Questions,
    out: _Out = Path("scan.parquet"),
    group: Annotated[
        Literal["layer", "site", "kind"],
        typer.Option(help="The groups over which each adapter's values are summed."),
    ] = "layer",
    resume: _Resume = True,
    shard: _Shard = None,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """First order of every adapter in a folder, from a single pass over the base for all."""
    _require_parquet(out)
    part = _shard_of(shard)
    _require_whole(json, shard)
    _require_devices_apart(base, launched_count())
    questions = asked.checked()
    files.require_place(out, "--out")
    written = files.writable({"--json": json})
    found = folders_in(folder, revision=within.revision, subfolder=within.subfolder)
    folders = list(found.values())
    files.require_apart({"--out": out, **written}, base, folders, asked.prompts)
    named = _base_of_all(folders, base)

    with running.at_work(base, quiet=quiet) as progress:
        running.warn_of_spaces(questions)
        processes = launched()
        loaded = running.load_model_of(named, progress, base.placed(processes.device))
        model, beside = _hooked(loaded, folders, base, progress)
        prompts, readout = running.margin_of(model, questions, base.prepend_bos)
        kept = f"Finished adapters are kept beside {out}; run the same command again to resume."
        with running.quiet_libraries(), running.told_if_interrupted(lambda: kept):
            bank = ll.bank(
                model,
                prompts,
                readout,
                hf_model=beside,
                prepend_bos=base.prepend_bos,
                max_memory=base.max_memory,
                progress=not quiet,
            )
            table = bank.scan(
                folder,
                revision=within.revision,
                subfolder=within.subfolder,
                group=group,
                out=out,
                resume=resume,
                any_base=base.model is not None,
                shard=part,
                progress=not quiet,
            )
        if part is not None:
            running.say(f"Shard {shard} is finished. Once all are: lens-lora gather {out}")
            return
        if processes.is_main:
            _print_scan(table, out, json)
    if table["error"].notna().all():
        raise typer.Exit(1)


def _base_of_all(folders: Sequence[Path], base: options.BaseModel) -> str | None:
    """Return the base that all adapters name; if --model names one, the first adapter's.

    Raises:
        AdapterError: the adapters name different bases, and --model names none.
    """
    bases = [(str(path), stated_base(path)) for path in folders]
    if base.model is not None:
        bases = bases[:1]
    remedy = "scan the adapters of each base apart, or name one base for all with --model."
    return one_base(bases, remedy)


def _hooked(
    loaded: running.Loaded, folders: Sequence[Path], base: options.BaseModel, progress: Console
) -> tuple[Any, PreTrainedModel | None]:
    """Make the hooked model, and return it with the base if a bank needs that as well."""
    hf_model, _ = loaded
    tokenizer = _tokenizer_for(folders, loaded)
    with running.step("Building the hooked model", progress):
        model, class_name = running.hooked_by(base, hf_model, tokenizer)
    beside = hf_model if class_name == "HookedTransformer" else None
    return model, beside


def gather(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The file that all shards were given as --out.", dir_okay=False
        ),
    ],
    json: options.JsonOption = None,
) -> None:
    """Join the shards of a sweep, or of a scan, into one result. Loads no model."""
    written = files.writable({"--json": json})
    files.require_unread({"OUT": out, **written}, [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The bad records are listed below.
        found = ll.gather(out)
    if isinstance(found, ll.results.SweepResult):
        _end(found, launched(), json)
    else:
        _print_scan(found, out, json)


def _tokenizer_for(folders: Sequence[Path], loaded: running.Loaded) -> OwnTokenizer:
    """Choose the tokenizer that reads the prompts for all adapters.

    If all adapters were saved with the same tokenizer, as the checkpoints of a run are, it is that
    one. Otherwise it is the base's, and a warning names the adapters whose own differs.
    """
    from lens_lora.formats.tokenizers import (
        OwnTokenizer,
        differences_from,
        files_digest,
        has_own_tokenizer,
        own_tokenizer,
    )

    base, tokenizer = loaded
    by_files: dict[str, list[Path]] = {}
    for folder in folders:
        if has_own_tokenizer(folder):
            by_files.setdefault(files_digest(folder), []).append(folder)
    if [len(same) for same in by_files.values()] == [len(folders)]:
        embedding: Any = base.get_input_embeddings()
        rows = len(embedding.weight)
        return own_tokenizer(folders[0], tokenizer, rows=rows, config=base.config)
    for same in by_files.values():
        differing = differences_from(tokenizer, same[0])
        if differing:
            names = ", ".join(folder.name for folder in same[:3])
            more = ", …" if len(same) > 3 else ""
            warn(
                f"{names}{more}: saved with a tokenizer that differs from the base's, by which all "
                f"prompts are read: {'; '.join(differing)}.",
                in_shell="lens-lora explain reads them by the adapter's own.",
            )
    return OwnTokenizer(tokenizer)


# The most adapters, or bad records, that are printed.
_LISTED = 10


def _print_scan(table: pd.DataFrame, out: Path, json: Path | None) -> None:
    """Print the adapters with the largest Σ a, those that cannot be used, and the result's file."""
    means: Any = table.dropna(subset="total").groupby("adapter")["total"].mean()
    readouts = table["readout"].dropna().unique()
    of_readout = ""
    if len(readouts) == 1:
        of_readout = f" of {readouts[0]}"
    running.say(f"First order{of_readout}, summed over all modules, as a mean over prompts.")
    running.say(f"The largest of {many(len(means), 'adapter')}:")
    for name in means.abs().nlargest(_LISTED).index:
        running.say(f"  {means[name]:+9.3g}  {name}")
    bad = table.dropna(subset="error")
    for name, error in zip(bad["adapter"][:_LISTED], bad["error"], strict=False):
        running.say(f"  {name}: {error}")
    if len(bad):
        running.say(f"{many(len(bad), 'adapter')} cannot be used.")
    running.say(f"All numbers: {out.absolute()}")
    if json is not None:
        files.write_rows(json, "scan", table)
        running.say(f"JSON: {json.absolute()}")


def _print(result: ll.results.SweepResult | ll.results.ActivationsFile, processes: int) -> None:
    """Print what the files hold, where they are, and which records are bad."""
    damaged: Sequence[str] = ()
    if isinstance(result, ll.results.ActivationsFile):
        bad = [(row["id"], row["error"]) for row in result.bad().to_dict("records")]
    else:
        bad = result.errors
        damaged = result.damaged
    by_processes = f", by {processes} processes" if processes > 1 else ""
    running.say(f"{result!r}{by_processes}")
    for identity, error in bad[:_LISTED]:
        running.say(f"  {identity}: {error}")
    if len(bad) > _LISTED:
        running.say(f"  … and {len(bad) - _LISTED} more, in the column 'error'")
    for damage in damaged:
        running.say(f"  run again, as its file could not be read: {damage}")
