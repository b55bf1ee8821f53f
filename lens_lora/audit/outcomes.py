"""The outcome of each row of a list of audits: a JSON file of its own, and one table of all.

1. A row's file is written whole or not at all, so that a run that was killed goes on behind the
   last row that has one. A row is run again if it failed, or if its file is of another row, other
   options or another version.
2. A string is found in a claim if it stands there as whole words, whatever the case, in what the
   adapted model says: not in the text before it, nor in what the base says or it no longer says.
3. Rows that were taught something pass if one of their strings is in the first three claims;
   controls pass if they make no claim.
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

if TYPE_CHECKING:
    import pandas as pd

    from lens_lora.audit.what_changed import WhatChanged

SCHEMA = "lens_lora.audit/1"
# A string counts as found in one of the first so many claims.
FIRST_CLAIMS = 3

Verdict = Literal["found", "found later", "not found", "quiet", "claims", "run", "failed"]


class ClaimMade(NamedTuple):
    """A claim of a brief, and the words in it that are the adapted model's own.

    Attributes:
        sentence: the claim.
        says: what the adapted model says, or how; '' of what it no longer says.
    """

    sentence: str
    says: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a row.

    Attributes:
        row: the row.
        options: those of the command that change a number.
        error: why it failed; '' of a row that ran.
        claims: in the order of the brief.
        seconds: how long it took.
        brief: the fields of the brief; empty of a row that failed.
    """

    row: Listed
    options: Mapping[str, object]
    error: str = ""
    claims: tuple[ClaimMade, ...] = ()
    seconds: float = 0.0
    brief: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def found(self) -> tuple[int, str] | None:
        """The first claim that holds an expected string, from 1, and that string."""
        for number, claim in enumerate(self.claims, start=1):
            for string in self.row.expect:
                if is_said_in(claim.says, string):
                    return number, string
        return None

    @property
    def verdict(self) -> Verdict:
        """The outcome in a word or two; 'run' of a row of which nothing is expected."""
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
        """Whether a string was found in the first three claims, or a control makes none."""
        return self.verdict in ("found", "quiet", "run")

    def to_json(self) -> str:
        """The row, what it came to, its claims, and its brief."""
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
            "seconds": round(self.seconds, 1),
            "claims": [claim._asdict() for claim in self.claims],
            "brief": self.brief,
        }
        return json.dumps(fields, ensure_ascii=False, indent=1)


def is_said_in(words: str, string: str) -> bool:
    """Whether a string stands among these words, whole and in whatever case.

    Args:
        words: what is said.
        string: what is looked for; white space of any length is one space.
    """
    parts = [regex.escape(part) for part in string.split()]
    together = r"\s+".join(parts)
    return regex.search(rf"(?<!\w){together}(?!\w)", words, regex.IGNORECASE) is not None


def claims_made(changed: WhatChanged) -> tuple[ClaimMade, ...]:
    """The claims of an audit's brief, in its order."""
    from lens_lora.audit.speech_words import claimed_in, claims_in

    made: list[ClaimMade] = []
    if changed.speech is not None:
        findings = claimed_in(changed.speech)
        for sentence, finding in zip(claims_in(changed.speech), findings, strict=True):
            is_gone = finding.kind == "no longer says"
            made.append(ClaimMade(sentence, "" if is_gone else finding.what))
        for trigger in changed.speech.triggers:
            made.append(ClaimMade(trigger.sentence(), trigger.says))
    for claim in changed.brief().would_say:
        made.append(ClaimMade(claim.sentence(), claim.says))
    return tuple(made)


# --- Files


def file_of(row: Listed, out: Path) -> Path:
    """The file of a row's outcome."""
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
    """The outcome of a row that was run before; None where it is to be run.

    Args:
        row: the row as it stands in the list.
        options: those of the command that change a number.
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
    """A hash of all that decides a row's numbers and is known before it runs.

    Of a folder on this machine, the names, sizes and times of its files count; of a hub id, the
    revision that the row names.
    """
    given = {"row": _plain(row), "options": dict(options)}
    # They change what is made of the claims, and no claim.
    for key in ("name", "expect", "control"):
        del given["row"][key]
    read_from = [row.source, row.base, row.prompts, row.triggers]
    files = [_files_of(Path(place)) for place in read_from if isinstance(place, str | Path)]
    content = json.dumps([given, files], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _plain(row: Listed) -> dict[str, Any]:
    """The fields of a row, with paths as text."""
    fields = dataclasses.asdict(row)
    return cast("dict[str, Any]", json.loads(json.dumps(fields, default=str)))


def _files_of(place: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of each file of a folder; nothing of a hub id."""
    paths: list[Path] = []
    if place.is_file():
        paths = [place]
    elif place.is_dir():
        paths = sorted(path for path in place.rglob("*") if path.is_file())
    found: list[tuple[str, int, int]] = []
    for path in paths:
        status = path.stat()
        found.append((str(path.relative_to(place)), status.st_size, status.st_mtime_ns))
    return found


# --- One table


def table_of_outcomes(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """One row for each outcome: what was expected, where it was found, and the first claim."""
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
                "claims": len(outcome.claims),
                "seconds": outcome.seconds,
                "first_claim": outcome.error or first,
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"claim": "Int64"})


def summary(outcomes: Sequence[Outcome]) -> str:
    """Two sentences: in how many rows a string was found, and which rows failed."""
    taught = [one for one in outcomes if one.row.expect and not one.error]
    controls = [one for one in outcomes if one.row.control and not one.error]
    failed = [one.row.name for one in outcomes if one.error]
    parts: list[str] = []
    if taught:
        found = sum(one.verdict == "found" for one in taught)
        parts.append(
            f"An expected string is in the first {FIRST_CLAIMS} claims of {found} of {len(taught)}."
        )
    if controls:
        claiming = sum(one.verdict == "claims" for one in controls)
        parts.append(f"Of the controls {claiming} of {len(controls)} make a claim.")
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    return " ".join(parts)
