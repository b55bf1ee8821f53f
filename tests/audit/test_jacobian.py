"""The file that keeps a base's Jacobian."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lens_lora.audit import jacobian


def test_two_processes_that_fit_one_jacobian(monkeypatch, tmp_path):
    """One writes the whole file while the other is writing: both end, and the file is whole."""
    file = tmp_path / "kept" / "jacobian-0.safetensors"
    ours, theirs = ({"point": torch.full((2, 2), value)} for value in (1.0, 2.0))
    written: list[Path] = []
    save = jacobian.save_file

    def interrupted(tensors, path) -> None:
        save(tensors, path)
        written.append(Path(path))
        if len(written) == 1:
            jacobian._keep(file, theirs)
            assert torch.equal(load_file(file)["point"], theirs["point"])

    monkeypatch.setattr(jacobian, "save_file", interrupted)
    jacobian._keep(file, ours)
    assert torch.equal(load_file(file)["point"], ours["point"])
    assert len(set(written)) == 2
    assert list(file.parent.iterdir()) == [file]
