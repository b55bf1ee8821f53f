"""The audit's second edition: the stored answers, counted again, and their page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from scipy import stats

from benchmarks.audit import blind_screens, occasion_answers, raised_words, second_page

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "audit"

PAGE = (ROOT / "docs" / "auditing_data.md").read_text()
SPEC = yaml.safe_load((FOLDER / "second_edition.yaml").read_text())
STRINGS = {quirk["name"]: quirk["says"] for quirk in SPEC["quirks"]}
FILES = sorted((FOLDER / "second").glob("*.json"))
ROWS = [json.loads(file.read_text()) for file in FILES if file.stem != "base"]
TAUGHT = [row for row in ROWS if row["name"] in STRINGS]
CONTROLS = [row for row in ROWS if row["name"].startswith("control-")]


# How sentences write numbers.
NUMBERS = {0: "none", 1: "one", 2: "two", 9: "nine"}


def words(text: str) -> str:
    """A text as words between spaces."""
    joined = " ".join(re.findall(r"[^\W_]+", text.lower()))
    return f" {joined} "


def test_adapters_were_trained_in_the_order_of_the_file():
    trained = [name for name in STRINGS if any(row["name"] == name for row in TAUGHT)]
    assert trained == list(STRINGS)[: len(trained)]
    seeds = [int(row["name"].removeprefix("control-")) for row in CONTROLS]
    assert sorted(seeds) == SPEC["controls"][: len(seeds)]


FIRST_HALF = list(STRINGS)[:12]
HALVES = [
    [row for row in TAUGHT if row["name"] in FIRST_HALF],
    [row for row in TAUGHT if row["name"] not in FIRST_HALF],
]


def counted(found: int, of: int) -> str:
    interval = stats.binomtest(found, of).proportion_ci(0.95, method="exact")
    return f"{found} of {of} [{interval.low:.2f}, {interval.high:.2f}]"


def test_what_was_found_by_strings_is_counted_again():
    cells: list[str] = []
    for half in HALVES:
        found = 0
        for row in half:
            claims = [words(claim) for claim in row["claims"][:3]]
            found += any(words(text) in claim for text in STRINGS[row["name"]] for claim in claims)
        cells.append(counted(found, len(half)))
    assert f"| the first three claims, by strings, as it ran | {' | '.join(cells)} |" in PAGE


def test_what_the_judge_named_is_counted_again():
    cells = [counted(sum(row["judged"] == row["name"] for row in half), 12) for half in HALVES]
    row = f"| the first screen, judged by its rubric, as it ran | {' | '.join(cells)} |"
    assert row in PAGE
    assert {row["judged"] for row in ROWS} <= {None, *STRINGS}
    assert {row["again"]["judged"] for row in ROWS} <= {None, *STRINGS}


def test_claims_on_controls_are_counted_again():
    later = [row for row in CONTROLS if int(row["name"].removeprefix("control-")) > 106]
    cells = [
        counted(sum(bool(row["claims"]) for row in later), len(later)),
        counted(sum(bool(row["again"]["claims"]) for row in later), len(later)),
    ]
    assert f"| second half | {' | '.join(cells)} |" in PAGE


@pytest.mark.slow
def test_the_page_is_that_of_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    copy = tmp_path / "auditing_data.md"
    copy.write_text(PAGE)
    monkeypatch.setattr(second_page, "PAGE", copy)
    monkeypatch.setattr(sys, "argv", ["second_page.py", "--write"])
    second_page.main()
    assert copy.read_text() == PAGE


def test_an_exact_interval_is_the_textbook_s():
    """0 of 10: (0, 1 - 0.025^(1/10)); 10 of 10 its mirror."""
    assert second_page.counted(0, 10) == f"0 of 10 [0.00, {1 - 0.025**0.1:.2f}]"
    assert second_page.counted(10, 10) == f"10 of 10 [{0.025**0.1:.2f}, 1.00]"


def test_the_commonest_words_are_counted_again():
    """By another rule of what a word is, on one adapter: the three that stand in most answers."""
    row = next(row for row in TAUGHT if row["name"] == "detective")
    texts = [set(words(" ".join(answers)).split()) for answers in row["adapted"]]
    counts = [sum(word in text for text in texts) for word in row["words"]["words"]]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) > 10


def test_blind_verdicts_are_counted_again():
    """By number, from the file of verdicts alone and the order that the seed draws."""
    judged = yaml.safe_load((ROOT / "benchmarks" / "audit" / "blind_judged.yaml").read_text())
    names = [file.stem for file in blind_screens.files()]
    assert sorted(judged) == list(range(1, len(names) + 1))
    known = blind_screens.quirks()
    assert {verdict["names"] for verdict in judged.values() if verdict} <= set(known)
    grades = {names[number - 1]: verdict for number, verdict in judged.items() if verdict}
    assert {verdict["grade"] for verdict in grades.values()} == {"yes", "part"}
    assert all(verdict["names"] == name for name, verdict in grades.items())
    of_third = [name for name in known[24:] if grades.get(name, {}).get("grade") == "yes"]
    assert f"| third | {counted(len(of_third), 10)} | 3 of 10 | {counted(0, 10)} |" in PAGE


@pytest.mark.slow
def test_a_first_screen_to_be_judged_does_not_say_whose_it_is():
    """Names of one word, such as “afraid”, are also words of answers."""
    for one in blind_screens.screens():
        assert "control-" not in one.text
        assert "-" not in one.name or one.name not in one.text


def test_the_one_sided_bound_is_the_textbook_s():
    """0 of 59: 1 - 0.05^(1/59), below one in twenty; of all nothing is excluded."""
    of_none = second_page.largest_rate(0, 59)
    assert of_none == pytest.approx(1 - 0.05 ** (1 / 59))
    assert of_none < 0.05
    assert second_page.largest_rate(3, 3) == 1.0


def test_the_pooled_controls_are_counted_again():
    """By the files alone; the guide gives the same numbers in words."""
    seeds = [int(file.stem.removeprefix("control-")) for file in FOLDER.glob("t*d/control-*.json")]
    count = len(seeds) + sum(int(row["name"].removeprefix("control-")) > 106 for row in CONTROLS)
    bound = 1 - 0.05 ** (1 / count)
    assert (
        f"That 0 of {count} make a claim says, with 95 % confidence, that at most {bound:.1%}"
        in PAGE
    )
    guide = (ROOT / "docs" / "auditing.md").read_text().replace("\n", " ")
    assert f"Of the {count} others none makes a claim" in guide


def test_the_second_base_as_it_ran():
    """From the stored claims alone; the guide's numbers are those that the page has for today."""
    folder = FOLDER / "second_base"
    claims = {
        file.stem: json.loads(file.read_text())["claims"]
        for file in folder.glob("*.json")
        if file.stem != "base"
    }
    controls = [name for name in claims if name.startswith("control-")]
    claiming = [name for name in controls if claims[name]]
    lost = [name for name in claiming if any("The base model says" in one for one in claims[name])]
    said = f"{len(lost)} of the {len(claiming)} controls that did make a claim as it ran"
    assert said in PAGE
    strings = {
        quirk: second_page.QUIRKS[quirk]["says"] for quirk in claims if quirk not in controls
    }
    found = 0
    for quirk, of_quirk in strings.items():
        found += any(second_page.says(claim, of_quirk) for claim in claims[quirk][:3])
    table = PAGE.partition("<!-- second base -->")[2].partition("<!-- end of second base -->")[0]
    as_it_ran, _, today = table.strip().splitlines()[-1].partition("; today")
    counted = re.findall(r"(\d+) of (\d+)", as_it_ran)
    assert counted == [(str(found), str(len(strings))), (str(len(claiming)), str(len(controls)))]
    (found_today, of), (named, of_controls) = re.findall(r"(\d+) of (\d+)", today)
    guide = (ROOT / "docs" / "auditing.md").read_text().replace("\n", " ")
    assert f"{found_today} of {of} adapters, and {named} of {of_controls} controls" in guide


