"""Private names of other libraries: each is still there, does what compat says, and stays there.

A test of a name fails on the day when it is gone, and says so; the last part reads the package's
syntax trees, and finds a private name that is touched anywhere else.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
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
    """Fail where one of them is gone."""
    gone = [name for name in names if not hasattr(owner, name)]
    where = getattr(owner, "__name__", type(owner).__name__)
    assert not gone, f"{library} {version(library)} has no {gone} in {where}: see lens_lora/compat"


@pytest.fixture(scope="module")
def llama():
    return models.hf_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def bridge(llama):
    if "TransformerBridge" not in models.MAKERS:
        pytest.skip("this transformer-lens has no TransformerBridge")
    return models.MAKERS["TransformerBridge"](llama)


def test_what_is_not_to_be_read_is_there_again_afterwards():
    """Of one module alone, also in spans within one another; it computes as before."""
    module = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    kind = type(module)
    before = module(torch.ones(2))

    def refused(span: Temporary) -> None:
        compat.refuse_reading(span, module, ["in_features"], lambda: ValueError("the base's"))

    with Temporary(refused), Temporary(refused):
        with pytest.raises(ValueError, match="the base's"):
            _ = module.in_features
        assert other.in_features == 2
        assert isinstance(module, kind)
        assert torch.equal(module(torch.ones(2)), before)
    assert type(module) is kind
    assert module.in_features == 2


@pytest.mark.parametrize("first", [0, 1])
def test_spans_that_refuse_a_reading_end_in_any_order(first: int):
    """What one of two no longer refuses is read again, and the other still refuses its own."""
    module = nn.Linear(2, 3)
    names = ("in_features", "out_features")
    spans: list[Temporary] = []
    for name in names:

        def refused(span: Temporary, name: str = name) -> None:
            compat.refuse_reading(span, module, [name], lambda: ValueError(name))

        spans.append(Temporary(refused))
        spans[-1].__enter__()
    spans[first].close()
    assert getattr(module, names[first]) == (2, 3)[first]
    with pytest.raises(ValueError, match=names[1 - first]):
        getattr(module, names[1 - first])
    spans[1 - first].close()
    assert type(module) is nn.Linear
    assert (module.in_features, module.out_features) == (2, 3)


@models.NEEDS_NEWEST
def test_experts_of_transformers():
    """What a stack of experts states about itself, and the kernel and gate that it is given."""
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


def test_compiled_models():
    """The wrapper of torch.compile, and the code that a module compiled in place has."""
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


def test_classes_of_weights_that_processes_share():
    """They are asked for by name: torch still calls them so."""
    fsdp = import_module("torch.distributed.fsdp")
    tensors = import_module("torch.distributed.tensor")
    require("torch", fsdp, "FSDPModule")
    require("torch", tensors, "DTensor")
    module = type("Gathered", (fsdp.FSDPModule, nn.Linear), {})
    assert compat.gathers_weights(object.__new__(module))
    assert not compat.gathers_weights(nn.Linear(1, 1))
    assert not compat.is_sharded(nn.Linear(1, 1).weight)


def test_the_kernel_of_attention(llama):
    require("transformers", llama.config, "_attn_implementation")
    assert compat.attention_of(llama) == "eager"


def test_a_component_without_a_module(bridge):
    """As a bridge has in place of a module that its model does without."""
    assert not compat.wraps_nothing(bridge.ln_final)
    assert not compat.wraps_nothing(None)
    assert compat.wraps_nothing(type(bridge.ln_final)("ln_final", bridge.cfg))


def test_where_an_opt_flattens_positions(bridge):
    """What converts there is an attribute of the hook point, under a name of its own."""
    points = [SimpleNamespace(hook_conversion="to rows") for _ in range(3)]
    require("transformer_lens", bridge.blocks[0].ln2.hook_out, "hook_conversion")
    require("transformer_lens", bridge.blocks[0].hook_mlp_in, "hook_conversion")
    norm = SimpleNamespace(hook_in=points[0], hook_out=points[1])
    blocks = [SimpleNamespace(ln2=norm, hook_mlp_in=points[2])]
    for is_before, expected in ((True, "to rows"), (False, None)):
        config = SimpleNamespace(do_layer_norm_before=is_before)
        original = SimpleNamespace(config=config)
        compat.keep_rows_at_last_norms(SimpleNamespace(original_model=original, blocks=blocks))
        assert [point.hook_conversion for point in points] == [expected] * 3


def test_what_a_bridge_of_codegen_looks_for():
    config = transformers.CodeGenConfig(n_embd=16, n_layer=1, n_head=4, rotary_dim=2, vocab_size=9)
    model = transformers.CodeGenForCausalLM(config)
    compat.complete_codegen(SimpleNamespace(original_model=model))
    attention = model.transformer.h[0].attn
    assert attention.embed_positions.shape == (config.n_positions, 2)
    assert float(attention.scale_attn) == 2.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_tables_of_transformers(kind: str):
    """A table depends on the number of positions as its rule says, and is as made afterwards."""
    factors = {"short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
    rope = {"rope_type": kind, "factor": 4.0, **(factors if kind == "longrope" else {})}
    sizes = {**models._ROTARY, "max_position_embeddings": 8, "original_max_position_embeddings": 8}
    if version("transformers") < "5":
        config = transformers.LlamaConfig(**sizes, rope_scaling=rope)
    else:
        rope |= {"original_max_position_embeddings": 8, "rope_theta": 10_000.0}
        config = transformers.LlamaConfig(**sizes, rope_parameters=rope)
    rotary = transformers.LlamaForCausalLM(config).model.rotary_emb
    [rule] = compat.rotary_rules(rotary)
    assert (rule.is_dynamic, rule.limit) == (kind == "dynamic", 8)
    back = compat.rotary_state(rotary)

    def table(length: int) -> torch.Tensor:
        cosines, _ = rotary(torch.zeros(1), torch.arange(length)[None])
        return cosines[0, :8].clone()

    short = table(8)
    for one, other in ((7, 8), (8, 9), (9, 10)):
        rule.make_anew(rotary)
        first = table(one)
        rule.make_anew(rotary)
        is_same = torch.equal(first[:7], table(other)[:7])
        assert is_same == (rule.table(one) == rule.table(other))
        assert is_same == (rule.alike_up_to(one) >= other)
    back()
    assert torch.equal(table(8), short)
    assert compat.rotary_rules(nn.Linear(1, 1)) == []


def test_hooks_of_a_module():
    module = nn.Linear(2, 2)
    require(
        "torch",
        module,
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        "_forward_pre_hooks_with_kwargs",
    )
    handles = [
        module.register_forward_hook(lambda *args: None),
        module.register_forward_pre_hook(lambda *args: None, with_kwargs=True),
        module.register_full_backward_hook(lambda *args: None),
        module.register_full_backward_pre_hook(lambda *args: None),
    ]
    hooks = compat.hooks_of(module)
    assert [list(one) for one in hooks[:4]] == [[handle.id] for handle in handles]
    assert hooks.takes_kwargs == {handles[1].id: True}
    order: list[int] = []
    module.register_forward_hook(lambda *args: order.append(2))
    last = module.register_forward_hook(lambda *args: order.append(1))
    hooks.forward.move_to_end(last.id, last=False)
    module(torch.zeros(1, 2))
    assert order == [1, 2], f"torch {version('torch')} runs hooks in another order than it lists"


def test_hooks_of_a_span_come_off_with_it():
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
    module = nn.Linear(2, 2)
    module.register_full_backward_hook(lambda *_: None)
    assert compat.has_hooks(module)


def test_operands_of_torch_s_products():
    """Of each function that multiplies rows by a matrix, x, W and b of xW + b."""
    x = torch.randn(3, 2)
    weight = torch.randn(2, 4)
    bias = torch.randn(4)
    expected = x @ weight + bias
    calls = {torch.addmm: (bias, x, weight), nn.functional.linear: (x, weight.T, bias)}
    for func, args in calls.items():
        found = compat.rows_and_weight(func, args, {})
        assert found is not None
        torch.testing.assert_close(found[0] @ found[1] + found[2], expected)
    for func in compat.MATMULS:
        found = compat.rows_and_weight(func, (x, weight), {})
        assert found is not None
        assert torch.equal(found[0] @ found[1], x @ weight)
        assert compat.rows_and_weight(func, (x, torch.zeros(5, 2, 4)), {}) is None


def test_dictionaries_of_a_module():
    module = nn.Sequential(nn.Linear(2, 2))
    require("torch", module, "_parameters", "_modules")
    assert compat.children_of(module)["0"] is module[0]
    assert compat.parameters_in(module[0])["weight"] is module[0].weight


def test_replaced_forward():
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
    """The setting is known also where the public question about it raises an error."""
    before = compat.float32_products()
    torch.set_float32_matmul_precision("medium")
    try:
        assert compat.float32_products() != before
    finally:
        torch.set_float32_matmul_precision("highest")
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        return
    then = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert "bf16" in compat.float32_products()
    finally:
        matmul.fp32_precision = then
        torch.set_float32_matmul_precision("highest")


def test_torch_s_own_precision_set_by_name_is_no_other_one():
    """Nothing is rounded otherwise once 'highest' is set, which is what holds unset."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no setting of a single backend")
    torch.set_float32_matmul_precision("highest")
    by_name = compat.float32_products()
    matmul.fp32_precision = "none"
    try:
        assert compat.float32_products() == by_name
    finally:
        torch.set_float32_matmul_precision("highest")


