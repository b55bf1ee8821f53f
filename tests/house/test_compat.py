"""Private names of other libraries, which `lens_lora.compat` alone touches.

A test of a name fails if a library no longer has it, or if it no longer does what compat says, and
the failure tells the library and its version. The last part of the file reads the package's syntax
trees, and finds a private name that is touched outside of compat.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import architectures
import cases
import models
import pytest
import torch
import torch.autograd.forward_ad as fwad
import transformers
from torch import nn
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from lens_lora import compat
from lens_lora.errors import ModelStateError
from lens_lora.hosts.experts import _FLAGS
from lens_lora.spans import Temporary

PACKAGE = Path(inspect.getfile(compat)).parents[1]


def require(library: str, owner: object, *names: str) -> None:
    """Fail if an object of a library lacks one of these names."""
    gone = [name for name in names if not hasattr(owner, name)]
    where = getattr(owner, "__name__", type(owner).__name__)
    assert not gone, f"{library} {version(library)} has no {gone} in {where}: see lens_lora/compat"


@pytest.fixture(scope="module")
def llama():
    """A tiny Llama of Hugging Face."""
    return models.hf_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def bridge(llama):
    """A TransformerBridge over the tiny Llama."""
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("this transformer-lens has no TransformerBridge")
    return models.MAKERS["TransformerBridge"](llama)


# --- Modules and tensors of torch


def refusing(module: nn.Module, name: str) -> Temporary:
    """A block in which reading this attribute of a module raises a ValueError that names it."""

    def refuse(span: Temporary) -> None:
        compat.refuse_reading(span, module, [name], lambda: ValueError(name))

    return Temporary(refuse)


def test_a_refused_attribute_can_be_read_after_the_block():
    """Nested blocks end likewise. In them, other modules can be read and the module computes."""
    module = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    kind = type(module)
    before = module(torch.ones(2))
    with refusing(module, "in_features"), refusing(module, "in_features"):
        with pytest.raises(ValueError, match="in_features"):
            _ = module.in_features
        assert other.in_features == 2
        assert isinstance(module, kind)
        assert torch.equal(module(torch.ones(2)), before)
    assert type(module) is kind
    assert module.in_features == 2


@pytest.mark.parametrize(
    ("first", "second"), [("in_features", "out_features"), ("out_features", "in_features")]
)
def test_blocks_that_refuse_a_reading_end_in_any_order(first: str, second: str):
    """When the first block has ended, its attribute can be read, and the second one's cannot."""
    module = nn.Linear(2, 3)
    sizes = {"in_features": 2, "out_features": 3}
    blocks = {name: refusing(module, name) for name in sizes}
    for block in blocks.values():
        block.__enter__()
    blocks[first].close()
    assert getattr(module, first) == sizes[first]
    with pytest.raises(ValueError, match=second):
        getattr(module, second)
    blocks[second].close()
    assert type(module) is nn.Linear
    assert getattr(module, second) == sizes[second]


def test_compiled_models():
    """A model in torch.compile's wrapper is found, and so is a module that is compiled in place."""
    module = nn.Sequential(nn.Linear(2, 2))
    assert compat.uncompiled(torch.compile(module, backend="eager")) is module
    assert compat.uncompiled(module) is module
    assert compat.uncompiled(None) is None
    assert not compat.is_compiled_in_place(module[0])
    module[0].compile(backend="eager")
    assert compat.is_compiled_in_place(module[0])
    assert not compat.is_compiled_in_place(module)
    compat.compile_no_more(module)
    assert not compat.is_compiled_in_place(module[0])


def test_hooks_of_a_module():
    module = nn.Linear(2, 2)
    require("torch", module, "_forward_hooks", "_forward_pre_hooks")
    require("torch", module, "_backward_hooks", "_backward_pre_hooks")
    require("torch", module, "_forward_pre_hooks_with_kwargs")
    forward = module.register_forward_hook(lambda *args: None)
    before_forward = module.register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    backward = module.register_full_backward_hook(lambda *args: None)
    before_backward = module.register_full_backward_pre_hook(lambda *args: None)
    hooks = compat.hooks_of(module)
    assert list(hooks.forward) == [forward.id]
    assert list(hooks.before) == [before_forward.id]
    assert list(hooks.backward) == [backward.id]
    assert list(hooks.before_backward) == [before_backward.id]
    assert hooks.takes_kwargs == {before_forward.id: True}