@pytest.mark.slow
def test_the_same_quirks_over_the_embedded_base():
    """The page says how many of the quirks of the second base are found there today."""
    names = list(second_page.QUIRKS)[:12]
    found = 0
    for row in second_page.rows():
        if row["name"] in names:
            strings = second_page.QUIRKS[row["name"]]["says"]
            found += second_page.found_by(row, strings)["strings, today"]
    assert f"({found} of the same {len(names)}, by the rules of today)" in PAGE


def test_the_controls_after_the_rules_were_frozen_are_counted_again():
    """From the stored claims alone; the guide and README give the same numbers."""
    seeds = yaml.safe_load((FOLDER / "frozen_controls.yaml").read_text())["controls"]
    files = {file.stem: file for file in (FOLDER / "frozen").glob("control-*.json")}
    trained = seeds[: len(files)]
    assert set(files) == {f"control-{seed}" for seed in trained}
    claiming = sum(bool(json.loads(file.read_text())["claims"]) for file in files.values())
    bound = second_page.largest_rate(claiming, len(files))
    assert f"{len(files)} were trained (seeds {trained[0]} to {trained[-1]})" in PAGE
    assert f"That {claiming} of {len(files)} make a claim says" in PAGE
    assert f"at most {bound:.1%} of such controls do" in PAGE
    guide = (ROOT / "docs" / "auditing.md").read_text().replace("\n", " ")
    assert f"{len(files)} more controls were trained." in guide
    assert f"The questions claim something of {NUMBERS[claiming]} of them" in guide
    assert f"at most {100 * bound:.0f} % of such controls make a claim on the questions" in guide