def test_edits_of_a_tensor():
    tensor = torch.zeros(2)
    require("torch", tensor, "_version")
    before = compat.edits_of(tensor)
    tensor.add_(1)
    assert compat.edits_of(tensor) == before + 1


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_within_a_transform(transform: str):
    seen: list[tuple[bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((compat.is_within_transform(), compat.is_wrapped(x)))
        return x.sum()

    functions = import_module("torch._C._functorch")
    require("torch", functions, "get_interpreter_stack", "is_functorch_wrapped_tensor")
    x = torch.ones(2)
    along = (x,) if transform == "jvp" else x
    args = (look, along, along) if transform == "jvp" else (look,)
    result = getattr(torch.func, transform)(*args)
    _ = result if transform == "jvp" else result(x)
    assert seen == [(True, True)]
    look(x)
    assert seen[1] == (False, False)


def test_forward_mode_is_allowed():
    require("torch", torch._C, "_is_fwd_grad_enabled", "_set_fwd_grad_enabled")
    with fwad._set_fwd_grad_enabled(False):
        with Temporary(compat.allow_forward_mode), fwad.dual_level():
            product = 2 * fwad.make_dual(torch.ones(()), torch.ones(()))
            assert fwad.unpack_dual(product).tangent is not None
        assert not torch._C._is_fwd_grad_enabled()


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_is_left_alone():
    """Also where the way back runs before the mode was entered, as after an interrupt."""
    require("torch", torch._C, "_len_torch_function_stack")
    require("torch", torch.overrides, "_pop_mode")
    with Counting() as outer:
        with Temporary(lambda span: compat.enter_mode(span, Counting())):
            assert torch._C._len_torch_function_stack() == 2
        assert torch._C._len_torch_function_stack() == 1
        torch.ones(2).add(1)
        assert outer.calls


def test_attention_kernels():
    require("torch", torch.nn.attention, "_cur_sdpa_kernel_backends", "_sdpa_kernel")
    before = compat.attention_kernels()
    with Temporary(lambda span: compat.use_attention_kernels(span, [SDPBackend.MATH])):
        assert compat.attention_kernels() == [SDPBackend.MATH]
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert compat.attention_kernels() == before


def test_an_offloaded_module():
    accelerate = pytest.importorskip("accelerate")
    plain = nn.Linear(2, 2)
    model = nn.Sequential(nn.Linear(2, 2))
    away = model[0]
    weight = model[0].weight.detach().clone()
    accelerate.cpu_offload(model, execution_device="cpu")
    require("accelerate", away, "_hf_hook", "_old_forward")
    require("accelerate", away._hf_hook, "offload", "execution_device", "weights_map")
    assert [compat.is_offloaded(module) for module in (plain, away)] == [False, True]
    assert compat.computing_attribute(plain) == "forward"
    assert compat.computing_attribute(away) == "_old_forward"
    assert compat.home_of(model) == torch.device("cpu")
    assert away.weight.is_meta
    with compat.brought_in(away):
        assert torch.equal(away.weight, weight)
    compat.refuse_out_of_reach({away: "0"})

    class Next(compat.SharedForward):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with Temporary(lambda span: Next.until(span, away, object(), "_old_forward")):
        assert away(torch.zeros(1)).item() == 1
    assert not isinstance(vars(away)["_old_forward"], Next)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_a_function_within_a_hook_of_transformer_lens(direction: str):
    from transformer_lens.hook_points import HookPoint

    point = HookPoint()

    def mine(tensor: object, hook: object) -> None:
        pass

    point.add_hook(mine, dir=direction)
    hooks = compat.hooks_of(point)
    (registered,) = (hooks.forward if direction == "fwd" else hooks.backward).values()
    assert registered is not mine
    assert compat.hook_function(registered) is mine, (
        f"transformer-lens {version('transformer-lens')} wraps hooks otherwise"
    )
    assert compat.calls(registered, mine) or direction == "bwd"
    assert not compat.calls(registered, print)
    assert compat.hook_function(print) is print


@models.NEEDS_NEWEST
def test_what_a_bridge_wires_itself_is_nobody_s_hook():
    """XGLM's MLP has no module of its own, so its points hang on those of the block."""
    import architectures

    from lens_lora.runs.fingerprint import settings

    bridge = models.bridge(architectures.hf_model("XGLM", dtype=torch.float32))
    wired = [m for m in bridge.modules() if any(map(len, compat.hooks_of(m)[:2]))]
    assert wired
    assert settings(bridge)["hooks"] == []
    bridge.blocks[0].hook_in.add_hook(lambda tensor, hook: None)
    assert len(settings(bridge)["hooks"]) == 1


def test_what_transformers_leaves_on_a_model_is_nobody_s_hook(llama):
    llama(models.tokens(), output_hidden_states=True)
    hooks = [hook for m in llama.modules() for hook in compat.hooks_of(m).forward.values()]
    if version("transformers") >= "5":
        assert hooks, f"transformers {version('transformers')} captures outputs otherwise"
    assert all(compat.hook_function(hook) is None for hook in hooks)


@models.NEEDS_NEWEST
def test_the_scale_at_an_embedding_s_hook_point():
    import architectures

    bridge = models.bridge(architectures.hf_model("Granite", dtype=torch.float32))
    require("transformer-lens", bridge.embed, "_output_contribution_scale")
    assert compat.scale_at_hook_out(bridge.embed) == 2.0
    _, cache = bridge.run_with_cache(models.tokens())
    own = bridge.embed.original_component(models.tokens())
    assert torch.equal(cache["embed.hook_out"], 2 * own)
    assert compat.scale_at_hook_out(bridge.blocks[0].attn.q) == 1.0


def test_processed_weights_of_a_bridge(bridge, llama):
    require("transformer-lens", bridge, "_weights_processed")
    assert not compat.is_processed(bridge)
    processed = models.MAKERS["TransformerBridge"](models.hf_model("llama", dtype=torch.float32))
    processed.enable_compatibility_mode(disable_warnings=True)
    assert compat.is_processed(processed)
    mlp = processed.blocks[0].mlp
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(inspect.getfile(type(bridge))).parent.rglob("*.py")
    )
    for name in ("_use_processed_weights", "_processed_W_"):
        assert name in source, f"transformer-lens {version('transformer-lens')} has no {name}"
    mlp.__dict__["_processed_W_gate"] = weight = torch.zeros(1)
    assert compat.processed_tensors(mlp)["_processed_W_gate"] is weight
    assert compat.processed_weight(mlp, "gate") is weight


def test_norms_per_head_of_a_bridge(bridge):
    attention = bridge.blocks[0].attn
    if not compat.can_norm_per_head(attention):
        pytest.skip("this transformer-lens does not fork the residual by head, and is refused")
    require("transformer-lens", attention, "_captured_pre_ln_residual", "_apply_ln1_per_head")
    copies = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compat.normed_per_head(attention, copies), copies)


