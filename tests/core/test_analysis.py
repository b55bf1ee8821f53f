"""`@analysis`, with a result class of one's own, as someone would write them in a notebook."""

from __future__ import annotations

import inspect
import itertools
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import cases
import models
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from differences import largest_difference
from jaxtyping import Float
from torch import Tensor

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.core.results import drawing

pytestmark = pytest.mark.usefixtures("float64")
MARGIN = ll.Margin(5, 9)
TOKENS = models.tokens()


class Interaction(ll.results.Labelled):
    """What leaving out two modules does, beyond leaving out each of them."""

    values: Float[Tensor, "batch pair"]
    module_a: Annotated[tuple[str, ...], "pair"]
    module_b: Annotated[tuple[str, ...], "pair"]
    noise_floor: Float[Tensor, " batch"]


@ll.analysis
def leave_two_out(g: ll.Function, pairs: list[tuple[str, str]]) -> Interaction:
    """The interaction of each pair of modules."""
    module_a, module_b = zip(*pairs, strict=True)
    without_both = g.corners(off=pairs)
    without_a = g.corners(off=module_a)
    without_b = g.corners(off=module_b)
    _, adapted = g.ends
    interaction = without_both - without_a - without_b + adapted
    noise = g.noise((1, -1, -1, 1), at=1.0)
    return Interaction(interaction.T, module_a, module_b, noise, **g.header())


def lens_of(cls: str | None = None) -> ll.LoraLens:
    return cases.case("llama", cls or next(iter(models.MAKERS)), "raw").lens


def pairs_of(lens: ll.LoraLens) -> list[tuple[str, str]]:
    return list(itertools.combinations([site.name for site in lens.sites[:4]], 2))


@pytest.mark.parametrize("cls", models.MAKERS)
def test_an_analysis_is_a_function_of_lens_prompts_and_readout(cls: str):
    """By leave-one-out effects of single sites and of groups, which the package has."""
    lens = lens_of(cls)
    pairs = pairs_of(lens)
    found = leave_two_out(lens, TOKENS, MARGIN, pairs, progress=False)
    both = {f"{a} {b}": (a, b) for a, b in pairs}
    groups = both | {site.name: site.name for site in lens.sites}
    effects = ll.patch_sites(lens, TOKENS, MARGIN, "leave_one_out", group=groups, progress=False)
    without = dict(zip(effects.groups, effects.values.T, strict=True))
    for i, (a, b) in enumerate(pairs):
        expected = without[a] + without[b] - without[f"{a} {b}"]
        assert largest_difference(found.values[:, i], expected) < 1e-9
    assert torch.allclose(found.noise_floor, 2**0.5 * effects.noise_floor, rtol=1e-9, atol=0)
    assert torch.allclose(found.shift, effects.shift)
    assert found.readout == MARGIN.label


def test_its_signature_and_its_words_are_the_function_s():
    assert list(inspect.signature(leave_two_out).parameters) == [
        *("lens", "prompts", "readout", "pairs", "progress")
    ]
    assert leave_two_out.__name__ == "leave_two_out"
    assert leave_two_out.__doc__ == "The interaction of each pair of modules."


def test_help_shows_a_call_that_type_checkers_know_by_a_protocol():
    """`typed_as` is for type checkers alone: at run time first_order is the function itself."""
    shown = pydoc.plain(pydoc.render_doc(ll.first_order))
    assert "function first_order in module lens_lora.core.analyses.first_order" in shown
    assert "a_l = u_yᵀ J δz_l of every site" in shown
    parameters = list(inspect.signature(ll.first_order).parameters)
    assert parameters[:3] == ["lens", "prompts", "readout"]
    assert parameters[-2:] == ["max_memory", "progress"]


def test_analyses_of_one_function_share_its_numbers(monkeypatch: pytest.MonkeyPatch):
    lens = lens_of()
    known = Evaluations.of(lens.function(TOKENS, MARGIN, progress=False))
    first = leave_two_out.of(known, pairs_of(lens))
    rows: list[int] = []
    run = ll.LoraLens.run

    def counted(self: ll.LoraLens, prompts: ll.results.Prompts) -> Tensor:
        rows.append(prompts.batch)
        return run(self, prompts)

    monkeypatch.setattr(ll.LoraLens, "run", counted)
    again = leave_two_out.of(known, pairs_of(lens))
    assert torch.allclose(again.values, first.values)
    assert torch.equal(again.base, first.base)
    of_corners = sum(rows)
    rows.clear()
    leave_two_out.of(lens.function(TOKENS, MARGIN, progress=False), pairs_of(lens))
    assert sum(rows) > of_corners  # both ends, and the draws of the noise