def test_hooks_run_in_the_order_in_which_torch_lists_them():
    """A hook that is moved to the front of the list runs first."""
    module = nn.Linear(2, 2)
    order: list[int] = []
    module.register_forward_hook(lambda *args: order.append(2))
    last = module.register_forward_hook(lambda *args: order.append(1))
    compat.hooks_of(module).forward.move_to_end(last.id, last=False)
    module(torch.zeros(1, 2))
    assert order == [1, 2], f"torch {version('torch')} runs hooks in another order than it lists"


def test_hooks_of_a_block_are_removed_after_it():
    module = nn.Linear(2, 2)
    order: list[str] = []

    def put_on(span: Temporary) -> None:
        compat.add_forward_hook(span, module, lambda *_: order.append("second"))
        compat.add_forward_hook(span, module, lambda *_: order.append("first"), is_first=True)
        compat.add_pre_hook(span, module, lambda *_: order.append("before"), with_kwargs=True)

    with Temporary(put_on):
        module(torch.zeros(1, 2))
        assert compat.has_hooks(module)
    module(torch.zeros(1, 2))
    assert order == ["before", "first", "second"]
    assert not any(compat.hooks_of(module))
    assert not compat.has_hooks(module)


def test_a_backward_hook_is_seen_alone():
    """A module has hooks even if none of them runs in its forward pass."""
    module = nn.Linear(2, 2)
    module.register_full_backward_hook(lambda *_: None)
    assert compat.has_hooks(module)


def test_operands_of_torch_s_products():
    """For each function that multiplies rows by a matrix, x, W and b of xW + b are found."""
    x = torch.randn(3, 2)
    weight = torch.randn(2, 4)
    bias = torch.randn(4)
    calls_with_bias = {
        torch.addmm: (bias, x, weight),
        nn.functional.linear: (x, weight.T, bias),
    }
    for function, args in calls_with_bias.items():
        operands = compat.rows_and_weight(function, args, {})
        assert operands is not None
        rows, matrix, added = operands
        torch.testing.assert_close(rows @ matrix + added, x @ weight + bias)
    stack_of_matrices = torch.zeros(5, 2, 4)
    for function in compat.MATMULS:
        operands = compat.rows_and_weight(function, (x, weight), {})
        assert operands is not None
        rows, matrix, _ = operands
        assert torch.equal(rows @ matrix, x @ weight)
        assert compat.rows_and_weight(function, (x, stack_of_matrices), {}) is None


def test_dictionaries_of_a_module():
    module = nn.Sequential(nn.Linear(2, 2))
    require("torch", module, "_parameters", "_modules")
    assert compat.children_of(module)["0"] is module[0]
    assert compat.parameters_in(module[0])["weight"] is module[0].weight


def test_replaced_forward():
    """A module computes what the innermost block says, and after it what was there before."""
    module = nn.Linear(2, 2)
    assert compat.own_forward(module) is None
    with Temporary(lambda span: compat.replace_forward(span, module, lambda x: x + 1)):
        assert module(torch.zeros(1)).item() == 1
        with Temporary(lambda span: compat.replace_forward(span, module, lambda x: x + 2)):
            assert module(torch.zeros(1)).item() == 2
        assert module(torch.zeros(1)).item() == 1
    assert compat.own_forward(module) is None
    compat.set_forward(module, lambda x: x)
    assert compat.own_forward(module) is not None


def test_precision_of_float32_products():
    """A setting for all backends is seen."""
    before = compat.float32_products()
    torch.set_float32_matmul_precision("medium")
    try:
        assert compat.float32_products() != before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def mkldnn_products():
    """The settings of one backend for products, which may be changed. They are put back."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has no setting of a single backend")
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before
    torch.set_float32_matmul_precision("highest")


def test_precision_of_one_backend_s_float32_products(mkldnn_products):
    """A setting of one backend is seen. torch's own question about it would raise an error."""
    mkldnn_products.fp32_precision = "bf16"
    assert "bf16" in compat.float32_products()


def test_torch_s_own_precision_set_by_name_is_no_other_one(mkldnn_products):
    """A backend without a setting rounds as it does with 'highest', so the answer is the same."""
    torch.set_float32_matmul_precision("highest")
    by_name = compat.float32_products()
    mkldnn_products.fp32_precision = "none"
    assert compat.float32_products() == by_name


