"""A training's curves: their title promises shading only where a phase change is shaded."""

from __future__ import annotations

import dataclasses
import re

import by_folder
import pytest
import torch

checkpoints = by_folder.made_public("two_adapters").checkpoints


@pytest.mark.parametrize(
    ("phases", "shaded", "words"),
    [
        ({"prompt 0": ((10.0, 20.0),), "angle": ()}, 1, "shaded: a phase change"),
        ({"prompt 0": (), "angle": ((10.0, 20.0),)}, 0, "no phase change of the readout"),
        ({}, 0, "3 checkpoints are too few to tell a phase change of the readout."),
    ],
)
def test_what_is_shaded_is_said(phases, shaded: int, words: str):
    figure = dataclasses.replace(checkpoints(), phases=phases).plot()
    boxes = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert len(boxes) == shaded
    assert words in figure.layout.title.text


def test_a_checkpoint_without_an_update_has_no_angle():
    """B = 0, as before the first step: no direction, so none is written."""
    training = checkpoints()
    angle = training.angle.clone()
    angle[0] = torch.nan
    page = dataclasses.replace(training, angle=angle).report()
    assert "nan" not in re.sub(r"(?s)<script.*?</script>", "", page)
    assert f"{angle[1]:.0f}°" in page
