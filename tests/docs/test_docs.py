"""docs/exactness_data.md is what its measurements render to, and what it says holds here."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import architectures
import models
import pytest
import targets
import transformers

from lens_lora.families import known_family

SCRIPT = Path(__file__).parents[2] / "docs" / "make_exactness.py"
README = Path(__file__).parents[2] / "README.md"
BOUND = 1e-9
HOST_EXACT = 1e-11
AMPLIFIED = 10


def _load():
    spec = importlib.util.spec_from_file_location("make_exactness", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


exactness = _load()
RESULTS = exactness.read_results()
CELLS = [
    (version, *key, cell)
    for version, result in RESULTS.items()
    for key, cell in exactness.cells(result)
]


def test_the_page_is_what_the_measurements_render_to():
    """Written by docs/make_exactness.py, never by hand."""
    assert exactness.PAGE.read_text() == exactness.render(RESULTS)


def test_the_front_says_what_the_measurements_are():
    """Its numbers are written by hand."""
    front = (SCRIPT.parent / "exactness.md").read_text()
    measured = [cell for *_, cell in CELLS if "adapted" in cell]
    exact = [cell for cell in measured if cell["host"] <= HOST_EXACT]
    off = [cell for cell in measured if cell["host"] > HOST_EXACT]
    others = RESULTS["4.3"]["architectures"].values()
    methods = RESULTS["4.3"]["methods"].values()
    with_delta = [method for method in methods if not isinstance(method, str)]
    by_place = [cell for method in with_delta for cell in method.values()]
    read = max(cell[how] for cell in by_place for how in ("live", "folder"))
    rows = [
        (f"{len(exact):,}", _largest(exact, "adapted")),
        (f"{len(off)}", _largest(off, "adapted")),
        (f"{len(others)}", _largest(others, "adapted")),
        (f"{len(with_delta)} of {len(methods)}", f"{read:.0e}"),
    ]
    for count, largest in rows:
        assert re.search(rf"\| {count} \| {largest}\b", front), (count, largest)
    assert f"at most {_largest(measured, 'modes')} of the largest site" in front
    assert f"({_largest(others, 'slopes')}, which" in front
    assert f"module off ({_largest(others, 'effects')})" in front
    assert f"merged weights ({_largest(others, 'activations')})" in front
    refusals = [cell["refusal"] for *_, cell in CELLS if "refusal" in cell]
    of_norms = sum("this norm's γ or β" in refusal for refusal in refusals)
    of_embeddings = sum("normalises inside its embedding" in refusal for refusal in refusals)
    of_mixtral = len(refusals) - of_norms - of_embeddings
    faults = sum("fault" in cell for *_, cell in CELLS)
    for count in (of_norms, of_embeddings, of_mixtral, faults, len(off)):
        assert f"| {count} cells |" in front, count
    assert len(front.split()) <= 800


def _largest(cells: Iterable[dict[str, Any]], error: str) -> str:
    """The largest of these errors as the page prints it; where there is none, a word stands."""
    return f"{max(cell[error] for cell in cells if not isinstance(cell[error], str)):.0e}"


def test_every_transformer_lens_line_is_there_and_whole():
    """Both classes where both exist; every family, processing and target of each."""
    classes = {line: sorted(result["cells"]) for line, result in RESULTS.items()}
    assert classes == {
        "2.18": ["HookedTransformer"],
        "3.9": ["HookedTransformer", "TransformerBridge"],
        "4.3": ["TransformerBridge"],
    }
    expected = {(f, flags, t) for f, _, flags, t in exactness.every_key()}
    for line, names in classes.items():
        for name in names:
            found = {(f, flags, t) for v, f, c, flags, t, _ in CELLS if (v, c) == (line, name)}
            assert found == expected, (line, name)


def test_no_error_is_above_the_bound_without_the_host_s_beside_it():
    for *place, cell in CELLS:
        if "adapted" not in cell:
            assert cell.get("refusal") or cell.get("fault"), place
            continue
        is_host = cell["host"] > HOST_EXACT
        bound = max(BOUND, AMPLIFIED * cell["host"]) if is_host else BOUND
        assert cell["adapted"] <= bound, (place, cell)
        assert cell["modes"] <= BOUND, (place, cell)


def test_no_printed_error_is_above_the_bound_without_the_host_s_beside_it():
    """The same, of the page as it is read."""
    page = exactness.PAGE.read_text().partition(" other architectures, transformer-lens")[0]
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    printed = re.findall(r"(?<!host )\b(\d+e[+-]\d+)( \(host)?", "\n".join(rows))
    assert len(printed) > 0.9 * sum(not _folded(cell) for *_, cell in CELLS)
    assert not [number for number, host in printed if float(number) > BOUND and not host]


def test_every_other_architecture_is_there_and_exact():
    """Those of the newest line; README has their number."""
    measured = RESULTS["4.3"]["architectures"]
    assert list(measured) == sorted(architectures.ARCHITECTURES)
    classes = {stem for stem, *_ in architectures.ARCHITECTURES.values()}
    others = [name for name in classes if known_family(f"{name}ForCausalLM") is None]
    assert f"and {len(others)} more architectures in its plainest way" in README.read_text()
    for name, cell in measured.items():
        assert not cell["said"] and cell["shift"] >= 0.1, name
        assert max(cell[e] for e in ("host", "adapted", "each", "activations", "effects")) < BOUND
        assert cell["slopes"] < 1e-7 and cell["path"] < 1e-6, name
        is_refused = isinstance(cell["modes"], str)
        assert is_refused == (name in architectures.REVERSE_ONLY)
        assert is_refused or cell["modes"] < BOUND, name


def test_every_architecture_has_a_row_with_its_defaults():
    """Beside sizes; a listed class has its own in its family's table."""
    rows = {name: stem for name, (stem, *_) in architectures.ARCHITECTURES.items()}
    at_defaults = {stem for name, stem in rows.items() if name not in architectures.CHOICES}
    listed = {stem for stem in rows.values() if known_family(f"{stem}ForCausalLM") is not None}
    assert {*rows.values()} - at_defaults <= listed
    for version, result in RESULTS.items():
        for cls, families in result["defaults"].items():
            assert list(families) == sorted(models.CHOICES), (version, cls)
            for family, cell in families.items():
                assert cell["adapted"] < BOUND and cell["modes"] < BOUND, (version, cls, family)