def test_edits_of_a_tensor():
    """An edit in place is counted."""
    tensor = torch.zeros(2)
    require("torch", tensor, "_version")
    before = compat.edits_of(tensor)
    tensor.add_(1)
    assert compat.edits_of(tensor) == before + 1


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
    "vmap": lambda function, x: torch.func.vmap(function)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_within_a_transform(transform: str):
    """A function can tell that torch.func runs it, and that its argument is wrapped."""
    functorch = import_module("torch._C._functorch")
    require("torch", functorch, "get_interpreter_stack", "is_functorch_wrapped_tensor")
    answers: list[tuple[bool, bool]] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append((compat.is_within_transform(), compat.is_wrapped(x)))
        return x.sum()

    x = torch.ones(2)
    TRANSFORMS[transform](ask, x)
    assert answers == [(True, True)]
    ask(x)
    assert answers[1] == (False, False)


def test_forward_mode_is_allowed():
    """It is allowed in the block even where it was turned off, and then off again."""
    require("torch", torch._C, "_is_fwd_grad_enabled", "_set_fwd_grad_enabled")
    with fwad._set_fwd_grad_enabled(False):
        with Temporary(compat.allow_forward_mode), fwad.dual_level():
            product = 2 * fwad.make_dual(torch.ones(()), torch.ones(()))
            assert fwad.unpack_dual(product).tangent is not None
        assert not torch._C._is_fwd_grad_enabled()


class Counting(TorchFunctionMode):
    """A mode that counts the functions of torch that run in it."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


class NeverEntered(Counting):
    """A mode that is interrupted while it is entered."""

    def __enter__(self):
        raise KeyboardInterrupt


def depth_of_modes() -> int:
    return torch._C._len_torch_function_stack()


def test_a_mode_is_left_alone():
    """The end of a block leaves the mode of the block, and no other one."""
    require("torch", torch._C, "_len_torch_function_stack")
    require("torch", torch.overrides, "_pop_mode")
    with Counting() as outer:
        with Temporary(lambda span: compat.enter_mode(span, Counting())):
            assert depth_of_modes() == 2
        assert depth_of_modes() == 1
        torch.ones(2).add(1)
        assert outer.calls


def test_a_mode_that_was_never_entered_is_not_left():
    """If an interrupt comes before the mode is entered, the mode around it stays."""
    with Counting() as outer:
        block = Temporary(lambda span: compat.enter_mode(span, NeverEntered()))
        with pytest.raises(KeyboardInterrupt):
            block.__enter__()
        assert depth_of_modes() == 1
        torch.ones(2).add(1)
        assert outer.calls


def test_attention_kernels():
    require("torch", torch.nn.attention, "_cur_sdpa_kernel_backends", "_sdpa_kernel")
    before = compat.attention_kernels()
    with Temporary(lambda span: compat.use_attention_kernels(span, [SDPBackend.MATH])):
        assert compat.attention_kernels() == [SDPBackend.MATH]
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert compat.attention_kernels() == before


def test_classes_of_weights_that_processes_share():
    """torch still has the classes by which compat sees weights that are spread over processes."""
    fsdp = import_module("torch.distributed.fsdp")
    tensors = import_module("torch.distributed.tensor")
    require("torch", fsdp, "FSDPModule")
    require("torch", tensors, "DTensor")
    class_of_fsdp = type("Gathered", (fsdp.FSDPModule, nn.Linear), {})
    # FSDP makes its modules in a process group, of which there is none here.
    gathered = object.__new__(class_of_fsdp)
    plain = nn.Linear(1, 1)
    assert compat.gathers_weights(gathered)
    assert not compat.gathers_weights(plain)
    assert not compat.is_sharded(plain.weight)


# --- Modules of accelerate


def offload(module: nn.Module) -> nn.Sequential:
    """Put a module into a model from which accelerate takes all weights between calls."""
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(module)
    accelerate.cpu_offload(model, execution_device="cpu")
    return model


def test_an_offloaded_module():
    """Its weight lies elsewhere between calls, and is brought in for a block."""
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    model = offload(module)
    require("accelerate", module, "_hf_hook", "_old_forward")
    require("accelerate", module._hf_hook, "offload", "execution_device", "weights_map")
    assert compat.is_offloaded(module)
    assert compat.computing_attribute(module) == "_old_forward"
    assert compat.home_of(model) == torch.device("cpu")
    # A weight that accelerate brings in is not refused, although it is on the device 'meta'.
    assert module.weight.is_meta
    compat.refuse_out_of_reach({module: "0"})
    with compat.brought_in(module):
        assert torch.equal(module.weight, weight)


def test_a_module_that_is_not_offloaded():
    module = nn.Linear(2, 2)
    assert not compat.is_offloaded(module)
    assert compat.computing_attribute(module) == "forward"


class PlusOne(compat.SharedForward):
    """A forward that adds one."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_the_forward_of_an_offloaded_module_is_replaced():
    """It is replaced where accelerate keeps it, and put back after the block."""
    module = nn.Linear(2, 2)
    offload(module)
    with Temporary(lambda span: PlusOne.until(span, module, object(), "_old_forward")):
        assert module(torch.zeros(1)).item() == 1
    assert not isinstance(vars(module)["_old_forward"], PlusOne)


