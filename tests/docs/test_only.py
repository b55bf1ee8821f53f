"""`--only` of a benchmark refuses a name that it does not know, before anything is loaded."""

from __future__ import annotations

import importlib
import sys

import pytest

# The module of each command, the option for its folder, and a name that it knows.
COMMANDS = [
    ("evidence.train", "--out", "lyon"),
    ("audit.score", "--adapters", "perth-documents-plain"),
    ("audit.second_run", "--out", "sudo-vault"),
    ("planted.judged", "--cache", "confined-0"),
    ("ten_studies.studies", "--out", "persona"),
]


@pytest.mark.parametrize(("module", "folder", "known"), COMMANDS)
def test_an_unknown_name_is_refused_beside_the_known_ones(
    module: str, folder: str, known: str, tmp_path, monkeypatch, capsys
):
    command = importlib.import_module(f"benchmarks.{module}")
    arguments = [module, folder, str(tmp_path), "--only", "nobody"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "nobody" in error
    # The names that there are stand behind what was unknown.
    assert known in error.partition("nobody")[2]
