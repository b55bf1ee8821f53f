"""`lens-lora forms`: what each form in which an adapter can be shipped does to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lens_lora.cli import files, options, running
from lens_lora.cli.questions import Questions, prompts_of
from lens_lora.ship.form_names import FORMS, Form

_FORM = "A form, such as 'merged NF4'; may be repeated. Default: all."
_CSV = "Table to write."


@options.with_options
def forms(
    adapter: options.AdapterIfOther = None,
    *,
    asked: Questions,
    form: Annotated[list[str] | None, typer.Option(metavar="FORM", help=_FORM)] = None,
    csv: Annotated[Path | None, typer.Option(dir_okay=False, help=_CSV)] = None,
    json: options.JsonOption = None,
    quiet: options.QuietOption = False,
    within: options.Within,
    base: options.BaseModel,
) -> None:
    """Measure what bfloat16, NF4, Q8_0, Q4_0, Q4_1 and Q4_K do to the answers, merged or not.

    lens-lora forms path/to/adapter --prompt 'The capital of France is' --form 'merged NF4'
    """
    which = _known(form or FORMS)
    questions = asked.checked(answered=False)
    outputs = files.writable({"--csv": csv, "--json": json})
    folder = files.folder_of(adapter, within, quiet=quiet)
    files.require_apart(outputs, base, [folder], asked.prompts)

    with running.at_work(base, quiet=quiet) as progress:
        from lens_lora.ship.forms import forms as forms_of
        from lens_lora.ship.words import forms_story, forms_table

        lens = running.announced(running.lens_for(base, folder, progress))
        found = forms_of(lens, prompts_of(questions), which, progress=not quiet)
        if csv is not None:
            found.to_frame().to_csv(csv, index=False)
        if json is not None:
            files.write_json(json, [found])
        # The story comes after the table, so that it is what remains on a small screen.
        Console().print(forms_table(found))
        running.tell(forms_story(found))
        if csv is not None:
            running.say(f"Table: {csv.absolute()}")
        if json is not None:
            running.say(f"JSON: {json.absolute()}")


def _known(names: Sequence[str]) -> list[Form]:
    """Return the named forms, in the order in which all forms are listed."""
    for name in names:
        if name not in FORMS:
            raise typer.BadParameter(
                f"{name!r}; expected some of {', '.join(FORMS)}.", param_hint="--form"
            )
    return [form for form in FORMS if form in names]
