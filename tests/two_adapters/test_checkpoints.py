"""A training, planted: copies of one adapter at growing strength, and PEFT as the oracle."""

from __future__ import annotations

import math

import cases
import models
import numpy as np
import pytest
import torch
from reference import peft_scales

import lens_lora as ll
from lens_lora.core import Evaluations
from lens_lora.errors import AdapterError, ArgumentError

pytestmark = pytest.mark.usefixtures("float64")
HOSTS = list(models.MAKERS)
STRENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)


def answers(case: cases.Case) -> ll.Margin:
    """Two tokens whose order the adapter reverses at the first prompt."""
    with torch.no_grad(), case.peft.disable_adapter():
        base = case.peft(models.tokens()).logits[0, -1]
    with torch.no_grad():
        adapted = case.peft(models.tokens()).logits[0, -1]
    return ll.Margin(int((adapted - base).argmax()), int((base - adapted).argmax()))


def training(case: cases.Case, strengths=STRENGTHS) -> list[ll.Adapter]:
    return [case.lens.adapter.scaled(s).named(f"at {s}") for s in strengths]


@pytest.fixture(scope="module", params=HOSTS)
def found(request):
    case = cases.case("llama", request.param, "raw")
    with models.lifted():
        readout = answers(case)
        result = ll.checkpoints(
            case.lens, training(case), models.tokens(), readout, steps=[4, 10, 20, 30, 40],
            progress=False,
        )  # fmt: skip
    return case, readout, result


def g(case: cases.Case, readout: ll.Margin, scale: float) -> torch.Tensor:
    with torch.no_grad(), peft_scales(case.peft, dict.fromkeys(case.lens.adapter.modules, scale)):
        logits = case.peft(models.tokens()).logits[:, -1]
    return logits[:, readout.doc] - logits[:, readout.pre]


def test_every_checkpoint_is_peft_s_at_that_strength(found):
    case, readout, result = found
    assert torch.allclose(result.base, g(case, readout, 0.0), atol=1e-9)
    for k, strength in enumerate(STRENGTHS):
        assert torch.allclose(result.adapted[k], g(case, readout, strength), atol=1e-9)
    h = 1e-4
    near, far = (g(case, readout, h * k) - g(case, readout, -h * k) for k in (1, 2))
    slope = (8 * near - far) / (12 * h)
    for k, strength in enumerate(STRENGTHS):
        assert torch.allclose(result.first_order[k], strength * slope, atol=1e-6)
    assert torch.allclose(result.remainder, result.shift - result.first_order)


def test_each_checkpoint_has_its_own_noise_floor(found):
    case, readout, result = found
    for k, adapter in enumerate(training(case)):
        own = Evaluations(case.lens.with_adapter(adapter).function(models.tokens(), readout))
        adapted_noise = own.noise((1.0,), at=1.0)
        assert torch.allclose(result.noise[1 + k], adapted_noise, rtol=1e-6)
        whole = own.noise((1.0,), at=0.0).square() + adapted_noise.square()
        assert torch.allclose(result.noise_floor[k].square(), whole, rtol=1e-6)
    assert result.noise.shape == (6, 2)
    assert len(set(result.noise[:, 0].tolist())) > 2


def test_the_direction_is_the_final_one_throughout(found):
    _, _, result = found
    assert torch.allclose(result.to_final, torch.ones_like(result.to_final))
    assert result.angle.max() < 1e-4
    assert result.phases["angle"] == ()
    ratio = result.norms / result.norms[-1]
    assert bool(result.read_angle[0].isnan().all())
    assert result.read_angle[1:].max() < 1e-3
    assert bool(result.write_angle[0].isnan().all())
    assert result.write_angle[1:].max() < 1e-3
    assert torch.allclose(ratio, torch.tensor(STRENGTHS)[:, None].expand_as(ratio).double())
    steps = torch.tensor(STRENGTHS).diff(prepend=torch.zeros(1)).double()
    assert torch.allclose(result.moved, steps[:, None] * result.norms[-1], atol=1e-6)