# --- Bridges and hook points of transformer-lens


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_function_within_a_hook_of_transformer_lens(direction: str):
    """The user's function is found inside the wrapper that a hook point registers."""
    from transformer_lens.hook_points import HookPoint

    def mine(tensor: object, hook: object) -> None:
        pass

    point = HookPoint()
    point.add_hook(mine, dir=direction)
    hooks = compat.hooks_of(point)
    hooks_of_direction = hooks.forward if direction == "fwd" else hooks.backward
    (registered,) = hooks_of_direction.values()
    assert registered is not mine
    assert compat.hook_function(registered) is mine, (
        f"transformer-lens {version('transformer-lens')} wraps hooks otherwise"
    )
    if direction == "fwd":
        assert compat.calls(registered, mine)
    assert not compat.calls(registered, print)


def test_a_function_without_a_wrapper_is_itself():
    assert compat.hook_function(print) is print


@models.NEEDS_NEWEST
def test_what_a_bridge_wires_itself_is_nobody_s_hook():
    """A bridge's own hooks are left out of a run's settings, and a user's hook is among them.

    XGLM's MLP has no module of its own, so its points hang on those of the block.
    """
    from lens_lora.runs.fingerprint import settings

    bridge = models.bridge(architectures.hf_model("XGLM", dtype=torch.float32))
    hooks = [compat.hooks_of(module) for module in bridge.modules()]
    assert any(of_module.forward or of_module.before for of_module in hooks)
    assert settings(bridge)["hooks"] == []
    bridge.blocks[0].hook_in.add_hook(lambda tensor, hook: None)
    assert len(settings(bridge)["hooks"]) == 1


@models.NEEDS_NEWEST
def test_the_scale_at_an_embedding_s_hook_point():
    """Granite doubles its embedding outside of the module, and the hook point shows the double."""
    bridge = models.bridge(architectures.hf_model("Granite", dtype=torch.float32))
    require("transformer-lens", bridge.embed, "_output_contribution_scale")
    assert compat.scale_at_hook_out(bridge.embed) == 2.0
    assert compat.scale_at_hook_out(bridge.blocks[0].attn.q) == 1.0
    _, cache = bridge.run_with_cache(models.tokens())
    of_module = bridge.embed.original_component(models.tokens())
    assert torch.equal(cache["embed.hook_out"], 2 * of_module)


def test_a_component_without_a_module(bridge):
    """A bridge has such a component in place of a module that its model lacks."""
    empty = type(bridge.ln_final)("ln_final", bridge.cfg)
    assert compat.wraps_nothing(empty)
    assert not compat.wraps_nothing(bridge.ln_final)
    assert not compat.wraps_nothing(None)


@pytest.mark.parametrize("norms_first", [True, False])
def test_where_an_opt_flattens_positions(norms_first: bool, bridge):
    """A bridge turns values into rows at the norms of an OPT, except where they end a branch.

    A hook point has the conversion as its attribute `hook_conversion`.
    """
    require("transformer_lens", bridge.blocks[0].ln2.hook_out, "hook_conversion")
    require("transformer_lens", bridge.blocks[0].hook_mlp_in, "hook_conversion")
    before_norm = SimpleNamespace(hook_conversion="to rows")
    after_norm = SimpleNamespace(hook_conversion="to rows")
    before_mlp = SimpleNamespace(hook_conversion="to rows")
    norm = SimpleNamespace(hook_in=before_norm, hook_out=after_norm)
    block = SimpleNamespace(ln2=norm, hook_mlp_in=before_mlp)
    config = SimpleNamespace(do_layer_norm_before=norms_first)
    opt = SimpleNamespace(original_model=SimpleNamespace(config=config), blocks=[block])
    compat.keep_rows_at_last_norms(opt)
    expected = "to rows" if norms_first else None
    for point in (before_norm, after_norm, before_mlp):
        assert point.hook_conversion == expected