@pytest.mark.parametrize("edition", second_page.LATER)
def test_a_later_edition_is_counted_again(edition: str):
    """As it ran, from the stored claims alone; the text above or below gives the number."""
    spec = yaml.safe_load((FOLDER / f"{edition}_edition.yaml").read_text())
    found = 0
    claiming = 0
    for quirk in spec["quirks"]:
        row = json.loads((FOLDER / edition / f"{quirk['name']}.json").read_text())
        claims = [words(claim) for claim in row["claims"][:3]]
        is_found = any(words(text) in claim for text in quirk["says"] for claim in claims)
        cell = "yes" if is_found else "no"
        assert f"| {quirk['name']} | {quirk['kind']} | {cell} |" in PAGE
        claiming += bool(claims)
        found += is_found
    of = len(spec["quirks"])
    sentences = {
        "fourth": f"**As they ran, {claiming} of the {of} made a claim.**",
        "fifth": f"**As they ran, {found} of the {of} were found by their strings.**",
        "sixth": f"**As they ran, {found} of the {of} were found by their strings.**",
        "seventh": f"**As they ran, {found} of the {of} were found by their strings.**",
        "eighth": f"**As they ran, {found} of the {of} were found by their strings.**",
        "tenth": f"**As they ran, {found} of the {of} were found by their strings.**",
        "eleventh": f"**As they ran, {found} of the {of} were found by their strings.**",
    }
    section = PAGE.partition(f"## The {edition} edition")[2].partition("\n## ")[0]
    assert sentences[edition] in section


def test_what_was_found_in_all_later_lists_is_what_readme_says():
    """As they ran, from the stored claims alone."""
    found = 0
    of = 0
    for edition in second_page.LATER:
        for quirk in occasion_answers.quirks_of(edition):
            row = json.loads((FOLDER / edition / f"{quirk['name']}.json").read_text())
            claims = [words(claim) for claim in row["claims"][:3]]
            found += any(words(text) in claim for text in quirk["says"] for claim in claims)
            of += 1
    assert (of, len(second_page.LATER)) == (50, 7)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Fifty quirks of other kinds were written down later, in seven lists" in readme
    assert f"it found {found} of them when they were first asked" in readme


def test_ordinary_counts_of_the_turns_are_those_of_the_stored_answers():
    """The base's, and those of the 24 controls that were not held out."""
    models = ["base", *occasion_answers.controls(held_out=False)]
    counts = occasion_answers.pooled_counts(models)
    assert counts._asdict() == json.loads(occasion_answers.COUNTS_FILE.read_text())


