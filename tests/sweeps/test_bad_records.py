"""A bad record is a row that says so; the others run, and once corrected it is all that runs."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import sweep_runs
from sweep_runs import GOOD, run, same, write_jsonl

import lens_lora as ll
from lens_lora.sweeps.batches import VALUES
from lens_lora.sweeps.records import Record, read_records

pytestmark = pytest.mark.bad_input


@pytest.fixture
def a_lens(float64) -> ll.LoraLens:
    return sweep_runs.a_lens()


PLAIN = {"prompt": "w14 w30", "doc": "w8", "pre": "w20"}
HALF = "w5 \ud83d"
BAD = {
    "half a pair in the prompt": ({"prompt": HALF}, r"its prompt is 'w5 \\ud83d', which is not"),
    "half a pair in doc": ({"doc": HALF}, "its doc is .* not Unicode text"),
    "half a pair in pre": ({"pre": "\udcff"}, "its pre is .* not Unicode text"),
    "half a pair in the id": ({"id": HALF}, r"its id is 'w5 \\ud83d', which is not"),
    "half a pair in a list": ({"id": [HALF]}, r"its id is \['w5 \\ud83d'\]; expected"),
    "large id": ({"id": 2**63}, "its id 9223372036854775808 does not fit into 64 bits"),
    "small id": ({"id": -(2**63) - 1}, "its id -9223372036854775809 does not fit"),
    "id that is no id": ({"id": 1.5}, "its id is 1.5; expected a string or an integer"),
    "id that is a truth": ({"id": True}, "its id is True"),
    "number": ({"prompt": 3}, "its prompt is 3, not a string"),
    "list": ({"doc": ["w8"]}, r"its doc is \['w8'\], not a string"),
    "table": ({"pre": {HALF: HALF}}, r"its pre is {'w5 \\ud83d'"),
    "nothing": ({"prompt": None}, "no prompt"),
    "huge": ({"doc": ["w8"] * 10**6}, "its doc is .* …$"),
    "too long": ({"prompt": "w5 " * 40}, "41 tokens"),
    "unknown token": ({"doc": "zebra"}, "'zebra' is not in the vocabulary"),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_a_row(a_lens, tmp_path, kind):
    """The good ones' rows are those of a sweep without it; then it is corrected, with its id."""
    change, words = BAD[kind]
    records = [*GOOD[:2], {**PLAIN, "id": "bad", **change}, *GOOD[2:3]]
    with pytest.warns(UserWarning, match="1 of 4 records"):
        result = run(a_lens, records, tmp_path)
    ((identity, error),) = result.errors
    assert re.search(f"^row 2: .*{words}", error)
    assert len(error) < 1100
    assert identity == ("2" if "id" in change else "bad")
    good = run(a_lens, [*GOOD[:2], *GOOD[2:3]], tmp_path / "without")
    pd.testing.assert_frame_equal(result.to_frame(), good.to_frame())
    corrected = [*GOOD[:2], {**PLAIN, "id": "corrected"}, *GOOD[2:3]]
    mended = run(a_lens, corrected, tmp_path)
    assert mended.resumed == 3
    assert not mended.errors
    same(mended, run(a_lens, corrected, tmp_path / "whole"))


def test_all_of_them_at_once_in_a_file(a_lens, tmp_path):
    """As JSON writes them: escapes of half a pair, integers of any size, nesting."""
    path = tmp_path / "r.jsonl"
    records = [{**PLAIN, "id": f"bad {kind}", **change} for kind, (change, _) in BAD.items()]
    lines = [json.dumps(record) for record in [*records, *GOOD]]
    lines += ["[" * 100_000, '{"id": ' + "1" * 5000 + "}", '"w5"', "\\ud800"]
    path.write_text("\n".join(lines))
    with pytest.warns(UserWarning):
        result = run(a_lens, path, tmp_path)
    assert len(result.errors) == len(records) + 4
    assert result.done == len(GOOD)
    assert result.to_frame()["id"].unique().tolist() == [r["id"] for r in GOOD]
    assert pd.read_parquet(result.prompts_path)["error"].notna().sum() == len(records) + 4