def source_of_bridges(bridge: nn.Module) -> str:
    """The source of the package in which transformer-lens defines the class of a bridge."""
    folder = Path(inspect.getfile(type(bridge))).parent
    return "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))


def test_processed_weights_of_a_bridge(bridge):
    """A bridge tells whether its weights are processed, and where an MLP keeps them."""
    require("transformer-lens", bridge, "_weights_processed")
    assert not compat.is_processed(bridge)
    processed = models.MAKERS["TransformerBridge"](models.hf_model("llama", dtype=torch.float32))
    processed.enable_compatibility_mode(disable_warnings=True)
    assert compat.is_processed(processed)
    # Bridges set these attributes when they need them, so their source is asked for the names.
    source = source_of_bridges(bridge)
    for name in ("_use_processed_weights", "_processed_W_"):
        assert name in source, f"transformer-lens {version('transformer-lens')} has no {name}"
    weight = torch.zeros(1)
    mlp = processed.blocks[0].mlp
    vars(mlp)["_processed_W_gate"] = weight
    assert compat.processed_tensors(mlp)["_processed_W_gate"] is weight
    assert compat.processed_weight(mlp, "gate") is weight


def test_norms_per_head_of_a_bridge(bridge):
    """Copies of the residual are left as they are if the bridge has recorded no residual."""
    attention = bridge.blocks[0].attn
    if not compat.can_norm_per_head(attention):
        pytest.skip("this transformer-lens does not fork the residual by head, and is refused")
    require("transformer-lens", attention, "_captured_pre_ln_residual", "_apply_ln1_per_head")
    generator = torch.Generator().manual_seed(0)
    # [row, pos, head, d]
    copies = torch.randn(1, 2, 4, 16, generator=generator)
    assert torch.equal(compat.normed_per_head(attention, copies), copies)


@pytest.mark.parametrize("cls", models.MAKERS)
def test_tokens_in_a_cache(cls: str):
    """A cache tells how many tokens it holds, and one of transformer-lens has their mask."""
    lens = cases.case("llama", cls, "raw").lens
    cache = None
    for count in (3, 4):
        _, cache = lens.plan.host.run_cached(models.tokens(2, count), cache)
    assert compat.cached_tokens(cache) == 7
    assert compat.cached_tokens(None) == 0
    mask = compat.cached_mask(cache)
    # A bridge has a cache of transformers, in which there is no mask.
    if cls == "TransformerBridge":
        assert mask is None
    else:
        assert mask.tolist() == [[1] * 7, [1] * 7]
    assert compat.cached_mask(None) is None
    with pytest.raises(ModelStateError, match="a cache of the class object does not say"):
        compat.cached_tokens(object())


# --- Models of transformers


def test_the_kernel_of_attention(llama):
    require("transformers", llama.config, "_attn_implementation")
    assert compat.attention_of(llama) == "eager"


def test_facts_of_transformers(llama):
    require("transformers", llama, "_supports_sdpa")
    require("transformers", llama.config, "_attn_implementation")
    assert compat.supports_sdpa(llama)
    assert compat.fields_of(llama.config)["_attn_implementation"] == "eager"
    assert compat.fields_of(llama.config)["hidden_size"] == llama.config.hidden_size


@models.NEEDS_NEWEST
def test_experts_of_transformers():
    """A stack of experts tells its gate, its kernel, and whether processes share it."""
    base = architectures.hf_model("Qwen3-MoE", dtype=torch.float32)
    experts = base.model.layers[0].mlp.experts
    require("transformers", experts, "_apply_gate", "_is_expert_parallel", *_FLAGS)
    require("transformers", base.config, "_experts_implementation")
    hidden = torch.randn(3, 24)
    gate, up = hidden.chunk(2, -1)
    assert torch.equal(compat.gated(experts, hidden), experts.act_fn(gate) * up)
    assert compat.experts_implementation(experts) == "eager"
    assert not compat.is_split_over_processes(experts)
    experts._is_expert_parallel = True
    assert compat.is_split_over_processes(experts)


# The number of positions up to which a rotary table is the original one.
CONTEXT = 8


def rotary_embedding(kind: str) -> nn.Module:
    """The rotary embedding of a Llama with this kind of scaling beyond CONTEXT positions."""
    scaling: dict[str, object] = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        scaling["short_factor"] = [1.0, 1.1]
        scaling["long_factor"] = [2.0, 3.0]
    sizes = {
        **models._ROTARY,
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": CONTEXT,
    }
    if models.major_version("transformers") < 5:
        config = transformers.LlamaConfig(**sizes, rope_scaling=scaling)
    else:
        scaling["original_max_position_embeddings"] = CONTEXT
        scaling["rope_theta"] = 10_000.0
        config = transformers.LlamaConfig(**sizes, rope_parameters=scaling)
    return transformers.LlamaForCausalLM(config).model.rotary_emb


