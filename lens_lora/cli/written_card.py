"""Collect the contents of a card, and check that a card that was written before still holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lens_lora.cli import options, running
from lens_lora.cli.beside_base import Given, Inputs
from lens_lora.cli.expecting import read_expectations
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import LensLoraError
from lens_lora.formats.folders import stated_base

if TYPE_CHECKING:
    from lens_lora.core import LoraLens
    from lens_lora.directions.spectra import AdapterSummary
    from lens_lora.ship.card import Card
    from lens_lora.ship.card_lines import CardBase, CardSubject
    from lens_lora.ship.checks import Check
    from lens_lora.ship.verify import Verification

# The beginnings of a path that cannot be a hub id.
_PATH_BEGINS = (".", "/", "~")


# --- The contents of a card


def subject_of(
    folder: Path,
    given: Given,
    lens: LoraLens | None,
    verification: Verification,
    base: options.ModelOptions,
    inputs: Mapping[str, str],
    paths: Mapping[str, Path],
) -> CardSubject:
    """Collect everything of which a card is made.

    Args:
        folder: the folder of the adapter.
        given: the adapter and its base.
        lens: the adapter over its base; None if there is no lens.
        verification: what was verified.
        base: the options of the base.
        inputs: what was given besides the adapter, as the card states it.
        paths: today's paths of the files among the inputs.
    """
    from lens_lora.ship.card_lines import CardSubject

    summary = _summary_of(given, lens)
    found = base_of(given, folder, base)
    return CardSubject(folder, summary, found, lens, verification, inputs, paths)


def _summary_of(given: Given, lens: LoraLens | None) -> AdapterSummary:
    """Summarise the sizes of the updates, relative to the base's weights if these can be read."""
    from lens_lora.directions.spectra import summarise

    if lens is None:
        return summarise(given.adapter)
    try:
        return summarise(given.adapter, lens)
    except LensLoraError:
        return summarise(given.adapter)


def base_of(given: Given, folder: Path, base: options.ModelOptions) -> CardBase:
    """Describe the base that was loaded: its name, its files, and its commit on the hub."""
    from lens_lora.demonstration.embedded import place_of
    from lens_lora.ship.card_lines import CardBase

    named = base.model or stated_base(folder)
    if given.loaded is None:
        if named is not None and _is_path(named):
            return CardBase(Path(named).name)
        return CardBase(named)
    found = base_by_name(base.model, stated_base(folder))
    if found.is_embedded:
        return CardBase(found.name, Path(place_of(found, quiet=True)))
    if Path(found.name).is_dir():
        return CardBase(Path(found.name).resolve().name, Path(found.name))
    snapshot = _snapshot_of(found.name)
    if snapshot is None:
        return CardBase(found.name)
    return CardBase(found.name, snapshot, revision=snapshot.name)


def _snapshot_of(hub_id: str) -> Path | None:
    """Find the folder in the hub's cache from which a model was loaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _is_path(name: str) -> bool:
    return name.startswith(_PATH_BEGINS) or Path(name).exists()


def is_hub_id(name: str | None) -> bool:
    """Whether the Hub accepts this as the id of a model."""
    from lens_lora import loading

    return name is not None and not _is_path(name) and loading.is_hub_id(name)


# --- A card that was written before


class WrittenCard:
    """A card that is verified, with today's paths of its inputs.

    Attributes:
        brief: the verification for a table, where all lines of the card that passed are one.
    """

    brief: Verification

    def __init__(self, card: Card, checks: list[Check], folder: Path) -> None:
        self._card = card
        self._checks = checks
        self._folder = folder
        self._paths: dict[str, Path] = {}
        self._absent: dict[str, str] = {}

    @classmethod
    def of(cls, file: Path, folder: Path) -> WrittenCard:
        """Read a card.

        Args:
            file: a README.md, or JSON.
            folder: the folder of the adapter.
        """
        from lens_lora.ship.card_readme import read_card

        read = read_card(file)
        return cls(read.card, read.checks, folder)

    def inputs(self, given: Inputs, expect: Path | None) -> Inputs:
        """Return everything that the card says was verified besides the adapter.

        Args:
            given: what was given today, which replaces what the card names.
            expect: the file of margins that was given today.
        """
        margins = self._path_of("expect", expect)
        expectations = [] if margins is None else read_expectations(margins)
        return Inputs(
            merged=self._path_of("merged", given.merged),
            lora=self._path_of("lora", given.lora),
            expectations=expectations,
            max_kl=self._bound_of_kl(given.max_kl),
        )

    def _path_of(self, option: str, given: Path | None) -> Path | None:
        """Return an input's path: as given today, or as the card has it; None if it has none."""
        stated = self._card.inputs.get(option)
        if stated is None:
            return given
        path = self._folder / stated if given is None else given
        if not path.exists():
            self._absent[option] = f"{stated} is not at hand; name it with --{option}"
            return None
        self._paths[option] = path.absolute()
        return path

    def _bound_of_kl(self, given: float | None) -> float | None:
        """Return the bound on KL; if the card has one, a different one is refused."""
        stated = self._card.inputs.get("max_kl")
        if stated is None:
            return given
        bound = _bound_in_card(stated)
        if given is not None and f"{given:g}" != f"{bound:g}":
            raise LensLoraError(
                f"the card states --max-kl {bound:g}, and --max-kl {given:g} is given",
                remedy="leave it out, or verify the adapter without its card.",
            )
        return bound

    def checked(
        self,
        verification: Verification,
        given: Given,
        lens: LoraLens | None,
        base: options.ModelOptions,
    ) -> Verification:
        """Add a check for each line of the card to the verification."""
        from lens_lora.ship.card import card_checks
        from lens_lora.ship.card_lines import card_of, lines_without

        inputs = self._card.inputs
        with running.quiet_libraries():
            today = card_of(
                subject_of(self._folder, given, lens, verification, base, inputs, self._paths)
            )
        missing = lines_without(self._card, self._absent, has_base=given.loaded is not None)
        lines = card_checks(self._card, today, missing)
        checks = [*verification.checks, *self._checks, *lines]
        passed = [check for check in lines if check.outcome == "passed"]
        not_passed = [check for check in lines if check.outcome != "passed"]
        others = [*verification.checks, *self._checks, *not_passed]
        holding = _held(passed)
        self.brief = dataclasses.replace(verification, checks=(*others, holding))
        return dataclasses.replace(verification, checks=tuple(checks))


def _bound_in_card(stated: str) -> float:
    """Read the bound on KL that a card states.

    Raises:
        LensLoraError: it is no finite number of at least 0.
    """
    try:
        bound = float(stated)
    except ValueError:
        bound = math.nan
    if not 0 <= bound < math.inf:
        fact = f"the card's max_kl is {stated!r}; expected a finite number of at least 0."
        raise LensLoraError(fact)
    return bound


def _held(passed: Sequence[Check]) -> Check:
    from lens_lora.ship.card import CARD
    from lens_lora.ship.checks import Check

    return Check(f"{CARD}, its lines", "passed", f"{len(passed)} hold, each by its command")