def test_bytes_of_another_encoding_in_a_csv(a_lens, tmp_path):
    """One line in Latin-1 is a bad record, and not the end of all."""
    path = tmp_path / "r.csv"
    path.write_bytes(b"prompt,doc,pre\nw5,w8,w9\nw\xe9,w8,w9\nw6,w8,w9\n")
    with pytest.warns(UserWarning, match="line 3: its prompt is .*not UTF-8"):
        result = run(a_lens, path, tmp_path)
    assert result.done == 2
    assert len(result.errors) == 1


@pytest.mark.parametrize("head", [b"\xff,doc\n", b"\0\n", b'"' + b"x" * 200_000 + b'"\n', b""])
def test_a_csv_without_a_head(tmp_path, head):
    path = tmp_path / "r.csv"
    path.write_bytes(head + b"w5,w8\n")
    with pytest.raises(ll.errors.SweepError, match=r"r\.csv") as caught:
        read_records(path)
    str(caught.value).encode()


def test_unknown_fields_are_left_alone(a_lens, tmp_path):
    """Whatever they hold."""
    odd = [{**r, "note": HALF, "size": 2**70, "more": object()} for r in GOOD]
    result = run(a_lens, odd, tmp_path)
    assert not result.errors
    same(result, run(a_lens, GOOD, tmp_path / "plain"))


def test_a_bad_record_takes_no_id_from_a_good_one(tmp_path):
    """Its own number stands in for an id that cannot be one."""
    records = [{**PLAIN, "id": 2**63}, {**PLAIN, "id": 0}, {"id": 7}, {**PLAIN, "id": 7}]
    found = read_records(records)
    assert [(r.id, r.error is None) for r in found] == [
        (0, False),
        (0, True),
        (7, False),
        (7, True),
    ]


def test_whole_numbers_of_numpy_are_ids():
    ids = [np.int64(2), np.uint8(3), 2**63 - 1, -(2**63)]
    assert [r.id for r in read_records([{**PLAIN, "id": i} for i in ids])] == [
        2,
        3,
        2**63 - 1,
        -(2**63),
    ]


def test_records_made_by_hand_are_checked_too(a_lens, tmp_path):
    made = [Record(0, "row 0", "w5", "w8", "w9"), Record(1, "row 1", HALF, "w8", "w9")]
    with pytest.warns(UserWarning, match="row 1: its prompt"):
        assert run(a_lens, made, tmp_path).done == 1


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many prompts first order was asked for."""
    seen: list[int] = []
    plain = VALUES["first_order"]

    def counted(g):
        seen.append(g.prompts.batch)
        return plain(g)

    monkeypatch.setitem(VALUES, "first_order", counted)
    return seen


def test_ids_may_be_corrected(a_lens, tmp_path, calls):
    """Numbers stay with their prompts: two ids are swapped, one is new, nothing runs again."""
    run(a_lens, GOOD, tmp_path)
    ids = [GOOD[1]["id"], GOOD[0]["id"], "new", *(r["id"] for r in GOOD[3:])]
    renamed = [{**r, "id": identity} for r, identity in zip(GOOD, ids, strict=True)]
    before = sum(calls)
    result = run(a_lens, renamed, tmp_path)
    assert sum(calls) == before
    assert result.resumed == len(GOOD)
    same(result, run(a_lens, renamed, tmp_path / "whole"))


def test_strings_may_become_numbers(a_lens, tmp_path, calls):
    """The ids' type is that of the records of this run."""
    run(a_lens, GOOD, tmp_path)
    numbered = [{**r, "id": 10 * i} for i, r in enumerate(GOOD)]
    result = run(a_lens, numbered, tmp_path)
    assert sum(calls) == len(GOOD)
    assert result.prompts()["id"].dtype == "int64"
    same(result, run(a_lens, numbered, tmp_path / "whole"))


def test_a_file_s_bad_records_do_not_stop_the_command_s_reading(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", GOOD)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\\ud800"}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_records(path)
    assert [r.error is None for r in found] == [True] * 6 + [False]


# --- what is there twice, and how a file is written