def cosines(rotary: nn.Module, length: int) -> torch.Tensor:
    """The cosines of the first CONTEXT positions, as a pass over `length` positions has them."""
    positions = torch.arange(length)[None]
    table, _ = rotary(torch.zeros(1), positions)
    return table[0, :CONTEXT].clone()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_depend_on_the_length_as_their_rule_says(kind: str):
    """Two lengths have the same table exactly if `table` and `alike_up_to` say so."""
    rotary = rotary_embedding(kind)
    [rule] = compat.rotary_rules(rotary)
    assert rule.is_dynamic == (kind == "dynamic")
    assert rule.limit == CONTEXT
    # The positions that all of the passes have.
    shared = CONTEXT - 1
    for shorter in (CONTEXT - 1, CONTEXT, CONTEXT + 1):
        longer = shorter + 1
        rule.make_anew(rotary)
        table_of_shorter = cosines(rotary, shorter)[:shared]
        rule.make_anew(rotary)
        table_of_longer = cosines(rotary, longer)[:shared]
        is_same = torch.equal(table_of_shorter, table_of_longer)
        assert is_same == (rule.table(shorter) == rule.table(longer))
        assert is_same == (rule.alike_up_to(shorter) >= longer)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_are_restored(kind: str):
    """A long pass changes the table; afterwards it can be put back as it was before."""
    rotary = rotary_embedding(kind)
    restore = compat.rotary_state(rotary)
    frequencies = rotary.inv_freq.clone()
    short = cosines(rotary, CONTEXT)
    cosines(rotary, CONTEXT + 2)
    assert not torch.equal(rotary.inv_freq, frequencies)
    restore()
    assert torch.equal(rotary.inv_freq, frequencies)
    assert torch.equal(cosines(rotary, CONTEXT), short)


def test_another_module_has_no_rotary_rule():
    assert compat.rotary_rules(nn.Linear(1, 1)) == []


def test_bloom_gelu():
    """In the block it has a forward derivative, and its value is the same."""
    bloom = import_module("transformers.models.bloom.modeling_bloom")
    require("transformers", bloom, "BloomGelu", "bloom_gelu_forward")
    gelu = bloom.BloomGelu()
    x = torch.linspace(-2, 2, 5)
    before = bloom.BloomGelu.forward
    expected = gelu(x)
    with Temporary(compat.plain_bloom_gelu), fwad.dual_level():
        with_tangent = fwad.make_dual(x, torch.ones_like(x))
        dual = fwad.unpack_dual(gelu(with_tangent))
    assert torch.equal(dual.primal, expected)
    assert dual.tangent is not None
    assert bloom.BloomGelu.forward is before


def test_what_a_bridge_of_codegen_looks_for():
    """Each attention has a table of positions and √d_head, here √4, whatever transformers keeps."""
    config = transformers.CodeGenConfig(n_embd=16, n_layer=1, n_head=4, rotary_dim=2, vocab_size=9)
    model = transformers.CodeGenForCausalLM(config)
    bridge_of_codegen = SimpleNamespace(original_model=model)
    compat.complete_codegen(bridge_of_codegen)
    attention = model.transformer.h[0].attn
    assert attention.embed_positions.shape == (config.n_positions, 2)
    assert float(attention.scale_attn) == 2.0


def test_what_transformers_leaves_on_a_model_is_nobody_s_hook(llama):
    """transformers 5 leaves hooks on a model that was asked for its hidden states."""
    llama(models.tokens(), output_hidden_states=True)
    hooks: list[object] = []
    for module in llama.modules():
        hooks += compat.hooks_of(module).forward.values()
    if models.major_version("transformers") >= 5:
        assert hooks, f"transformers {version('transformers')} captures outputs otherwise"
    assert [hook for hook in hooks if compat.hook_function(hook) is not None] == []


def test_added_tokens():
    """Only some tokenizers have these settings under a private name, so none is required."""
    tokenizer = SimpleNamespace(_add_bos_token=True)
    assert compat.added_tokens(tokenizer) == {"_add_bos_token": True, "_add_eos_token": None}


# --- Other libraries