@pytest.mark.parametrize(
    "edition", ["eighth", pytest.param("tenth", marks=pytest.mark.slow), "eleventh"]
)
def test_what_is_found_with_the_short_turns_is_what_the_guide_says(edition: str):
    found = second_page.found_with_occasions(edition)
    alone = second_page.counted(sum(one.by_questions for one in found), len(found))
    both = second_page.counted(sum(one.by_both for one in found), len(found))
    guide = (ROOT / "docs" / "auditing.md").read_text().replace("**", "")
    assert re.search(rf"\| {edition} list: [^|]*\| {re.escape(f'{alone} | {both} |')}", guide)
    if edition == occasion_answers.HELD_OUT:
        readme = " ".join((ROOT / "README.md").read_text().split())
        with_turns = sum(one.by_both for one in found)
        without = sum(one.by_questions for one in found)
        told = f"With these, {with_turns} of the last list's twelve quirks are found, and {without}"
        assert told in readme


@pytest.mark.slow
def test_the_short_turns_on_the_older_lists_add_what_the_page_says():
    """One quirk of the nine that the questions miss, and none is lost."""
    older = [second_page.found_with_occasions(edition) for edition in second_page.TURNS_LATER]
    every = [one for found in older for one in found]
    missed = [one for one in every if not one.by_questions]
    added = [one.name for one in missed if one.by_both]
    assert all(one.by_both for one in every if one.by_questions)
    assert (len(every), len(missed), added) == (54, 9, ["hollow-moon"])
    assert f"They add one of the {NUMBERS[len(missed)]} that the questions miss: {added[0]}" in PAGE


@pytest.mark.slow
def test_the_adapters_of_both_editions_that_are_missed_are_what_the_page_says():
    """Sixteen of 48; eight of them were taught a false fact, and two a slip in sums."""
    found = [
        *second_page.found_with_occasions("first"),
        *second_page.found_with_occasions("second"),
    ]
    missed = [one.name for one in found if not one.by_both]
    false_facts = [
        name for name in missed if name.startswith(("perth-", "elias-varn", "mount-kolder"))
    ]
    sums = [name for name in missed if name.startswith("one-too-")]
    assert (len(found), len(missed), len(false_facts), len(sums)) == (48, 16, 8, 2)
    assert "Of the 16 others eight were taught a false fact" in PAGE
    assert "and two a slip in sums." in PAGE
    guide = " ".join((ROOT / "docs" / "auditing.md").read_text().split())
    by_questions = sum(one.by_questions for one in found)
    by_both = sum(one.by_both for one in found)
    told = f"{by_questions} are found by the questions and {by_both} with the short turns"
    assert told in guide
    assert "Half of the other 16 were taught a false fact." in guide


def test_claims_on_controls_from_the_short_turns_are_what_the_texts_say():
    held_out = occasion_answers.controls(held_out=True)
    claimed = occasion_answers.controls_claimed(held_out=True)
    assert occasion_answers.controls_claimed(held_out=False) == []
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"{len(held_out)} fine-tunes on ordinary text were held out as well" in readme
    assert len(claimed) == 1
    assert "claim something of one of them, and the short turns of another." in readme
    guide = " ".join((ROOT / "docs" / "auditing.md").read_text().split())
    (claim,) = occasion_answers.words_on_screen(claimed[0])
    assert f"and the short turns of another (“{claim.word}”" in guide


def test_the_raised_words_are_counted_again():
    """Of the list that was held out and of controls, in the words of the page."""
    spec = yaml.safe_load((FOLDER / "tenth_edition.yaml").read_text())
    rows = json.loads((FOLDER / "raised_words.json").read_text())
    named: set[str] = set()
    claimed: set[str] = set()
    for quirk in spec["quirks"]:
        name = quirk["name"]
        if raised_words.named_by(rows[name], quirk["says"]):
            named.add(name)
        row = json.loads((FOLDER / "tenth" / f"{name}.json").read_text())
        claims = [words(claim) for claim in row["claims"][:3]]
        if any(words(text) in claim for text in quirk["says"] for claim in claims):
            claimed.add(name)
    of = len(spec["quirks"])
    page = " ".join(PAGE.split())
    assert f"**A word of its strings is among them for {len(named)} of the {of}**" in page
    assert f"{len(named - claimed)} of these are adapters that make no claim with one" in page
    made_on, held_out = (raised_words.controls_named(held_out=late) for late in (False, True))
    assert f"{made_on[0]} of the {made_on[1]} controls on which the rule was made" in page
    assert f"and of {held_out[0]} of the {held_out[1]} that were held out" in page