def test_facts_of_transformers(llama):
    require("transformers", llama, "_supports_sdpa")
    require("transformers", llama.config, "_attn_implementation")
    assert compat.supports_sdpa(llama)
    assert compat.fields_of(llama.config)["_attn_implementation"] == "eager"
    assert compat.fields_of(llama.config)["hidden_size"] == llama.config.hidden_size


def test_added_tokens():
    """Only some tokenizers have them under a private name, so none is required."""
    tokenizer = SimpleNamespace(_add_bos_token=True)
    assert compat.added_tokens(tokenizer) == {"_add_bos_token": True, "_add_eos_token": None}


def test_bloom_gelu():
    bloom = import_module("transformers.models.bloom.modeling_bloom")
    require("transformers", bloom, "BloomGelu", "bloom_gelu_forward")
    gelu = bloom.BloomGelu()
    x = torch.linspace(-2, 2, 5)
    before = bloom.BloomGelu.forward
    expected = gelu(x)
    with Temporary(compat.plain_bloom_gelu), fwad.dual_level():
        dual = fwad.unpack_dual(gelu(fwad.make_dual(x, torch.ones_like(x))))
    assert torch.equal(dual.primal, expected)
    assert dual.tangent is not None
    assert bloom.BloomGelu.forward is before


def test_bar_of_the_gguf_reader(capsys):
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
    from tqdm import tqdm

    bar = tqdm(range(3))
    hidden = tqdm(range(3), disable=True)
    assert bar in compat.open_bars()
    assert hidden not in compat.open_bars()
    bar.close()
    assert bar not in compat.open_bars()
    assert capsys.readouterr().err