def test_bar_of_the_gguf_reader(capsys):
    """transformers reads GGUF files with a bar of tqdm, which is not shown in the block."""
    pytest.importorskip("gguf")
    reader = import_module("transformers.modeling_gguf_pytorch_utils")
    source = inspect.getsource(reader)
    assert "tqdm(" in source, (
        f"transformers {version('transformers')} shows no bar of tqdm when it reads GGUF files"
    )
    with compat.without_gguf_bar():
        list(reader.tqdm(range(3)))
    assert capsys.readouterr().err == ""


def test_open_bars_of_tqdm(capsys):
    """A bar is open until it is closed; a bar that is not shown never is."""
    from tqdm import tqdm

    bar = tqdm(range(3))
    hidden = tqdm(range(3), disable=True)
    assert bar in compat.open_bars()
    assert hidden not in compat.open_bars()
    bar.close()
    assert bar not in compat.open_bars()
    assert capsys.readouterr().err


def test_packing_of_bitsandbytes():
    """A bitsandbytes that packs weights for a CPU has the function that unpacks them."""
    functional = pytest.importorskip("bitsandbytes").functional
    if "packing_format_for_cpu" not in inspect.getsource(functional):
        pytest.skip("this bitsandbytes packs no weight for a CPU")
    require("bitsandbytes", functional, "_convert_weight_packed_for_cpu_inverse")


def test_targets_of_peft():
    """PEFT adapts the modules of these names, in these layers alone."""
    require("peft", import_module("peft.tuners.tuners_utils"), "check_target_module_exists")
    config = SimpleNamespace(
        target_modules=["q_proj"], exclude_modules=[], layers_to_transform=[1], layers_pattern=[]
    )
    paths = ["model.layers.1.q_proj", "model.layers.0.q_proj", "model.layers.1.k_proj"]
    assert [compat.peft_adapts(config, path) for path in paths] == [True, False, False]


def test_quantiser_of_ggml():
    """ggml's library quantises a matrix to the same bytes as the gguf package does."""
    package = pytest.importorskip("llama_cpp_py_sync")
    gguf = pytest.importorskip("gguf")
    file = compat.ggml_library()
    assert file is not None, f"no library of ggml beside {package.__file__}"
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 64, generator=generator).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    # A row is two blocks of 32 numbers, and a block of Q8_0 takes 34 bytes.
    bytes_of_row = 2 * 34
    data = compat.quantised_by_ggml(values, int(kind), bytes_of_row)
    assert (data == gguf.quants.quantize(values, kind)).all()


# --- No private name of another library outside of compat


# Names with an underscore that Python documents: of named tuples, and `os._exit`.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}
# Names without an underscore that their library exports nowhere.
NOT_EXPORTED = {"check_target_module_exists", "BloomGelu", "modeling_gguf_pytorch_utils"}
# Functions that take the name of an attribute as their second argument.
FUNCTIONS_OF_NAMES = ("getattr", "hasattr", "setattr", "delattr")

FOLDER_OF_COMPAT = PACKAGE / "compat"
# The files of the package outside of compat, by their paths.
SOURCES = {
    str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
    if FOLDER_OF_COMPAT not in path.parents
}
# All files of compat as one syntax tree.
COMPAT = ast.Module(body=[], type_ignores=[])
for _path in sorted(FOLDER_OF_COMPAT.rglob("*.py")):
    COMPAT.body += ast.parse(_path.read_text(encoding="utf-8")).body


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore."""
    return bool(re.match(r"_[A-Za-z]", name))


def strings_in(tree: ast.AST) -> Iterator[str]:
    """Yield every string of a tree, also the constant parts of f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a file gives to things of its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_of_its_own = ast.unparse(node.value) in ("self", "cls")
            if is_of_its_own:
                names.add(node.attr)
    return {name for name in names if is_private(name)}


@functools.cache
def names_of_the_package() -> set[str]:
    """Private names that the package defines outside of compat, and those that are documented."""
    names = set(DOCUMENTED)
    for source in SOURCES.values():
        names |= defined_in(ast.parse(source))
    return names


@functools.cache
def names_of_compat() -> set[str]:
    """Private names of other libraries that compat touches, as attributes or in strings."""
    attributes = {node.attr for node in ast.walk(COMPAT) if isinstance(node, ast.Attribute)}
    in_strings = {text for text in strings_in(COMPAT) if re.fullmatch(r"_[a-z]\w+", text)}
    private = {name for name in attributes | in_strings if is_private(name)}
    return private - defined_in(COMPAT) - names_of_the_package()


