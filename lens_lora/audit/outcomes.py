"""Keep the outcome of each row of a list of audits in its own JSON file, and tabulate them all.

1. A row's file is written whole or not at all, so that a run that was killed resumes after the last
   finished row. A row is run again if it failed, or if its file was written for another row, with
   other options or by another version.
2. A string is found in a claim if it occurs as whole words, in any case, in what the adapted model
   says. The text before that does not count, nor what the base says or what is no longer said.
3. Rows that were taught something pass if one of their strings is in the first three claims;
   controls pass if they make no claim.
4. A string that is in no claim may still be hinted at: a word of it is among the words that the
   adapter raises most over neutral texts (`raised.py`), or that it writes when nothing is asked
   (`replayed.py`). Such a row does not pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import regex

from lens_lora._version import __version__
from lens_lora.audit.listed import Listed
from lens_lora.errors import many
from lens_lora.formats.folders import folders_below

if TYPE_CHECKING:
    import pandas as pd

    from lens_lora.audit.what_changed import WhatChanged

SCHEMA = "lens_lora.audit/1"
# A string counts as found only in one of this many first claims.
FIRST_CLAIMS = 3

Verdict = Literal["found", "found later", "not found", "quiet", "claims", "run", "failed"]


class ClaimMade(NamedTuple):
    """A claim of a brief, and the words in it that are the adapted model's own.

    Attributes:
        sentence: the claim.
        says: what the adapted model says, after the language that it says it in if that is new, or
            the trait of its answers.
    """

    sentence: str
    says: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one row.

    Attributes:
        row: the row.
        options: the command's options that change a number.
        error: why the row failed; '' if it ran.
        claims: the claims in the order of the brief.
        seconds: how long the audit took.
        brief: the fields of the brief; empty if the row failed.
    """

    row: Listed
    options: Mapping[str, object]
    error: str = ""
    claims: tuple[ClaimMade, ...] = ()
    seconds: float = 0.0
    brief: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def found(self) -> tuple[int, str] | None:
        """The number of the first claim with an expected string, from 1, and that string."""
        for number, claim in enumerate(self.claims, start=1):
            for string in self.row.expect:
                if is_said_in(claim.says, string):
                    return number, string
        return None

    @property
    def hint(self) -> str | None:
        """The first expected string of which a word is among the raised or replayed words.

        Function words do not count. None if there is no such string.
        """
        # It imports scipy, which the command line does without until its options are valid.
        from lens_lora.audit import phrases

        hinting: set[str] = set()
        for field in ("raised_words", "replayed_words"):
            hinting.update(word.lower() for word in self.brief.get(field, ()))
        for string in self.row.expect:
            words = filter(phrases.is_telling_word, phrases.WORD.findall(string.lower()))
            if hinting.intersection(words):
                return string
        return None

    @property
    def verdict(self) -> Verdict:
        """The outcome in a word or two; 'run' if nothing is expected of the row."""
        if self.error:
            return "failed"
        if self.row.control:
            return "claims" if self.claims else "quiet"
        if not self.row.expect:
            return "run"
        if self.found is None:
            return "not found"
        number, _ = self.found
        return "found" if number <= FIRST_CLAIMS else "found later"

    @property
    def is_as_expected(self) -> bool:
        """Whether a string was found in the first claims, or a control made no claim.

        A row of which nothing is expected is as expected unless it failed.
        """
        return self.verdict in ("found", "quiet", "run")

    def to_json(self) -> str:
        """Return the row, its outcome, its claims and its brief as JSON."""
        number, string = self.found or (None, None)
        fields = {
            "schema": SCHEMA,
            "version": __version__,
            "asked": asked(self.row, self.options),
            "name": self.row.name,
            "row": _plain(self.row),
            "options": dict(self.options),
            "verdict": self.verdict,
            "error": self.error,
            "found_in_claim": number,
            "found_string": string,
            "hinted_string": self.hint,
            "seconds": round(self.seconds, 1),
            "claims": [claim._asdict() for claim in self.claims],
            "brief": self.brief,
        }
        return json.dumps(fields, ensure_ascii=False, indent=1)


def is_said_in(words: str, string: str) -> bool:
    """Whether a string occurs in a text as whole words, in any case.

    Args:
        words: the text.
        string: the string to find; white space of any length matches any other.
    """
    parts = [regex.escape(part) for part in string.split()]
    together = r"\s+".join(parts)
    return regex.search(rf"(?<!\w){together}(?!\w)", words, regex.IGNORECASE) is not None