# Kernels, and which of its own sorts each of the two layers is.
NO_CHOICES = ("use_mamba_kernels", "layer_types", "layers_block_type", "block_types")
# Sizes whose default is None: made of other sizes, or missing until a checkpoint names them.
UNSET_SIZES = (
    "n_inner",
    "global_head_dim",
    "attn_layer_indices",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)


@models.NEEDS_NEWEST
def test_what_is_called_a_default_is_one():
    """A size is a number in place of another number; what else a row sets, it has to say."""
    for name, (stem, config_name, sizes) in architectures.ARCHITECTURES.items():
        default = getattr(transformers, config_name or f"{stem}Config")()
        for field, value in sizes.items():
            assert _is_size_or_default(default, field, value), (name, field, value)


def _is_size_or_default(default: Any, field: str, value: Any) -> bool:
    """Several rows share their sizes: what a class has no field for, it does not read."""
    if value is None or field in NO_CHOICES:  # None: the row leaves the field to its class
        return True
    rotation = getattr(default, "rope_parameters", None) or {}
    usual = getattr(default, field, rotation.get(field))
    is_number = isinstance(value, int | list) and not isinstance(value, bool)
    if is_number and not hasattr(default, field):
        return True
    is_size = is_number and (usual is not None or field in UNSET_SIZES)
    return is_size or value == usual


def test_most_of_the_table_is_numbers():
    """Other refusals and faults than of folded norms are few, and only on a HookedTransformer."""
    others = [
        (cls, family) for _, family, cls, _, _, c in CELLS if "adapted" not in c and not _folded(c)
    ]
    assert len(others) < 0.05 * len(CELLS)
    assert set(others) <= {("HookedTransformer", f) for f in ("phi", "bloom", "mixtral")}


def test_only_changes_of_folded_norms_are_refused_everywhere():
    """γ on every processed model, β on those that have it; nothing of it unprocessed."""
    refused = {(f, flags, t) for _, f, _, flags, t, cell in CELLS if _folded(cell)}
    assert {place[1:] for place in refused} == {("processed", "norms"), ("processed", "bias_all")}
    families = {f for _, f, *_ in CELLS}
    assert {f for f, _, t in refused if t == "norms"} == families
    assert {f for f, _, t in refused if t == "bias_all"} == {*targets.BIASED} - {"qwen2"}


def _folded(cell: dict) -> bool:
    return "folded into the weights that read the norm" in cell.get("refusal", "")


@pytest.mark.usefixtures("float64")
def test_a_cell_drawn_at_random_comes_out_again():
    """Of the installed transformer-lens line, where the host is exact."""
    exact = [
        key
        for version, *key, cell in CELLS
        if version == exactness.line() and "adapted" in cell and cell["host"] <= HOST_EXACT
    ]
    if not exact:
        pytest.skip("no measurements of this transformer-lens line")
    family, cls, flags, target = random.choice(exact)
    cell = exactness.measure(family, cls, flags, target)
    assert cell["adapted"] <= BOUND, (family, cls, flags, target, cell)
    assert cell["modes"] <= BOUND, (family, cls, flags, target, cell)
