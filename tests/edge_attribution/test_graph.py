"""Edges as a picture and as a graph file: names, lines that meet apart, links that add up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import cases
import models
import pytest
import torch

import lens_lora as ll
from lens_lora.edge_attribution.graph_figure import short_name

pytestmark = pytest.mark.usefixtures("float64")
PROMPT = "w5 w6 w7 w8"
MARGIN = ll.Margin(5, 9)
TINY = 1e-10
_TEXT = {"type": "string"}
_NUMBER = {"type": ["number", "null"]}
_WHOLE = {"type": "integer"}
# What both readers of such files ask for: circuit-tracer's frontend (graph_models.py), which wants
# every field of a node but its last two, and Neuronpedia's graph schema.
SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "transcoder_list", "prompt_tokens", "prompt"],
            "properties": {
                "slug": _TEXT,
                "scan": _TEXT,
                "transcoder_list": {"type": "array", "items": _TEXT},
                "prompt_tokens": {"type": "array", "items": _TEXT},
                "prompt": _TEXT,
                "node_threshold": {"type": "number"},
                "schema_version": _WHOLE,
                "info": {"type": "object"},
                "generation_settings": {"type": "object"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": _TEXT},
                "supernodes": {"type": "array", "items": {"type": "array", "items": _TEXT}},
                "linkType": _TEXT,
                "clickedId": _TEXT,
                "sg_pos": _TEXT,
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": [
                    *("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId"),
                    *("clerp", "token_prob", "is_target_logit", "run_idx", "reverse_ctx_idx"),
                ],
                "properties": {
                    "node_id": {"type": "string", "pattern": r"^(\d+|E)_\d+_\d+$"},
                    "feature": _WHOLE,
                    "layer": {"type": "string", "pattern": r"^(\d+|E)$"},
                    "ctx_idx": _WHOLE,
                    "feature_type": _TEXT,
                    "jsNodeId": _TEXT,
                    "clerp": _TEXT,
                    "token_prob": {"type": "number"},
                    "is_target_logit": {"type": "boolean"},
                    "run_idx": _WHOLE,
                    "reverse_ctx_idx": _WHOLE,
                    "influence": _NUMBER,
                    "activation": _NUMBER,
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {"source": _TEXT, "target": _TEXT, "weight": {"type": "number"}},
            },
        },
    },
}


def lens_of(family: str = "llama") -> ll.LoraLens:
    return cases.case(family, next(iter(models.MAKERS)), "raw").lens


def read(edges: ll.results.Edges, path: Path, **options: Any) -> dict[str, Any]:
    """The file as JSON, checked against the schema; every link joins two nodes of the file."""
    jsonschema = pytest.importorskip("jsonschema")
    assert edges.save_graph(path, **options) == path
    graph = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(graph, SCHEMA)
    nodes = [node["node_id"] for node in graph["nodes"]]
    assert len(set(nodes)) == len(nodes)
    assert len({node["jsNodeId"] for node in graph["nodes"]}) == len(nodes)
    assert {link[end] for link in graph["links"] for end in ("source", "target")} <= set(nodes)
    assert set(graph["qParams"]["pinnedIds"]) <= set(nodes)
    assert graph["qParams"]["clickedId"] in nodes
    return graph


@pytest.mark.parametrize("by", [(), ("position",)])
@pytest.mark.parametrize("readers", ["block", "head"])
def test_links_add_up_to_first_order(readers: str, by: tuple[str, ...], tmp_path: Path):
    """What reaches the readout is Σ a_l, and what leaves a writer is its a_l, token by token."""
    lens = lens_of()
    edges = ll.edges(lens, PROMPT, MARGIN, readers, by=by, progress=False)
    graph = read(edges, tmp_path / "a graph.json")
    names = {node["node_id"]: node["clerp"] for node in graph["nodes"]}
    kinds = {node["node_id"]: node["feature_type"] for node in graph["nodes"]}
    first_order = ll.first_order(lens, PROMPT, MARGIN, progress=False)
    (target,) = [node["node_id"] for node in graph["nodes"] if node["is_target_logit"]]
    assert kinds[target] == "logit"
    assert edges.readout in names[target]
    reached = sum(link["weight"] for link in graph["links"] if link["target"] == target)
    assert abs(reached - float(first_order.values.sum())) < TINY
    of_writer: Counter[str] = Counter()
    for link in graph["links"]:
        if kinds[link["source"]] == "lora writer":
            of_writer[names[link["source"]]] += link["weight"]
    for site, value in zip(first_order.sites, first_order.values[0].tolist(), strict=True):
        assert abs(of_writer[site.name] - value) < TINY, site.name
    positions = {node["ctx_idx"] for node in graph["nodes"]}
    last = len(edges.str_tokens[0]) - 1
    assert positions == (set(range(last + 1)) if by else {last})
    assert graph["metadata"]["slug"] == "a graph"
    assert tuple(graph["metadata"]["prompt_tokens"]) == edges.str_tokens[0]


def test_layers_are_those_of_the_viewers(tmp_path: Path):
    """A writer's and a reader's own block, and the readout beyond the blocks."""
    edges = ll.edges(lens_of(), PROMPT, MARGIN, progress=False)
    graph = read(edges, tmp_path / "g.json")
    for node in graph["nodes"]:
        block = node["clerp"].removeprefix("blocks.").split(".")[0]
        expected = str(models.LAYERS + 1) if node["is_target_logit"] else block
        assert node["layer"] == expected
        assert node["node_id"].split("_")[0] == node["layer"]
    shares = [node["influence"] for node in graph["nodes"] if node["influence"] is not None]
    assert max(shares) == pytest.approx(1)
    assert min(shares) > 0


def test_what_the_viewers_compute_of_a_node(tmp_path: Path):
    """As their code does it: the probability in the readout's label, layer and index of a feature.

    circuit-tracer's `util-cg.js` and Neuronpedia's `utils.ts` split the label of a logit at '(p='.
    """
    lens = lens_of("gpt2")
    edges = ll.edges(lens, PROMPT, ll.LogProb(5), "head", progress=False)
    graph = read(edges, tmp_path / "g.json")
    of_kind = Counter(node["feature_type"] for node in graph["nodes"])
    assert of_kind["logit"] == 1
    assert of_kind["reader"]
    assert of_kind["lora writer"]
    for node in graph["nodes"]:
        if node["feature_type"] == "logit":
            probability = float(node["clerp"].split("(p=")[1].split(")")[0])
            assert probability == node["token_prob"] == 0
            assert node["clerp"].split('"')[1] == edges.readout
        if node["layer"] == "E":
            continue
        diagonal = int(((8 * node["feature"] + 1) ** 0.5 - 1) / 2)
        index = node["feature"] - diagonal * (diagonal + 1) // 2
        assert [str(diagonal - index), str(index)] == node["node_id"].split("_")[:2]


@pytest.mark.bad_input
def test_some_edges_of_one_prompt_of_several(tmp_path: Path):
    both = ll.edges(lens_of(), [PROMPT, "w9 w2"], MARGIN, progress=False)
    second = read(both, tmp_path / "g.json", prompt=1, k=3)
    kinds = {node["node_id"]: node["feature_type"] for node in second["nodes"]}
    weights = [link["weight"] for link in second["links"] if kinds[link["source"]] == "lora writer"]
    assert sorted(weights) == pytest.approx(sorted(both.top(3, 1)["value"]))
    with pytest.raises(ll.errors.ArgumentError, match="2 prompts"):
        both.save_graph(tmp_path / "g.json")
    for k in (0, -1, 1.5):
        with pytest.raises(ll.errors.ArgumentError, match="k"):
            both.save_graph(tmp_path / "g.json", prompt=0, k=k)


def test_a_group_stands_in_its_first_layer(tmp_path: Path):
    groups = {"attention": "*.attn.*", "MLPs": "*.mlp.*"}
    edges = ll.edges(lens_of(), PROMPT, MARGIN, group=groups, progress=False)
    graph = read(edges, tmp_path / "g.json")
    writers = {n["clerp"]: n["layer"] for n in graph["nodes"] if n["feature_type"] == "lora writer"}
    assert writers == {"attention": "0", "MLPs": "0"}


# --- The picture


def texts_of(figure: Any) -> list[str]:
    return [text for trace in figure.data if trace.mode == "text" for text in trace.text]


@pytest.mark.parametrize("readers", ["block", "head"])
def test_every_node_has_its_name_in_the_picture(readers: str):
    edges = ll.edges(lens_of(), PROMPT, MARGIN, readers, progress=False)
    figure = edges.plot_graph(12)
    drawn = edges.top(12)
    names = texts_of(figure)
    for name in {*drawn["writer"], *drawn["reader"]}:
        assert short_name(name) in names
    assert len(names) == 2 + drawn["writer"].nunique() + drawn["reader"].nunique()
    assert not figure.layout.xaxis.visible
    assert not figure.layout.yaxis.visible


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("blocks.29.mlp.gate", "29 gate"),
        ("blocks.3.attn.q", "3 q"),
        ("blocks.5.mlp", "5 MLP"),
        ("blocks.5.attn", "5 attention"),
        ("blocks.5.attn.3.q", "5 head 3 q"),
        ("blocks.7.ln1", "7 ln1"),
        ("blocks.3.attn.q@v1.5", "3 q@v1.5"),
        ("blocks.20.hook_resid_post", "20 hook_resid_post"),
        ("logits", "logits"),
        ("layer 3", "layer 3"),
        ("embed", "embed"),
    ],
)
def test_names_are_short(name: str, short: str):
    assert short_name(name) == short


def test_a_group_may_be_called_as_a_reader():
    """Each name is looked for on its own side."""
    groups = {"logits": "*.attn.*", "blocks.0.mlp": "*.mlp.*"}
    edges = ll.edges(lens_of(), PROMPT, MARGIN, group=groups, progress=False)
    names = texts_of(edges.plot_graph())
    assert names.count("logits") == 2
    assert names.count("0 MLP") == 2


def test_lines_meet_a_node_one_beside_another():
    """At neither end do two lines meet in one point, and each ends within its node's bar."""
    edges = ll.edges(lens_of(), PROMPT, MARGIN, progress=False)
    figure = edges.plot_graph(20)
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.opacity]
    assert len(lines) == 20
    for end in (0, -1):
        places = [trace.y[end] for trace in lines]
        assert len({round(place, 6) for place in places}) == 20
        gaps = torch.tensor(sorted(places)).diff()
        assert float(gaps.min()) > 0.99
    widths = [trace.line.width for trace in lines]
    sizes = edges.top(20)["value"].abs().tolist()
    assert widths[0] == max(widths)
    assert sizes[0] == max(sizes)
    legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert legend[:2] == ["raises it", "lowers it"]
    assert len(legend) == 4
