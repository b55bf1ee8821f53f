"""Results reach their pictures through one module, at the first use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_result import every_result

import lens_lora as ll
from lens_lora.core.results import drawing
from lens_lora.core.results.base import Result


class Unknown(Result):
    """A result that nothing draws."""

    def to_frame(self):
        """No numbers."""
        return every_result()[0].to_frame()[:0]


@pytest.mark.parametrize("name", ["figure", "positions", "path", "story", "report", "figures"])
def test_a_type_without_a_drawing_is_named(name: str):
    with pytest.raises(
        ll.errors.LensLoraError, match=rf"Unknown has no {name}; register one with .*{name}"
    ):
        getattr(drawing, name)(Unknown())


@pytest.mark.slow
def test_every_result_has_text_and_html():
    """Text of its own or its table; in a notebook escaped."""
    assert repr(Unknown()).startswith("Unknown:")
    assert "<pre>" in Unknown()._repr_html_()
    for result in every_result():
        assert repr(result) and "<script" not in result._repr_html_(), type(result)


def test_a_registered_drawing_is_called_with_its_arguments():
    drawn = drawing.Drawing[str]("sketch")
    drawn.register(Unknown)(lambda result, k, prompt=None: f"{type(result).__name__} {k} {prompt}")
    assert drawn(Unknown(), 3, prompt=1) == "Unknown 3 1"
    with pytest.raises(ll.errors.LensLoraError, match="int has no sketch"):
        drawn(3)


def test_results_load_no_pictures_before_they_draw():
    code = (
        "import sys, lens_lora as ll, lens_lora.core.results.drawing; "
        "assert 'plotly' not in sys.modules and 'lens_lora.show' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["plotly.io", "lens_lora"])
def test_a_program_that_has_plotly_has_the_templates(first: str):
    """Before anything is drawn, whichever of the two it has imported first."""
    code = f"import {first}; import lens_lora as ll, plotly.io; ll.errors; "
    code += "plotly.io.templates['lens_lora'], plotly.io.templates['lens_lora.dark']"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_text_of_a_result_loads_no_pictures():
    """Nor scikit-learn; drawing one loads plotly, with the templates of this package."""
    code = (
        "import sys; from every_result import every_result\n"
        "for result in every_result(): repr(result), result._repr_html_()\n"
        "assert not {'plotly', 'sklearn'} & {*sys.modules}\n"
        "from lens_lora.show import go; go.Figure\n"
        "import plotly.io; plotly.io.templates['lens_lora.print']"
    )
    lib = str(Path(__file__).parents[2] / "lib")
    paths = os.pathsep.join([lib, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