def test_packing_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    if "packing_format_for_cpu" not in inspect.getsource(functional):
        pytest.skip("this bitsandbytes packs no weight for a CPU")
    require("bitsandbytes", functional, "_convert_weight_packed_for_cpu_inverse")


def test_targets_of_peft():
    require("peft", import_module("peft.tuners.tuners_utils"), "check_target_module_exists")
    config = SimpleNamespace(
        target_modules=["q_proj"], exclude_modules=[], layers_to_transform=[1], layers_pattern=[]
    )
    paths = ["model.layers.1.q_proj", "model.layers.0.q_proj", "model.layers.1.k_proj"]
    assert [compat.peft_adapts(config, path) for path in paths] == [True, False, False]


def test_quantiser_of_ggml():
    """Q8_0 of ggml is that of the gguf package; without the library there are no data."""
    package = pytest.importorskip("llama_cpp_py_sync")
    gguf = pytest.importorskip("gguf")
    file = compat.ggml_library()
    assert file is not None, f"no library of ggml beside {package.__file__}"
    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    data = compat.quantised_by_ggml(values, int(kind), 2 * 34)
    assert (data == gguf.quants.quantize(values, kind)).all()


# --- No private name of another library outside compat/


# Documented by Python: of named tuples, and `os._exit`.
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}
# Without an underscore, and exported nowhere.
NOT_EXPORTED = {"check_target_module_exists", "BloomGelu", "modeling_gguf_pytorch_utils"}
STRINGS = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name: str) -> bool:
    return bool(re.match(r"_[A-Za-z]", name))


