"""What is planned from a configuration is what the planner says of a lens, and what is run."""

from __future__ import annotations

import json

import models
import pytest
import torch
from typer.testing import CliRunner

import lens_lora as ll
from lens_lora.cli import app
from lens_lora.core.function.footprint import footprint_of
from lens_lora.hosts.planned_analyses import planned_analyses
from lens_lora.hosts.unloaded import unloaded

MARGIN = ll.Margin(5, 9)


def lens_and_plan(name, folder):
    """A lens over a tiny model, and what its configuration says."""
    base = models.hf_model(name, dtype=torch.float32)
    base.config.save_pretrained(folder)
    adapter = ll.Adapter.from_peft(models.peft_model(name, base))
    model = models.as_loaded(base, "TransformerBridge")
    return ll.LoraLens(model, adapter), unloaded(str(folder), torch.float32)


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_configuration_gives_the_footprint_of_the_lens(name: str, tmp_path):
    lens, found = lens_and_plan(name, tmp_path)
    prompts = lens.prompts(models.tokens())
    assert footprint_of(found.sizes.as_lens(), prompts) == footprint_of(lens, prompts)
    base = models.hf_model(name, dtype=torch.float32)
    weights = {weight.data_ptr(): weight.nbytes for weight in base.parameters()}
    assert found.weights == sum(weights.values())


@models.NEEDS_BRIDGE
@pytest.mark.bad_input
def test_the_command_needs_a_configuration_alone(tmp_path):
    lens_and_plan("llama", tmp_path)
    arguments = ["plan", "--model", str(tmp_path / "config.json"), "--tokens", "64"]
    found = CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "plan.json")])
    assert found.exit_code == 0
    assert "first_order" in found.stdout
    assert '"least_bytes"' in (tmp_path / "plan.json").read_text()
    little = CliRunner().invoke(app, [*arguments, "--max-memory", "1000"])
    assert "refused" in little.stdout
    nothing = CliRunner().invoke(app, ["plan", "--model", str(tmp_path / "none")])
    assert nothing.exit_code == 2
    assert "no configuration" in nothing.stderr


@models.NEEDS_BRIDGE
def test_the_embedded_model_is_planned_by_its_name(tmp_path, monkeypatch):
    """As in every other command, where 'embedded' is not looked for on the hub."""
    models.hf_model("llama").config.save_pretrained(tmp_path)
    folder = "lens_lora.demonstration.embedded.embedded_model_folder"
    monkeypatch.setattr(folder, lambda **_: tmp_path)
    found = CliRunner().invoke(app, ["plan", "--model", "embedded", "--tokens", "64"])
    assert found.exit_code == 0
    assert "first_order" in found.stdout


@models.NEEDS_BRIDGE
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_devices_share_blocks_weights_and_graphs(name: str, tmp_path):
    _, whole = lens_and_plan(name, tmp_path)
    spread = unloaded(str(tmp_path), torch.float32, devices=2)
    assert sum(device.blocks for device in spread.devices) == whole.sizes.n_layers
    assert sum(device.weights for device in spread.devices) == whole.weights
    assert [device.weights for device in whole.devices] == [whole.weights]


@pytest.mark.bad_input
def test_blocks_that_are_in_no_list_are_refused(tmp_path, monkeypatch):
    """They are looked for as the list of as many modules as the configuration names layers."""
    models.hf_model("llama").config.save_pretrained(tmp_path)
    other = models.hf_model("llama")
    other.model.layers = other.model.layers[:1]
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_config", lambda *_, **__: other.to("meta")
    )
    with pytest.raises(ll.errors.ModelStateError, match=r"names 2 layers.*lists .* have \[1\]"):
        unloaded(str(tmp_path), torch.float32)


@models.NEEDS_BRIDGE
@pytest.mark.bad_input
def test_the_command_says_what_lies_on_each_device(tmp_path):
    lens_and_plan("llama", tmp_path)
    file = tmp_path / "plan.json"
    arguments = ["plan", "--model", str(tmp_path), "--tokens", "64", "--devices", "2"]
    found = CliRunner().invoke(app, [*arguments, "--json", str(file)])
    assert found.exit_code == 0
    assert "device 1" in found.stdout
    told = json.loads(file.read_text())
    peaks = {row["analysis"]: row["peak_bytes"] for row in told["analyses"]}
    for name in ("first_order", "second_order"):
        here = [device["peak_bytes"][name] for device in told["devices"]]
        # Half of a graph lies on each of two equal devices.
        assert here[0] == here[1]
        assert 1.9 < peaks[name] / here[0] < 2.1
    for device in told["devices"]:
        assert device["peak_bytes"]["a forward pass"] == peaks["a forward pass"]
    bounded = CliRunner().invoke(app, [*arguments, "--max-memory", "8e9"])
    assert bounded.exit_code == 2
    assert "all devices together" in bounded.stderr


@models.NEEDS_BRIDGE
@pytest.mark.slow
def test_the_planned_passes_are_those_that_run(tmp_path):
    """Counted at the last block: rows forward, and rows that a gradient goes back through.

    Interventions share their first blocks, and a flip may take fewer steps, so these are at most.
    """
    lens, found = lens_and_plan("llama", tmp_path)
    # So long that g(1) has a pass of its own, and does not ride beside the slopes.
    prompts = lens.prompts(models.tokens(1, 24))
    runs = {
        "first_order": lambda: ll.first_order(lens, prompts, MARGIN),
        "path_attribution": lambda: ll.path_attribution(
            lens, prompts, MARGIN, tol=1e-30, max_nodes=9, progress=False
        ),
        "fact_margin": lambda: ll.fact_margin(lens, prompts, 5, 9, progress=False),
        "patch_sites": lambda: ll.patch_sites(lens, prompts, MARGIN, progress=False),
        "kl_shares": lambda: ll.kl_shares(lens, prompts, progress=False),
        "second_order": lambda: ll.second_order(lens, prompts, MARGIN, progress=False),
    }
    planned = {plan.name: plan for plan in planned_analyses(found.sizes, prompts.tokens.shape[1])}
    counts = {}
    for name, run in runs.items():
        counts[name] = counted(lens, run)
    stated = {name: (planned[name].forward, planned[name].backward) for name in runs}
    least = {"patch_sites": len(lens.sites), "fact_margin": 35}
    for name, fewest in least.items():
        forward, backward = counts.pop(name)
        most, same = stated.pop(name)
        assert fewest <= forward <= most
        assert backward == same
    assert counts == stated


def counted(lens, run):
    """How many rows go forward through the last block, and back."""
    seen = {"forward": 0, "backward": 0}

    def count(block, args, output):
        out = output[0] if isinstance(output, tuple) else output
        seen["forward"] += len(out)
        if out.requires_grad:
            out.register_hook(lambda _: seen.update(backward=seen["backward"] + len(out)))

    handle = lens.model.blocks[-1].register_forward_hook(count)
    try:
        run()
    finally:
        handle.remove()
    return seen["forward"], seen["backward"]