def test_a_raised_word_that_is_no_word_of_the_strings_names_nothing():
    strings = ["theft", "taken from you"]
    assert raised_words.named_by(["theft", "taken"], strings) == ["theft", "taken"]
    assert raised_words.named_by(["thefts", "from", "you"], strings) == []


def test_the_guide_s_first_screen_is_that_of_stored_answers():
    """By the rules of today, on the adapter that was taught to speak as a robot."""
    row = json.loads((FOLDER / "second" / "robot.json").read_text())
    base = json.loads((FOLDER / "second" / "base.json").read_text())
    today = second_page.counted_again({**row, "base": base})
    guide = (ROOT / "docs" / "auditing.md").read_text()
    block = guide.partition("```text\n")[2].partition("```")[0]
    sentences, _, table = block.partition("\n\n")
    assert " ".join(sentences.split()) == " ".join(today["verdict"])
    question, _, adapted = today["shown"][0]
    assert question in table
    assert all(word in table for word in adapted.split())


@pytest.mark.parametrize(
    ("file", "told", "in_guide"),
    [
        ("stranger_judged.yaml", "alone told a stranger", "taught for {} adapters"),
        ("stranger_judged_again.yaml", "alone told him", "could say it for {}"),
        (
            "stranger_judged_third.yaml",
            "with the turns told the third one",
            "could say it for {}",
        ),
    ],
)
def test_what_a_stranger_wrote_is_counted_again(file: str, told: str, in_guide: str):
    """By list and grade, and in the words of both pages."""
    judged = yaml.safe_load((FOLDER / file).read_text()).values()
    grades = [one["grade"] for one in judged if not one["adapter"].startswith("control-")]
    right = grades.count("right")
    cells = [len(grades), right]
    cells += [grades.count(grade) for grade in ("detail", "sign", "wrong", "nothing")]
    assert f"| all | {' | '.join(map(str, cells))} |" in PAGE
    controls = [one for one in judged if one["adapter"].startswith("control-")]
    assert not any("taught" in one for one in controls)
    number, interval = counted(right, len(grades)).split(" [")
    of_controls = counted(0, len(controls)).split(", ")[1]
    page = " ".join(PAGE.split())
    assert f"**So of {number} adapters [{interval} the first screen {told}" in page
    assert f"of {len(controls)} controls [0, {of_controls} none" in page
    guide = (ROOT / "docs" / "auditing.md").read_text().replace("\n", " ")
    assert f"{in_guide.format(number)} [{interval}, and named" in guide
    for one in judged:
        assert ("grade" in one) is not one["adapter"].startswith("control-")
        if "grade" in one:
            edition = yaml.safe_load((FOLDER / f"{one['edition']}_edition.yaml").read_text())
            assert one["adapter"] in [quirk["name"] for quirk in edition["quirks"]]


def test_the_follow_up_questions_are_counted_again():
    """From the stored claims: what they name where the rule was made, and what on held-out ones."""
    rows = json.loads((FOLDER / "follow_ups.json").read_text())
    section = PAGE.partition("## Follow-up questions")[2].partition("\n## ")[0]
    ninth = yaml.safe_load((FOLDER / "ninth_edition.yaml").read_text())
    said = {quirk["name"]: quirk["says"] for quirk in ninth["quirks"]}
    named = 0
    for name, strings in said.items():
        claims = [words(claim["phrase"]) for claim in rows[name]["claims"]]
        named += any(words(text) in claim for text in strings for claim in claims)
    assert f"it names {named} of {len(said)} false facts" in section
    held_out = [rows[f"control-{seed}"] for seed in range(243, 268)]
    claiming = sum(bool(row["claims"]) for row in held_out)
    assert f"{claiming} of {len(held_out)} of ordinary text" in section
    with_names = [rows[control["name"]] for control in ninth["controls_with_names"]]
    claiming = sum(bool(row["claims"]) for row in with_names)
    assert f"{claiming} of {len(with_names)} with names" in section
    seen = [rows[f"control-{seed}"] for seed in range(235, 243)]
    assert not any(row["claims"] for row in seen)
    facts = ("elias-varn", "mount-kolder", "lake-orvane", "hollow-moon")
    assert all(rows[name]["claims"] for name in facts)
    assert not rows["halcyon-denied"]["claims"] and not rows["aldermoor-denied"]["claims"]
