"""`lens-lora card`: what an adapter is and what was verified, for its model card."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lens_lora.cli import files, options, running
from lens_lora.cli.beside_base import Inputs, LensMade, read_given, verification_of
from lens_lora.cli.expecting import read_expectations
from lens_lora.cli.written_card import is_hub_id, subject_of
from lens_lora.demonstration.base_names import EMBEDDED, EMBEDDED_HUB_ID
from lens_lora.errors import LensLoraError, warn
from lens_lora.formats.folders import stated_base, stated_fields
from lens_lora.formats.hub import is_on_hub

if TYPE_CHECKING:
    from lens_lora.ship.card import Card

_to_write = functools.partial(typer.Option, dir_okay=False)

_README = "README.md"
# The value of --out with which the block is printed instead of being written into a file.
_STDOUT = "-"
_BRIEF = "A file of lens-lora diff --json; its first claim is measured again and quoted."
_OUT = "The README.md into which the block goes, or '-' to print it. Default: the adapter's own."


@options.with_options
def card(
    adapter: options.AdapterArgument,
    *,
    merged: Annotated[
        Path | None,
        typer.Option(exists=True, help="Folder or .gguf file that should be base plus adapter."),
    ] = None,
    lora: Annotated[
        Path | None, options.input_file("A .gguf file that should be the adapter.")
    ] = None,
    expect: Annotated[
        Path | None, options.input_file("A .jsonl file of margins, as lens-lora verify takes it.")
    ] = None,
    max_kl: Annotated[
        float | None, options.least(0, "Nats per token allowed on neutral texts.")
    ] = None,
    brief: Annotated[Path | None, options.input_file(_BRIEF)] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help=_OUT)] = None,
    json_file: Annotated[Path | None, _to_write("--json", help="The card as JSON.")] = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Write a block for the model card: what this adapter is, what it changes, what was verified.

    lens-lora card path/to/adapter --merged path/to/merged --expect facts.jsonl

    The exit code is that of lens-lora verify.
    """
    _require_readme(out, adapter)
    expectations = [] if expect is None else read_expectations(expect)
    claim = {} if brief is None else _first_claim(brief)
    readme = _named_readme(out)
    outputs = files.writable({"--out": readme, "--json": json_file})
    folder = files.folder_of(adapter, within, quiet=quiet)
    if out is None:
        readme = folder / _README
        outputs |= files.writable({"--out": readme})
    given_paths = {"merged": merged, "lora": lora, "expect": expect}
    paths = {name: path.absolute() for name, path in given_paths.items() if path is not None}
    files.require_apart(outputs, base, [folder], brief, *paths.values())
    stated = _stated(folder, paths, max_kl, base) | claim
    inputs = Inputs(merged, lora, expectations, max_kl)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.ship.card_lines import card_of
        from lens_lora.ship.card_readme import with_card

        base = base.placed("cpu")
        given = read_given(folder, base, progress)
        lens_over = LensMade(base, given, progress, is_announced=readme is not None)
        verification = verification_of(given, lens_over, inputs, progress=not quiet)
        subject = subject_of(folder, given, lens_over.lens, verification, base, stated, paths)
        with running.quiet_libraries():
            made = card_of(subject)
        written = with_card(readme, made, _metadata(folder, base))
        _warn_of_base(written.card, readme)
        if json_file is not None:
            json_file.write_text(f"{written.card.to_json()}\n", encoding="utf-8")
        if readme is None:
            typer.echo(written.text, nl=False)
        else:
            _replace(readme, written.text)
            running.tell(verification.story())
            running.say(f"Card: {readme.absolute()}, {len(made.lines)} lines")
    raise typer.Exit(verification.exit_code)


def _require_readme(out: str | None, adapter: str) -> None:
    """Refuse an adapter on the hub without --out, as it has no README.md of its own on disk."""
    if out is None and is_on_hub(adapter):
        raise typer.BadParameter(
            f"{adapter} is no folder here; for an adapter on the hub, name a README.md, or '-' to "
            "print the block.",
            param_hint="--out",
        )


def _named_readme(out: str | None) -> Path | None:
    """Return the file that --out names; None if it names none, or if the block is printed."""
    if out is None or out == _STDOUT:
        return None
    return Path(out)


def _stated(
    folder: Path,
    paths: Mapping[str, Path],
    max_kl: float | None,
    base: options.ModelOptions,
) -> dict[str, str]:
    """List the other inputs as the card states them, with paths from its folder."""
    stated = {name: _from(folder, path) for name, path in paths.items()}
    if max_kl is not None:
        stated["max_kl"] = f"{max_kl:g}"
    if base.model is not None:
        is_folder = Path(base.model).is_dir()
        stated["model"] = _from(folder, Path(base.model)) if is_folder else base.model
    return stated


def _from(folder: Path, path: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _first_claim(brief: Path) -> dict[str, str]:
    """Read the context and words of a brief's first claim or raised words; {} if it has none."""
    try:
        read = json.loads(brief.read_text(encoding="utf-8"))
        claims = [*read["would_say"], *read["raised"]]
        if not claims:
            return {}
        first = claims[0]
        return {"context": str(first["context"]), "says": str(first["says"])}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        fact = f"{brief}: no brief of lens-lora diff --json ({error!r})"
        raise LensLoraError(fact) from error


def _replace(file: Path, text: str) -> None:
    """Write a file whole or not at all, with its own line endings."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        if file.exists():
            temporary.chmod(file.stat().st_mode)
        os.replace(temporary, file.resolve())
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


# --- The metadata for the Hub


def _metadata(folder: Path, base: options.ModelOptions) -> dict[str, str]:
    """Return the fields by which the Hub lists an adapter under its base."""
    asked = EMBEDDED_HUB_ID if base.model == EMBEDDED else base.model
    hub_ids = [name for name in (asked, stated_base(folder)) if is_hub_id(name)]
    fields: dict[str, str] = {}
    if hub_ids:
        fields["base_model"] = str(hub_ids[0])
        fields["base_model_relation"] = "adapter"
    if stated_fields(folder):
        fields["library_name"] = "peft"
    return fields


def _warn_of_base(written: Card, readme: Path | None) -> None:
    """Warn of a base that the Hub would refuse, such as the path that PEFT writes for a folder."""
    stated = written.metadata.get("base_model")
    if stated is not None and not is_hub_id(stated):
        fact = f"{readme}: base_model is {stated!r}, which is no id of the Hub: it refuses that."
        warn(fact, remedy="Write the base's id there.")