def test_the_model_is_as_before_after_an_error():
    lens = lens_of()

    @ll.analysis
    def broken(g: ll.Function) -> None:
        g(0.5)
        raise RuntimeError("of one's own")

    with pytest.raises(RuntimeError, match="of one's own"):
        broken(lens, TOKENS, MARGIN)
    assert not any(point.fwd_hooks for point in lens.model.hook_dict.values())
    with lens.applied(), pytest.raises(ll.errors.ModelStateError, match="on the model already"):
        leave_two_out(lens, TOKENS, MARGIN, pairs_of(lens))


@pytest.mark.bad_input
def test_what_is_no_function_of_g_is_refused():
    for wrong in (3, lambda: 0):
        with pytest.raises(ll.errors.ArgumentError, match="no first parameter g"):
            ll.analysis(wrong)
    with pytest.raises(ll.errors.ArgumentError, match="the lens is a str"):
        leave_two_out("lens", TOKENS, MARGIN, [("a", "b")])
    with pytest.raises(ll.errors.ArgumentError, match="is not a readout"):
        leave_two_out(lens_of(), TOKENS, "margin", [("a", "b")])


# --- A result class of one's own


def interaction() -> Interaction:
    lens = lens_of()
    return leave_two_out(lens, TOKENS, MARGIN, pairs_of(lens), progress=False)


def test_the_table_and_the_ranking_follow_from_the_axes():
    found = interaction()
    frame = found.to_frame()
    assert list(frame) == ["prompt", "module_a", "module_b", "value", "share"]
    assert len(frame) == 12
    assert frame["value"].tolist() == found.values.flatten().tolist()
    assert frame["module_b"][3] == found.module_b[3]
    top = found.top(2, prompt=1)
    best = int(found.values[1].abs().argmax())
    assert top["module_a"][0] == found.module_a[best]
    assert top["share"][0] == pytest.approx(float(found.values[1, best] / found.shift[1]))
    mean = found.top(6)["value"].abs()
    assert mean.is_monotonic_decreasing
    said = repr(found).split("\n")
    assert said[0] == "Interaction of margin(5 − 9), in logits: 2 prompts × 6 pairs"
    assert "module_a" in said[1]
    assert len(said) == 7
    assert "<pre>" in found._repr_html_()


def test_it_is_drawn_and_may_draw_itself():
    found = interaction()
    bars = found.plot(0)
    assert isinstance(bars, go.Figure)
    assert len(bars.data[0].y) == 6
    assert "Interaction" in bars.layout.title.text

    class Own(Interaction):
        def picture(self, prompt: int | None = None) -> go.Figure:
            return go.Figure(layout={"title": {"text": f"prompt {prompt}"}})

        def words(self, prompt: int | None = None) -> str:
            return f"A sentence of {prompt}."

    own = Own(**vars_of(found))
    assert own.plot(1).layout.title.text == "prompt 1"
    assert drawing.figure(own, 1).layout.title.text == "prompt 1"
    assert repr(own).split("\n")[1] == "A sentence of None."


def vars_of(result: Interaction) -> dict[str, object]:
    return {name: value for name, value in vars(result).items() if name != "axes"}


def test_it_comes_back_from_a_file(tmp_path: Path):
    found = interaction()
    loaded = ll.load_result(found.save(tmp_path / "pairs.safetensors"))
    assert type(loaded) is Interaction
    assert repr(loaded) == repr(found)
    pd.testing.assert_frame_equal(loaded.to_frame(), found.to_frame())
    assert torch.equal(Interaction.load(tmp_path / "pairs.safetensors").values, found.values)


