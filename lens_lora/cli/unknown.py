"""Name in the error the command or option that was meant, when one is unknown.

typer suggests names that are spelt alike. Here a name is also understood by its meaning: the error
for `lens-lora merge` names `verify`, that for `--answer` names `--doc`, and that for a prompt
without `--prompt` names this option. `GuessingGroup` and `GuessingCommand` add this to the message
of typer's own error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lens_lora.guesses import meant_parameters
from lens_lora.vocabulary import meaning

# In some versions typer has click's errors under names of its own; this is their base class in all.
_UsageError: Any = typer.BadParameter.__mro__[1]

# Short options as other programs have them, with the options that they mean here.
_IN_A_SHELL = {
    "-o": ("out", "report", "save"),
    "-m": ("model",),
    "-p": ("prompt",),
    "-q": ("quiet",),
    "-v": ("quiet",),
    "-d": ("device",),
    "-n": ("limit", "max_new_tokens"),
}
# Options that no command has, with what the commands that read prompts do instead.
_ALL_MODULES = "every module and layer is computed, and the page and its tables have them all."
_EACH_ONCE = "each prompt is asked once; --prompts FILE takes a list of your own."
_DONE_INSTEAD = {
    **dict.fromkeys(("layer", "layers", "module", "modules", "site", "sites"), _ALL_MODULES),
    **dict.fromkeys(("samples", "sample", "num_samples", "n_samples", "max_samples"), _EACH_ONCE),
}
_ON_TEXTS = "it reads texts in place of prompts, one a line: --texts FILE."
_OF_A_RANK = "no adapter is read: --rank is that of a LoRA over every linear module."
_SAID_ANYWAY = "everything is printed unless --quiet is given."
# The beginning of typer's message about too many arguments.
_TOO_MANY = "unexpected extra argument"
# The endings of files that hold prompts or records.
_OF_PROMPTS = (".txt", ".jsonl", ".json", ".csv")


class GuessingGroup(TyperGroup):
    """The group of commands, which answers an unknown command by its meaning."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command as typer does; if there is none, the error says what may be meant."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            if "Did you mean" not in error.message:
                error.message = f"No command {args[0]!r}{_command_meant(args[0])}"
            raise


class GuessingCommand(TyperCommand):
    """A command, which answers an unknown option by its meaning."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options as typer does; if one is unknown, the error says what may be meant."""
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            option = getattr(error, "option_name", None)
            meant = self._option_meant(option) if option else ""
            if meant:
                error.message = f"No option {option}: {meant}"
                error.possibilities = None
            elif _TOO_MANY in error.message:
                error.message += self._option_of_extra(error.message)
            raise

    def _option_of_extra(self, message: str) -> str:
        """Return the end of a message about too many arguments: the option that takes them.

        Args:
            message: typer's message, which ends with the arguments in brackets.
        """
        names = {str(each.name) for each in self.params}
        _, _, in_brackets = message.partition(" (")
        extra = in_brackets.rstrip(").")
        is_of_file = Path(extra).suffix in _OF_PROMPTS
        if is_of_file and "prompts" in names:
            return ". A file of prompts is given as --prompts FILE."
        if Path(extra).is_dir():
            return (
                ". `lens-lora compare ADAPTER OTHER` compares two adapters, and `lens-lora scan "
                "FOLDER` asks many."
            )
        if "prompt" in names:
            return '. A prompt is given as --prompt "…".'
        return ""

    def _option_meant(self, option: str) -> str:
        """Return a sentence with the option that is meant; '' if none is known."""
        written = {str(each.name): _written(each) for each in self.params}
        keyword = option.lstrip("-").replace("-", "_")
        # An argument's own name, as in --adapter, means that argument.
        others = _IN_A_SHELL.get(option) or (keyword, *meant_parameters(keyword))
        meant = [written[name] for name in others if name in written]
        if meant:
            return f"it is {' or '.join(meant[:2])}."
        if keyword in _DONE_INSTEAD and "prompts" in written:
            return _DONE_INSTEAD[keyword]
        if keyword in ("prompt", "prompts", "chat") and "texts" in written:
            return _ON_TEXTS
        if keyword in ("adapter", "adapters", "lora") and "rank" in written:
            return _OF_A_RANK
        if keyword in ("verbose", "debug") and "quiet" in written:
            return _SAID_ANYWAY
        found = meaning(keyword)
        if found is None or not found.notion.shell:
            return ""
        return f"{found.notion.shell}."


def _written(parameter: Any) -> str:
    """Return how a parameter is written in a shell: '--doc', or 'the argument ADAPTER'."""
    longest = max(parameter.opts, key=len)
    if longest.startswith("-"):
        return longest
    return f"the argument {parameter.metavar or longest.upper()}"


def _command_meant(name: str) -> str:
    """Return the end of a message about an unknown command."""
    notion = meaning(name)
    return f": {notion.in_shell}." if notion is not None else "; `lens-lora --help` lists them."