@pytest.mark.parametrize("cls", HOSTS)
def test_all_checkpoints_flip_at_one_strength(cls: str):
    """ε times a checkpoint's own strength is the same of all; one that is weaker has no flip."""
    case = cases.case("llama", cls, "raw")
    readout = answers(case)
    strengths = (0.5, 1.0, 1.5, 2.0)
    of_strengths = training(case, strengths)
    result = ll.checkpoints(case.lens, of_strengths, models.tokens(), readout, progress=False)
    weak, *strong = result.flip_scale[:, 0].tolist()
    assert math.isnan(weak)
    at = [scale * strength for scale, strength in zip(strong, strengths[1:], strict=True)]
    assert at == pytest.approx([at[0]] * 3, abs=1e-6)
    assert strengths[0] < at[0] < strengths[1]
    assert float(g(case, readout, at[0])[0]) == pytest.approx(0, abs=1e-6)


def test_the_step_of_a_flip_is_between_those_around_it(found):
    """Where the line through the margins of the checkpoints is zero."""
    _, _, result = found
    assert result.flips[-1, 0]
    at = float(result.flip_scale[-1, 0])
    steps = [0, 4, 10, 20, 30, 40]
    after = int((torch.tensor((0.0, *STRENGTHS)) < at).sum())
    assert steps[after - 1] < float(result.flip_step[0]) <= steps[after]
    values = torch.cat([result.base[None], result.adapted])[:, 0].numpy()
    line = np.interp(float(result.flip_step[0]), steps, values)
    assert line == pytest.approx(0, abs=1e-9)


def test_tables_and_pictures(found):
    case, _, result = found
    assert len(result.to_frame()) == 10
    layers = result.by_group("moved")
    assert list(layers.columns) == [4, 10, 20, 30, 40]
    assert len(layers) == 2
    effect = result.by_group("effect", "kind").sum()
    assert np.allclose(effect, result.first_order.mean(1))
    assert len(result.plot().data) >= 4
    assert result.plot_modules("norm", "site").data[0].z is not None
    assert "flips at step" in repr(result)


def test_a_turn_of_the_direction_is_an_angle_and_a_phase():
    """Ten steps along one adapter, then one that turns to another."""
    case = cases.case("llama", HOSTS[0], "raw")
    peft = models.peft_model("llama", case.base, seed=11, targets=models.LINEARS["llama"])
    other = ll.Adapter.from_peft(peft).named("other")
    before = [case.lens.adapter.scaled(0.02 * k) for k in range(1, 8)]
    after = [case.lens.adapter.scaled(0.02).mixed(other, w) for w in (0.9, 0.92, 0.94)]
    run = [a.named(str(i)) for i, a in enumerate([*before, *after])]
    result = ll.checkpoints(case.lens, run, models.tokens(), ll.Margin(5, 9), progress=False)
    assert result.phases["angle"] == ((7.0, 8.0),)
    assert result.angle[6] > 80
    assert result.angle[7] < 10
    assert result.angle[-1] == 0