IN_ANOTHER_PROCESS = """
import sys
import lens_lora as ll
try:
    ll.load_result(sys.argv[1])
except ll.errors.LensLoraError as error:
    print(error)
sys.path.insert(0, sys.argv[2])
import own_results
print(type(ll.load_result(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_another_process_must_import_the_class_first(tmp_path: Path):
    (tmp_path / "own_results.py").write_text(
        "from typing import Annotated\n"
        "from jaxtyping import Float\nfrom torch import Tensor\nimport lens_lora as ll\n\n\n"
        "class Interaction(ll.results.Labelled):\n"
        '    values: Float[Tensor, "batch pair"]\n'
        '    module_a: Annotated[tuple[str, ...], "pair"]\n'
        '    module_b: Annotated[tuple[str, ...], "pair"]\n'
        '    noise_floor: Float[Tensor, " batch"]\n'
    )
    path = interaction().save(tmp_path / "pairs.safetensors")
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    refused, name = done.stdout.strip().split("\n")
    assert "'Interaction'" in refused and "import its module first" in refused, done.stderr
    assert name == "Interaction"


class BySite(ll.results.Labelled):
    """A value for each site, and a second number beside it."""

    values: Float[Tensor, "batch site"]
    curvature: Float[Tensor, "batch site"]


class ByPosition(ll.results.Labelled):
    """A value for each site and position."""

    values: Float[Tensor, "batch site position"]


class Whole(ll.results.Labelled):
    """One number for each prompt."""

    values: Float[Tensor, " batch"]


class Counted(ll.results.Labelled):
    """Axes without labels of their own, and groups."""

    values: Float[Tensor, "batch group fold"]
    groups: Annotated[dict[str, tuple[int, ...]], "group: site"]


def test_sites_and_positions_are_labelled_by_what_every_result_holds():
    lens = lens_of()
    g = lens.function(["w5 w7 w8", "w9 w10 w11 w12"], MARGIN, progress=False)
    header = g.header()
    by_site = BySite(g.slopes(), g.curvature(1.0), **header)
    assert list(by_site.to_frame()) == [
        *("prompt", "site", "module", "layer", "kind", "value", "curvature", "share")
    ]
    assert by_site.top(1)["site"][0] in {site.name for site in lens.sites}
    assert by_site.plot().data[0].type == "heatmap"
    parts = ByPosition(g.slopes(by="position"), **header)
    frame = parts.to_frame()
    counts = frame.groupby("prompt")["position"].nunique()
    assert counts.tolist() == [len(tokens) for tokens in parts.str_tokens]
    assert frame["token"][1] == parts.str_tokens[0][1]
    assert set(parts.top(3, prompt=0)) >= {"site", "position", "token", "value", "share"}
    with pytest.raises(ll.errors.ArgumentError, match="choose one with prompt"):
        parts.top(3)
    assert "prompt 0 of 2:" in repr(parts)
    assert len(parts.plot(0).data[0].x) == len(parts.str_tokens[0])


def test_axes_without_labels_are_counted_and_groups_are_named():
    g = lens_of().function(TOKENS, MARGIN, progress=False)
    header = g.header()
    whole = Whole(g.shift, **header)
    assert list(whole.to_frame()) == ["prompt", "value", "share"]
    assert whole.top(1, prompt=0)["share"].tolist() == [1.0]
    assert whole.plot(0).data
    values = g.slopes()[:, :4].view(2, 2, 2)
    counted = Counted(values, {"first": (0, 1), "second": (2, 3)}, **header)
    assert list(counted.to_frame()) == ["prompt", "group", "fold", "value", "share"]
    assert set(counted.top(4)["group"]) == {"first", "second"}
    assert counted.plot().data[0].type == "heatmap"


@pytest.mark.bad_input
def test_annotations_that_do_not_fit_are_refused():
    found = interaction()

    class Nameless(ll.results.Labelled):
        values: Float[Tensor, "..."]

    class NoPrompt(ll.results.Labelled):
        values: Float[Tensor, "pair batch"]

    header = {name: getattr(found, name) for name in ("sites", "base", "adapted", "meta")}
    header |= {name: getattr(found, name) for name in ("str_tokens", "readout", "units")}
    for kind in (Nameless, NoPrompt):
        with pytest.raises(
            ll.errors.ArgumentError, match="a name for each axis, of which the first"
        ):
            kind(found.values, **header)
    with pytest.raises(ll.errors.ArgumentError, match=r"of 2 prompts; .* values\.T turns it"):
        Interaction(**{**vars_of(found), "values": found.values.T})
    with pytest.raises(ll.errors.CallError, match=r"'meta'.*comes from \*\*g\.header\(\)"):
        Interaction(found.values, found.module_a, found.module_b, found.noise_floor)
    few = {**vars_of(found), "module_a": found.module_a[:2]}
    with pytest.raises(ll.errors.LensLoraError, match="module_a has 2 along 'pair', and values 6"):
        Interaction(**few)


@pytest.mark.bad_input
def test_a_name_that_the_package_has_is_refused():
    """A file names its class: two classes of one name would be read as one another."""
    for name in ("Coupling", "Noise"):
        with pytest.raises(ll.errors.ArgumentError, match=f"called '{name}' already.*another name"):
            type(name, (ll.results.Labelled,), {"__module__": "own"})
    type("Mine", (ll.results.Labelled,), {"__module__": "own"})
    type("Mine", (ll.results.Labelled,), {"__module__": "own"})  # a cell that runs again
    with pytest.raises(ll.errors.ArgumentError, match="own has a class of results called 'Mine'"):
        type("Mine", (ll.results.Labelled,), {"__module__": "other"})