def defined_in(tree: ast.AST) -> set[str]:
    """Private names that a file gives to things of its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return {name for name in names if is_private(name)}


def touched_by_compat(tree: ast.AST) -> set[str]:
    """The private attributes that compat touches, in any form."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {s for s in strings_in(tree) if re.fullmatch(r"_[a-z]\w+", s)}
    return {name for name in names if is_private(name)} - defined_in(tree)


def strings_in(tree: ast.AST) -> list[str]:
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node.value for node in nodes if isinstance(node.value, str)]


def foreign(source: str, ours: set[str], known: set[str]) -> list[str]:
    """Private names of other libraries that a file imports or touches, as a tree can tell.

    Args:
        source: the file's.
        ours: private names that the package defines.
        known: private names that compat touches, refused also as a plain string.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [*module.split("."), *(p for a in node.names for p in a.name.split("."))]
            if names[0] not in ("lens_lora", "__future__"):
                found += [name for name in names if is_private(name) or name in NOT_EXPORTED]
                found += [name for name in names if name == "mock"]
        elif isinstance(node, ast.Attribute):
            if node.attr in NOT_EXPORTED or (is_private(node.attr) and node.attr not in ours):
                found.append(node.attr)
            if isinstance(node.ctx, ast.Store) and node.attr == "forward":
                found.append("forward =")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in STRINGS:
            texts = [text for arg in node.args[1:2] for text in strings_in(arg)]
            found += [text for text in texts if is_private(text) and text not in ours]
            found += [t for t in texts if t == "forward" and node.func.id == "setattr"]
        elif isinstance(node, ast.Constant) and node.value in known:
            found.append(node.value)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.slice) == "'forward'":
            found.append("['forward']")
    return found


def _without_future(source: str) -> str:
    """A file's source that may stand behind another's."""
    return source.replace("from __future__ import annotations", "")


SOURCES = {
    str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}
_OF_COMPAT = [name for name in SOURCES if name.startswith("compat/")]
COMPAT = ast.parse("\n".join(_without_future(SOURCES.pop(name)) for name in _OF_COMPAT))


@functools.cache
def ours() -> set[str]:
    return DOCUMENTED.union(*(defined_in(ast.parse(source)) for source in SOURCES.values()))


@functools.cache
def known() -> set[str]:
    return touched_by_compat(COMPAT) - ours()


@pytest.mark.parametrize("cls", models.MAKERS)
def test_tokens_in_a_cache(cls: str):
    """Of transformer-lens, whose entries hold the keys, and of transformers."""
    lens = cases.case("llama", cls, "raw").lens
    cache = None
    for count in (3, 4):
        _, cache = lens.plan.host.run_cached(models.tokens(2, count), cache)
    assert compat.cached_tokens(cache) == 7
    assert compat.cached_tokens(None) == 0
    mask = compat.cached_mask(cache)
    assert mask is None if cls == "TransformerBridge" else mask.tolist() == [[1] * 7] * 2
    assert compat.cached_mask(None) is None
    with pytest.raises(ModelStateError, match="a cache of the class object does not say"):
        compat.cached_tokens(object())


@pytest.mark.slow
def test_no_private_name_elsewhere():
    found = {name: foreign(source, ours(), known()) for name, source in SOURCES.items()}
    assert {name: private for name, private in found.items() if private} == {}


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
    "setattr(block, 'forward', twice)": "forward",
    "vars(block)['forward'] = twice": "['forward']",
}


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_name_is_seen(source: str):
    """Negative control, in each form."""
    assert PLANTED[source] in foreign(source, ours(), known())


def test_what_is_ours_is_not_seen():
    source = "from lens_lora._version import versions\nself._plan._replace()\nx.__dict__"
    assert foreign(source, ours(), known()) == []


def test_compat_imports_nothing_of_ours_but_errors_and_spans():
    imports = [node for node in ast.walk(COMPAT) if isinstance(node, ast.Import | ast.ImportFrom)]
    ours = {str(getattr(node, "module", None)) for node in imports}
    of_ours = {name for name in ours if name.startswith("lens_lora")}
    of_ours = {name for name in of_ours if not name.startswith("lens_lora.compat.")}
    assert of_ours == {"lens_lora.errors", "lens_lora.spans"}
    assert "lens_lora" not in {alias.name for node in imports for alias in node.names}


def test_compat_knows_what_it_touches():
    """The list that the check goes by is read from compat itself, and is not empty."""
    assert {"_forward_hooks", "_hf_hook", "_version", "_use_processed_weights"} <= known()
    assert sys.modules["lens_lora.compat"] is compat