@pytest.mark.parametrize("turned", ["read", "write"])
def test_what_is_read_turns_apart_from_what_is_written(turned: str):
    """Rank 1, of which one factor alone turns by 30°: one angle is 30°, the other 0, for each site;
    `to_final` says cos 30° of either."""
    lens = cases.case("llama", HOSTS[0], "raw").lens
    seed = torch.Generator().manual_seed(5)

    def orthonormal(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        frame = torch.linalg.qr(torch.randn(width, 2, generator=seed, dtype=torch.float64)).Q
        return frame[:, 0], frame[:, 1]

    widths = {s.module: lens.adapter.modules[s.module] for s in lens.sites}
    frames = {m: (orthonormal(f.A.shape[1]), orthonormal(f.B.shape[0])) for m, f in widths.items()}

    def at(degrees: float) -> ll.Adapter:
        cos = np.cos(np.radians(degrees))
        sin = np.sin(np.radians(degrees))
        angles = {"read": ((cos, sin), (1, 0)), "write": ((1, 0), (cos, sin))}[turned]
        vectors = {
            module: [c * x + s * y for (c, s), (x, y) in zip(angles, frame, strict=True)]
            for module, frame in frames.items()
        }
        return ll.Adapter.from_factors(
            {m: ll.LoRAFactors(a[None], b[:, None], 0.1) for m, (a, b) in vectors.items()}
        )

    run = [at(0), at(30), at(60)]
    result = ll.checkpoints(lens, run, models.tokens(), ll.Margin(5, 9), progress=False)
    angles = {"read": result.read_angle[1:], "write": result.write_angle[1:]}
    for side, degrees in angles.items():
        expected = torch.full_like(degrees, 30.0 if side == turned else 0.0)
        assert torch.allclose(degrees, expected, atol=1e-3), side
    assert torch.allclose(result.to_final[1], torch.full_like(result.to_final[1], 0.75**0.5))
    by_layer = result.by_group(turned)
    assert by_layer[1].isna().all()
    assert np.allclose(by_layer[[2, 3]], 30, atol=1e-3)
    assert result.plot_modules(turned).data[0].z is not None


def test_a_run_folder_is_read_in_the_order_of_its_steps(tmp_path):
    case = cases.case("llama", HOSTS[0], "raw")
    for step, strength in ((100, 1.0), (20, 0.5), (3, 0.25)):
        case.lens.adapter.scaled(strength).save(tmp_path / f"checkpoint-{step}")
    (tmp_path / "logs").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    readout = ll.Margin(5, 9)
    read = ll.checkpoints(case.lens, tmp_path, models.tokens(), readout, progress=False)
    assert read.steps == (3, 20, 100)
    assert read.names[0] == "checkpoint-3"
    assert read.phases == {}
    assert "3 checkpoints are too few to tell a phase change" in read.story()
    given = training(case, (0.25, 0.5, 1.0))
    listed = ll.checkpoints(case.lens, given, models.tokens(), readout, progress=False)
    assert torch.allclose(read.adapted, listed.adapted, atol=1e-9)
    assert listed.steps == (1, 2, 3)


@pytest.mark.bad_input
def test_bad_input_is_refused(tmp_path):
    case = cases.case("llama", HOSTS[0], "raw")
    lens = case.lens
    run = training(case)
    tokens = models.tokens()
    readout = ll.Margin(5, 9)

    def refuses(error, match, adapters, read=readout, **options):
        with pytest.raises(error, match=match):
            ll.checkpoints(lens, adapters, tokens, read, progress=False, **options)

    refuses(ArgumentError, "1 checkpoint:", run[:1])
    refuses(ArgumentError, "0 checkpoints", [])
    refuses(ArgumentError, "have been loaded; pass both to ll.load_adapter", run, revision="main")
    refuses(ArgumentError, "expected a list of ll.Adapter", [run[0], "x"])
    refuses(ArgumentError, "down_proj.*does not", [run[0], run[1].only("*.q_proj")])
    named = [ll.Adapter(run[0].modules, base_model=name) for name in ("x/y", "x/z")]
    refuses(AdapterError, "x/y.*x/z", named)
    refuses(ArgumentError, "steps=", run, steps=[1, 2, 2, 3, 4])
    refuses(ArgumentError, "steps=", run, steps=[1, 2])
    refuses(ArgumentError, "kl_shares", run, ll.KL())
    refuses(AdapterError, "no such folder", str(tmp_path / "nowhere"))
    refuses(AdapterError, "0 folders checkpoint", tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    refuses(AdapterError, "1 folder checkpoint", tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    refuses(AdapterError, "checkpoint-", tmp_path)
    refuses(ArgumentError, "those of its checkpoint", tmp_path, steps=[1, 2])