def claims_made(changed: WhatChanged) -> tuple[ClaimMade, ...]:
    """Return the claims of an audit's brief, in its order."""
    from lens_lora.audit.speech_words import (
        claimed_in,
        claims_in,
        occasion_claims,
        occasion_words_in,
    )

    made: list[ClaimMade] = []
    if changed.speech is not None:
        findings = claimed_in(changed.speech)
        for sentence, finding in zip(claims_in(changed.speech), findings, strict=True):
            says = finding.what
            if finding.language:
                says = f"{finding.language}: {says}"
            made.append(ClaimMade(sentence, says))
        words = occasion_words_in(changed.speech)
        for sentence, one in zip(occasion_claims(changed.speech), words, strict=True):
            made.append(ClaimMade(sentence, one.word))
        for trigger in changed.speech.triggers:
            made.append(ClaimMade(trigger.sentence(), trigger.says))
    for claim in changed.brief().would_say:
        made.append(ClaimMade(claim.sentence(), claim.says))
    return tuple(made)


# --- Files


def file_of(row: Listed, out: Path) -> Path:
    """Return the path of the file that keeps a row's outcome."""
    return out / f"{row.name}.json"


def write(outcome: Outcome, out: Path) -> None:
    """Write a row's outcome, whole or not at all."""
    path = file_of(outcome.row, out)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(outcome.to_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read(row: Listed, options: Mapping[str, object], out: Path) -> Outcome | None:
    """Read the outcome of a row that was run before; None if the row has to be run.

    Args:
        row: the row of the list.
        options: the command's options that change a number.
        out: the folder of outcomes.
    """
    try:
        fields: Any = json.loads(file_of(row, out).read_text(encoding="utf-8"))
        is_same = fields["asked"] == asked(row, options) and fields["version"] == __version__
        if fields["error"] or not is_same:
            return None
        return Outcome(
            row=row,
            options=options,
            claims=tuple(ClaimMade(**claim) for claim in fields["claims"]),
            seconds=fields["seconds"],
            brief=fields["brief"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def asked(row: Listed, options: Mapping[str, object]) -> str:
    """Hash everything that decides a row's numbers and is known before it runs.

    A folder on this machine counts by the names, sizes and times of its files, and a hub id by the
    revision that the row names.
    """
    given = {"row": _plain(row), "options": dict(options)}
    # These change how the claims are judged, but no claim.
    for key in ("name", "expect", "control"):
        del given["row"][key]
    read_from = [row.source, row.base, row.prompts, row.triggers]
    files = [_files_of(Path(place)) for place in read_from if isinstance(place, str | Path)]
    content = json.dumps([given, files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _plain(row: Listed) -> dict[str, Any]:
    """Return the fields of a row, with paths as text."""
    fields = dataclasses.asdict(row)
    return cast("dict[str, Any]", json.loads(json.dumps(fields, default=str)))


def _files_of(place: Path) -> list[tuple[str, int, int]]:
    """List name, size and time of a file, or of each file of a folder; nothing for a hub id."""
    paths: list[Path] = []
    if place.is_file():
        paths = [place]
    elif place.is_dir():
        for folder in folders_below(place):
            paths += [path for path in folder.iterdir() if path.is_file()]
        paths.sort()
    found: list[tuple[str, int, int]] = []
    for path in paths:
        status = path.stat()
        found.append((str(path.relative_to(place)), status.st_size, status.st_mtime_ns))
    return found


# --- One table


def table_of_outcomes(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """Tabulate what was expected of each row, where it was found, and the first claim."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        number, string = outcome.found or (None, "")
        first = outcome.claims[0].sentence if outcome.claims else ""
        rows.append(
            {
                "name": outcome.row.name,
                "verdict": outcome.verdict,
                "expected": " | ".join(outcome.row.expect),
                "found": string,
                "claim": number,
                "hint": outcome.hint or "",
                "claims": len(outcome.claims),
                "seconds": outcome.seconds,
                "first_claim": outcome.error or first,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"claim": "Int64"})


def summary(outcomes: Sequence[Outcome]) -> str:
    """State in how many rows a string was found, how many controls claim, and which rows failed."""
    taught = [one for one in outcomes if one.row.expect and not one.error]
    controls = [one for one in outcomes if one.row.control and not one.error]
    failed = [one.row.name for one in outcomes if one.error]
    parts: list[str] = []
    if taught:
        found = sum(one.verdict == "found" for one in taught)
        parts.append(
            f"In {found} of {len(taught)} rows an expected string is in the first {FIRST_CLAIMS} "
            "claims."
        )
        hinted = sum(one.found is None and one.hint is not None for one in taught)
        if hinted:
            parts.append(
                f"In {many(hinted, 'other row')} no claim has one, but a word of one is among the "
                "words that the adapter raises most or replays, which is no claim."
            )
    if controls:
        claiming = sum(one.verdict == "claims" for one in controls)
        parts.append(f"Controls that make a claim: {claiming} of {len(controls)}.")
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    return " ".join(parts)