def is_foreign(name: str) -> bool:
    """Whether a private name is none of the package's own."""
    return is_private(name) and name not in names_of_the_package()


def paths_imported(node: ast.AST) -> Iterator[list[str]]:
    """Yield what an import names, each as the parts of its dotted path."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name.split(".")
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        for alias in node.names:
            yield [*module.split("."), alias.name]


def names_passed(node: ast.AST, functions: Collection[str]) -> Iterator[str]:
    """Yield the strings in the second argument, if this is a call of one of these functions."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) in functions:
        for argument in node.args[1:2]:
            yield from strings_in(argument)


def imported_names(node: ast.AST) -> Iterator[str]:
    """Yield private names that are imported, and `mock`, which replaces names of others."""
    for path in paths_imported(node):
        if path[0] in ("lens_lora", "__future__"):
            continue
        for name in path:
            if is_private(name) or name in NOT_EXPORTED or name == "mock":
                yield name


def touched_attributes(node: ast.AST) -> Iterator[str]:
    """Yield private names that are read or set as attributes: `module._forward_hooks`."""
    if not isinstance(node, ast.Attribute):
        return
    if is_foreign(node.attr) or node.attr in NOT_EXPORTED:
        yield node.attr


def quoted_names(node: ast.AST) -> Iterator[str]:
    """Yield private names that stand in strings.

    A string is such a name if it goes to a function such as `getattr`, or if compat touches it.
    """
    if isinstance(node, ast.Constant) and node.value in names_of_compat():
        yield node.value
    for text in names_passed(node, FUNCTIONS_OF_NAMES):
        if is_foreign(text):
            yield text


def replaced_forward(node: ast.AST) -> Iterator[str]:
    """Yield the places where a module is given another forward, or its own one is looked up."""
    is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    if is_set and node.attr == "forward":
        yield "forward ="
    if isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "'forward'":
        yield "['forward']"
    if "forward" in names_passed(node, ("setattr",)):
        yield "setattr forward"


def foreign(source: str) -> set[str]:
    """Private names of other libraries that a file imports, touches, quotes or replaces."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        found.update(imported_names(node))
        found.update(touched_attributes(node))
        found.update(quoted_names(node))
        found.update(replaced_forward(node))
    return found


@pytest.mark.slow
def test_no_private_name_elsewhere():
    found = {name: foreign(source) for name, source in SOURCES.items()}
    assert {name: private for name, private in found.items() if private} == {}


# A line that touches a private name of another library, and what is found in it.
PLANTED = {
    "import torch._C._functorch": "_C",
    "from torch._C import _is_fwd_grad_enabled": "_is_fwd_grad_enabled",
    "def f():\n    from peft.tuners.tuners_utils import check_target_module_exists": (
        "check_target_module_exists"
    ),
    "from unittest import mock": "mock",
    "module._forward_hooks": "_forward_hooks",
    "torch._C.anything": "_C",
    "getattr(mlp, '_use_processed_weights', False)": "_use_processed_weights",
    "getattr(mlp, f'_processed_W_{name}')": "_processed_W_",
    "hasattr(module, '_hf_hook')": "_hf_hook",
    "vars(module).get('_hf_hook')": "_hf_hook",
    "bloom.BloomGelu.forward = plain": "BloomGelu",
    "block.forward = twice": "forward =",
    "setattr(block, 'forward', twice)": "setattr forward",
    "vars(block)['forward'] = twice": "['forward']",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_name_is_seen(source: str):
    """Negative control, in each form."""
    assert PLANTED[source] in foreign(source)


def test_what_is_ours_is_not_seen():
    source = "from lens_lora._version import versions\nself._plan._replace()\nx.__dict__"
    assert foreign(source) == set()


def test_compat_imports_nothing_of_ours_but_errors_and_spans():
    modules: set[str] = set()
    for node in ast.walk(COMPAT):
        for path in paths_imported(node):
            modules.add(".".join(path[:2]))
    of_the_package = {name for name in modules if name.split(".")[0] == "lens_lora"}
    assert of_the_package == {"lens_lora.compat", "lens_lora.errors", "lens_lora.spans"}


def test_compat_knows_what_it_touches():
    """The list of names that the check goes by is read from compat itself, and is not empty."""
    for name in ("_forward_hooks", "_hf_hook", "_version", "_use_processed_weights"):
        assert name in names_of_compat()
    assert sys.modules["lens_lora.compat"] is compat