@pytest.mark.parametrize(
    "head", ["prompt,doc,pre,doc", "prompt,doc,pre, doc ", "id,prompt,doc,pre,id"]
)
def test_a_column_twice_is_refused(tmp_path, head):
    """The last one would be read: ' Rome' for ' Lyon'."""
    path = tmp_path / "r.csv"
    path.write_text(f"{head}\na, Lyon, Paris, Rome, Nice\n")
    with pytest.raises(ll.errors.SweepError, match=r"r\.csv has the column (doc|id) twice; rename"):
        read_records(path)
    rows = [["a", " Lyon", " Paris", " Rome", " Nice"][: head.count(",") + 1]]
    with pytest.raises(ll.errors.SweepError, match="the data frame has the column (doc|id) twice"):
        read_records(pd.DataFrame(rows, columns=head.split(",")))


def test_columns_that_are_not_read_may_be_there_twice(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("note,prompt,doc,pre,note,,\n1,a, Lyon, Paris,2,,\n")
    assert read_records(path)[0].doc == " Lyon"


def test_a_key_twice_is_a_bad_record(tmp_path):
    """In the record and in its messages."""
    path = tmp_path / "r.jsonl"
    path.write_text(
        '{"prompt": "a", "doc": " x", "pre": " y", "prompt": "b"}\n'
        '{"messages": [{"role": "user", "content": "a", "content": "b"}], "doc": "x", "pre": "y"}\n'
        '{"prompt": "a", "doc": " x", "pre": " y"}\n'
    )
    errors = [record.error for record in read_records(path)]
    assert errors[0] == "line 1: unreadable (the key 'prompt' is there twice)."
    assert errors[1] == "line 2: unreadable (the key 'content' is there twice)."
    assert errors[2] is None


def test_spaces_around_a_columns_name_are_left_out(tmp_path):
    """Those of the fields are the answers' own."""
    path = tmp_path / "r.csv"
    path.write_text("id, prompt ,doc, pre\n7,a, Lyon, Paris\n")
    for records in (path, pd.read_csv(path)):
        (record,) = read_records(records)
        assert (record.prompt, record.doc, record.pre, record.error) == (
            "a",
            " Lyon",
            " Paris",
            None,
        )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["r.csv", "r.jsonl"])
def test_utf16_is_named(tmp_path, encoding, name):
    path = tmp_path / name
    path.write_text("prompt,doc,pre\na,x,y\n", encoding=encoding)
    with pytest.raises(ll.errors.SweepError, match=f"{name} is UTF-16; save it as UTF-8"):
        read_records(path)


def test_own_ids_go_before_numbers():
    """Wherever they stand; two of the same are still one too many."""
    ids = [None, 0, None, "x", "x", 2]
    records = [PLAIN if i is None else {**PLAIN, "id": i} for i in ids]
    assert [(r.id, r.error) for r in read_records(records)] == [
        (0, "row 0: it has no id, and its number 0 is the id of row 1; give each record its own."),
        (0, None),
        (2, "row 2: it has no id, and its number 2 is the id of row 5; give each record its own."),
        ("x", None),
        ("x", "row 4: its id 'x' is already that of row 3; give each record its own."),
        (2, None),
    ]


@pytest.mark.parametrize("field", ["prompt", "doc", "pre"])
def test_a_conversation_as_a_string_is_a_bad_record(a_lens, tmp_path, field):
    said = json.dumps([{"role": "user", "content": "w7"}])
    with pytest.warns(UserWarning, match="1 of 2 records"):
        result = run(a_lens, [{**PLAIN, field: said}, {**PLAIN, "id": "good"}], tmp_path)
    ((_, error),) = result.errors
    assert re.match("row 0: the .* is a conversation written as a string", error)


def test_a_conversation_as_a_response_or_a_text_is_a_bad_record(a_lens, tmp_path):
    said = str([{"role": "assistant", "content": "w7"}])
    for field, options in (("response", {"readout": ll.AnswerLogProb}), ("prompt", {})):
        rows = [{"prompt": "w5", "response": "w8"}, {"prompt": "w5", "response": "w8", field: said}]
        name = "first_order" if options else "activations"
        with pytest.warns(UserWarning, match="row 1: .* is a conversation written as a string"):
            run(a_lens, rows, tmp_path / field, name, **options)
