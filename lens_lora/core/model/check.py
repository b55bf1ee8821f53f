"""Whether a hooked model can be trusted: its state, its logits, and that its weights stay the same.

1. `refuse_unusable`: a decoder with a head, no active dropout, no unknown quantisation, no adapter
   in it already, and every weight within reach.
2. `base_logits`, then `require_same_logits`: without the adapter it computes what its Hugging Face
   base does. The host libraries build some families wrongly, without a warning. The base is run
   first, because a TransformerBridge wraps and changes it.
3. `Watch`: each update is computed once, from the adapter's factors and the model's own γ, β, W and
   b, and a later change would leave it wrong. Remembered and compared are

   - which tensor stands in which place of which module, and which module in which place of another;
   - each tensor's address, which changes with `.to(…)`, `.half()` and `p.data = …`;
   - each tensor's version, which PyTorch counts up at every edit in place, also under no_grad;
   - entries of each, all those of a vector: an edit through `p.data` counts nothing up.

   One change may go unseen: through `.data`, of a small part of a matrix. Tensors that were made in
   inference mode have no version, so of them the other three are compared. Quantised and offloaded
   tensors are left out: they are repacked or replaced in a forward pass, and no update is made from
   them.

A watch runs no forward pass. At 210 adapted sites of 135 million parameters the first three
comparisons take 0.2 ms, at every run; the fourth takes 2.5 ms, at every call. A run of eight tokens
takes 120 ms there, on one thread.
"""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import (
    Temporary,
    activation_checkpointing,
    edits_of,
    home_of,
    parameters_in,
)
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import extensions
from lens_lora.core.model.hooks import attached
from lens_lora.errors import (
    AdapterError,
    LensLoraError,
    ModelStateError,
    is_of_the_system,
)

TOKENS = torch.arange(1, 9)[None]  # on which logits are compared
# Largest difference, as a share of the logits' range. Rounding takes 1e-5 in float32, and 1e-7 in
# float64, as weights are folded in float32.
AGREEMENT = 1e-4
# So many roundings may be that far off, where a device rounds products more coarsely than that.
_ROUNDINGS = 16
SKIP = "Pass check=False to go on without this check, at your own risk."
OF_A_GIVEN_BASE = (
    "Either hf_model is not its base, or transformer-lens builds this family wrongly (2.18 ignores "
    "Llama's rope_theta, and misfolds Mixtral); try another version, or its TransformerBridge."
)
_Logits = Float[Tensor, "batch pos d_vocab"]
_R = TypeVar("_R")


def refuse_unusable(model: nn.Module) -> None:
    """Check for encoders, adapters, active dropout, missing weights, and unknown quantisation."""
    hf_model: Any = getattr(model, "original_model", model)
    name, can_generate = type(hf_model).__name__, getattr(hf_model, "can_generate", lambda: True)
    is_pair = getattr(getattr(hf_model, "config", None), "is_encoder_decoder", False)
    if is_pair or not can_generate():
        what = "an encoder-decoder" if is_pair else "no causal language model with a head"
        raise ModelStateError(
            f"{name} is {what}, and a lens explains next-token logits of a decoder.",
            remedy="Pass a decoder: AutoModelForCausalLM.from_pretrained(base).",
            in_shell="Name a decoder with --model.",
        )
    modules = modules_of(model)
    refuse_dropout(model, modules)
    compat.refuse_out_of_reach(model)
    for module, name in modules.items():
        if type(module).__module__.startswith("peft."):
            raise ModelStateError(
                f"{name or type(module).__name__} already carries a PEFT adapter, which would be "
                "applied twice",
                remedy="let ll.load(peft_model) build it, and the PeftModel stays as it is.",
                in_shell="name the base alone with --model, not a folder that holds an adapter.",
            )
    refuse_compiled(modules)
    extensions.refuse_unusable_weights(model, modules)


def refuse_compiled(modules: Mapping[nn.Module, str]) -> None:
    """Check that no module was compiled in place: compiled code runs the hooks of its first pass.

    `torch.compile(model)` is another thing: it leaves the model as it is, beside a wrapper.
    """
    for module, name in modules.items():
        if compat.is_compiled_in_place(module):
            raise ModelStateError(
                f"{name or type(module).__name__} was compiled in place (compile()), and compiled "
                "code does not run hooks that are put on later.",
                remedy="Make the lens of a model that is not compiled; ll.load(hf_model, adapter) "
                "sets the compiled code aside.",
            )


def modules_of(model: nn.Module) -> dict[nn.Module, str]:
    """The names of a hooked model's modules; of a bridge also those that no component wraps."""
    base = getattr(model, "original_model", model)
    return {module: name for name, module in (*base.named_modules(), *model.named_modules())}


def refuse_dropout(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Check for active dropout: in modules, and in a Hugging Face config where one is trained."""
    # A bridge stays in evaluation mode when `train` is called on a part, or on what it wraps.
    if not any(module.training for module in modules):
        return
    config = getattr(getattr(model, "original_model", None), "config", None)
    fields = {} if config is None else config.to_dict()
    dropouts = ((m, name) for m, name in modules.items() if isinstance(m, nn.Dropout))
    rates = {f"{name}: dropout ": m.p for m, name in dropouts if m.training}
    rates |= {f"{name}=": value for name, value in fields.items() if "drop" in name}
    for name, rate in rates.items():
        if isinstance(rate, float) and rate > 0:
            fact = f"{name}{rate} is active, so no two runs agree; call model.eval()."
            raise ModelStateError(fact)


def refuse_checkpointing(modules: Iterable[nn.Module], *, once: bool) -> None:
    """Check that transformers does not run blocks again in a backward pass, where that does harm.

    Reentrant checkpointing cuts the graph at each block, so that a derivative by something within
    it is zero. Any other one runs the block again, under the hooks that are on it then: a first
    derivative survives that, and no second one and none of several values at once.

    Args:
        modules: the model's.
        once: whether the graph is walked back once, for a first derivative, with hooks still on.

    Raises:
        ModelStateError: gradient checkpointing is on, and the model in training mode.
    """
    how = activation_checkpointing(modules)
    if how is None or (once and how != "reentrant"):
        return
    raise ModelStateError(
        f"gradient checkpointing ({how}) is on and the model in training mode, so blocks are run "
        "again on the way back, which these derivatives do not survive",
        remedy="Call model.eval(), in which no block is run again. lens.within(max_memory=…) "
        "bounds the memory of a backward pass.",
    )


def base_logits(hf_model: nn.Module, dtype: torch.dtype) -> _Logits | None:
    """Logits of the base on eight tokens, its adapters off. One forward pass.

    None in half precision, where rounding moves logits by as much as the errors that the
    comparison should find.
    """
    base_dtype = next(p.dtype for p in hf_model.parameters() if p.is_floating_point())
    if min(torch.finfo(base_dtype).bits, torch.finfo(dtype).bits) < 32:
        return None
    return plain_logits(hf_model)


# --- Whether a model runs

# Models that have run, and what they were then. A model is not kept alive by it.
_HAVE_RUN: weakref.WeakKeyDictionary[nn.Module, object] = weakref.WeakKeyDictionary()


def run_once(model: Any) -> None:
    """One pass over eight tokens, or as many as the context holds."""
    tokens = TOKENS[:, : model.cfg.n_ctx] % model.cfg.d_vocab
    with torch.no_grad():
        model(tokens.to(home_of(model)), return_type="logits")


def note_that_it_ran(model: nn.Module) -> None:
    """Remember that the model, as it is now, can run."""
    _HAVE_RUN[model] = _makeup(model)


def has_run(model: nn.Module) -> bool:
    """Whether the model was seen to run as it is now: with these flags, weights and modules."""
    return model in _HAVE_RUN and _HAVE_RUN[model] == _makeup(model)


def _makeup(model: Any) -> object:
    """What decides whether a model runs, apart from the numbers in its weights."""
    flags = {name: str(value) for name, value in vars(model.cfg).items()}
    modules = [(id(module), type(module)) for module in model.modules()]
    weights = [(id(p), p.shape, p.dtype, p.device) for p in model.parameters()]
    return flags, modules, weights


# --- What a model rounds to

# Of a float64 model: a relative step of the embedding, an eighth of a rounding of float32, so that
# about one entry in eight is then rounded another way. Steps up and down bend the logits, as a
# share of the largest, by 2^-26 (a Llama of one layer, d = 8) to 2^-17 (SmolLM2) where norms round
# to float32; where nothing does, curvature and last bits make it 2^-50 to 2^-37.
_STEP = 2.0**-27
_BENT = 2.0**-31
# Of a float32 model: an eighth of a rounding of TF32, in which a device may compute the products.
# Curvature and last bits bend a token's logits by 2^-10 to 2^-5.6 (SmolLM2) of what the step
# changes in them; where factors are rounded to the 10 bits of TF32, or the 7 of bfloat16, it is
# 2^-0.5 to 2^2.5. The median over tokens counts: a step may send single ones to other experts.
_PRODUCT_STEP = 2.0**-13
_BENT_BY_PRODUCTS = 2.0**-3
_PRODUCT_DRAWS = 2
_TF32_EPS = 2.0**-10
_Row = Float[Tensor, "1 pos d_vocab"]
_Rows = Float[Tensor, "draw pos d_vocab"]


def known_eps(model: nn.Module) -> float | None:
    """The precision in which a model computes, relative; None where a pass has to tell. No pass.

    A float64 model may round to float32 on its way. In float32 a pass tells, unless the model lies
    on a CPU that is not told to round products, and all code in it is known to compute in float32.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    dtype = weights[0].dtype
    if dtype == torch.float64:
        return None
    if dtype == torch.float32:
        is_single = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in weights)
        if not is_single or compat.may_round_on_cpu() or _has_other_code(model):
            return None
    return torch.finfo(dtype).eps


def _has_other_code(model: nn.Module) -> bool:
    """Whether some module may compute in another dtype than that of its weights."""
    modules = list(model.modules())
    return any(map(compat.has_own_code, modules)) or bool(extensions.quantised_linears(model))


def eps_of(model: Any, embedding: str) -> float:
    """The precision in which a model computes, relative. At most one pass, of eight tokens.

    That of its dtype; of a float64 model that rounds to float32 on its way, float32's; of a float32
    model whose products a device rounds, that of the format to which it rounds their factors.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        plain, up, down = _stepped(model, embedding, _STEP, draws=1)
        bend = (up + down - 2 * plain).abs().max()
        return torch.finfo(torch.float32).eps if bend > _BENT * plain.abs().max() else eps
    if dtype == torch.float32:
        plain, up, down = _stepped(model, embedding, _PRODUCT_STEP, _PRODUCT_DRAWS)
        bend = (up + down - 2 * plain).norm(dim=-1)
        share = (bend / (up - down).norm(dim=-1)).nanmedian()
        return _eps_of_products() if share > _BENT_BY_PRODUCTS else eps
    return eps


def _stepped(model: Any, embedding: str, step: float, draws: int) -> tuple[_Row, _Rows, _Rows]:
    """Logits of eight tokens, and those after relative steps of the embedding up and down."""

    def steps(rows: Tensor, hook: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(draws, *rows[0].shape, generator=generator)
        return rows * (1 + step * torch.cat([0 * drawn[:1], drawn, -drawn]).to(rows))

    tokens = TOKENS[:, : model.cfg.n_ctx].repeat(1 + 2 * draws, 1) % model.cfg.d_vocab
    with torch.no_grad(), attached(model, [(embedding, steps)]):
        logits = model(tokens.to(home_of(model)), return_type="logits")
    plain, up, down = logits.split([1, draws, draws])
    return plain, up, down


def _eps_of_products() -> float:
    """Of the factors of products that are seen to be rounded: bfloat16's where torch says so."""
    is_bfloat16 = any(setting in ("bf16", "medium") for setting in compat.float32_products())
    return torch.finfo(torch.bfloat16).eps if is_bfloat16 else _TF32_EPS


def kind_of(model: Any) -> str:
    """The class of the Hugging Face model within a bridge, or the name of what a model copies."""
    if hasattr(model, "original_model"):
        return type(model.original_model).__name__
    return str(getattr(model.cfg, "original_architecture", None) or "a model of its own")


def require_running(run: Callable[[], _R], which: str, remedy: str) -> _R:
    """What a short pass of a hooked model returns.

    Raises:
        ModelStateError: TransformerLens has made a model that cannot run.
    """
    try:
        return run()
    except LensLoraError:
        raise
    except Exception as error:
        if is_of_the_system(error) or compat.is_memory_short(error):
            raise
        says = (str(error).splitlines() or [""])[0][:200]
        raise ModelStateError(
            f"{which} cannot run on eight tokens: {type(error).__name__}: {says}", remedy=remedy
        ) from error


def plain_logits(hf_model: nn.Module) -> _Logits:
    """The same in any dtype."""
    extensions.refuse_without_float64(hf_model)
    with torch.no_grad(), Temporary(functools.partial(_switch_adapters_off, hf_model)):
        return hf_model(TOKENS.to(home_of(hf_model))).logits


def _switch_adapters_off(hf_model: nn.Module, span: Temporary) -> None:
    """PEFT layers inside the model, if any; back on as they were at the end."""
    layer: Any
    for layer in hf_model.modules():
        if hasattr(layer, "enable_adapters") and not layer.disable_adapters:
            span.way_back(functools.partial(layer.enable_adapters, True))
            layer.enable_adapters(False)


def require_same_logits(
    expected: _Logits | None,
    logits_of: Callable[[Int[Tensor, "batch pos"]], _Logits],
    claim: str,
    remedy: str,
    eps: Callable[[], float],
) -> None:
    """Check that a hooked model's logits equal its base's. One forward pass.

    A constant at each position does not count, as a centred unembedding removes it.

    Args:
        expected: the base's; None where they are not compared.
        logits_of: runs the hooked model.
        claim: what is wrong if they differ.
        remedy: what to do then.
        eps: the precision in which the hooked model computes, asked for where they differ.

    Raises:
        ModelStateError: they differ by more than a ten-thousandth of their range, and by more than
            rounding can do.
    """
    if expected is None:
        return
    with torch.no_grad():
        logits = logits_of(TOKENS.to(expected.device)).to(expected)
    logits, expected = (values - values.mean(-1, keepdim=True) for values in (logits, expected))
    off, span = float((logits - expected).abs().max()), float(expected.max() - expected.min())
    if not off <= AGREEMENT * span and not off <= _ROUNDINGS * eps() * span:
        raise ModelStateError(f"{claim}: {off:.2g} off, of a range of {span:.2g}. {remedy}")


# --- the watch

# Entries compared of a matrix; the longest vector that is compared whole; and the columns that lie
# between two entries, as a share of the width: the golden section spreads them evenly.
_ENTRIES, _WHOLE_VECTOR, _GOLDEN = 64, 2**15, 0.382
Named = tuple[str, Tensor]
_Counted = tuple[str, Tensor, int]


class _Place(NamedTuple):
    """Where something stands: a module's own dictionary and a key in it."""

    holder: Mapping[str, Any]
    key: str
    held: Any
    name: str


class _Group:
    """Tensors of one dtype and device: some entries of each, compared in one go."""

    def __init__(self, tensors: list[Named]) -> None:
        self._tensors = tensors
        self._steps = [_steps(tensor) for _, tensor in tensors]
        self._then = self._entries()

    def _entries(self) -> UInt8[Tensor, " byte"]:
        """Bit for bit, so that NaN equals itself."""
        pairs = zip(self._tensors, self._steps, strict=True)
        return torch.cat([t.data.as_strided(*steps) for (_, t), steps in pairs]).view(torch.uint8)

    def edited(self) -> str | None:
        """The first tensor whose entries are others, if any."""
        now = self._entries()
        if torch.equal(now, self._then):
            return None
        byte = int((now != self._then).nonzero()[0])
        itemsize = self._tensors[0][1].element_size()
        ends = itertools.accumulate(count * itemsize for (count,), _ in self._steps)
        return next(name for (name, _), end in zip(self._tensors, ends, strict=True) if byte < end)


class Watch:
    """Tensors as they are when this is made."""

    def __init__(self, tensors: Iterable[Named], places: Iterable[_Place] = ()) -> None:
        self._places: list[_Place] = list(places)
        watched = [(name, tensor) for name, tensor in tensors if _is_watched(tensor)]
        self._addresses: list[_Counted] = [(name, t, t.data_ptr()) for name, t in watched]
        self._versions: list[_Counted] = [
            (name, t, edits_of(t)) for name, t in watched if not t.is_inference()
        ]
        by_kind: dict[tuple[torch.dtype, torch.device], list[Named]] = {}
        for name, tensor in watched:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append((name, tensor))
        self._groups: list[_Group] = [_Group(tensors) for tensors in by_kind.values()]

    @classmethod
    def of_module(cls, module: nn.Module, owner: str) -> Watch:
        """Every weight of a module, and the modules that hold them."""
        places = [p._replace(name=f"{owner}{p.name}") for p in _places_of(module)]
        tensors = [place for place in places if isinstance(place.held, Tensor)]
        first = {id(place.held): (place.name, place.held) for place in reversed(tensors)}
        return cls(first.values(), places)

    @classmethod
    def of_adapter(cls, adapter: Adapter) -> Watch:
        """Every update by its module, and its tensors."""
        updates = adapter.modules
        places = [_Place(updates, m, u, f"the adapter's update of {m}") for m, u in updates.items()]
        held = ((m, *item) for m, u in updates.items() for item in vars(u).items())
        tensors = [(f"the adapter's {k} of {m}", t) for m, k, t in held if isinstance(t, Tensor)]
        return cls(tensors, places)

    def changed(self, *, entries: bool) -> str | None:
        """What changed, as the beginning of a sentence; None where nothing did."""
        for place in self._places:
            if place.holder.get(place.key) is not place.held:
                return f"{place.name} was replaced"
        for name, tensor, address in self._addresses:
            if tensor.data_ptr() != address:
                return f"{name} was moved or cast, or got other data"
        for name, tensor, version in self._versions:
            if edits_of(tensor) != version:
                return f"{name} was edited in place"
        for group in self._groups if entries else ():
            name = group.edited()
            if name is not None:
                return f"{name} was edited in place"
        return None

    def require_same(self, *, entries: bool) -> None:
        """Check that nothing changed."""
        changed = self.changed(entries=entries)
        if changed is not None:
            raise ModelStateError(
                f"{changed} after the lens was made, and its updates were computed from what was "
                "there before",
                remedy="make a new LoraLens.",
            )


def _is_watched(tensor: Tensor) -> bool:
    is_plain = type(tensor.data) is Tensor and tensor.layout is torch.strided
    return is_plain and tensor.is_floating_point() and not tensor.is_meta and bool(tensor.numel())


def _places_of(module: nn.Module) -> Iterator[_Place]:
    modules = dict(module.named_modules())
    passed: set[str] = set()
    for path, owner in modules.items():
        held = {k: p for k, p in parameters_in(owner).items() if p is not None}
        places = [(parameters_in(owner), held), (vars(owner), compat.processed_tensors(owner))]
        for holder, found in places:
            for key, tensor in found.items():
                if _is_watched(tensor):
                    yield _Place(holder, key, tensor, f"{path}.{key}".lstrip("."))
        while held and path and path not in passed:
            passed.add(path)
            above, _, key = path.rpartition(".")
            yield _Place(compat.modules_in(modules[above]), key, modules[path], path)
            path = above


def _steps(tensor: Tensor) -> tuple[tuple[int], tuple[int]]:
    """How many entries, and how far apart in memory: all of a vector; of a matrix some, each in
    another row and column, or along the diagonal of one that is not contiguous.
    """
    size = tensor.numel()
    if tensor.is_contiguous():
        count = size if tensor.ndim < 2 and size <= _WHOLE_VECTOR else min(size, _ENTRIES)
        step, aside = size // count, int(_GOLDEN * tensor.shape[-1]) | 1 if tensor.ndim else 0
        return (count,), (step - aside if step > aside else step,)
    count = min(max(tensor.shape), _ENTRIES)
    along = zip(tensor.shape, tensor.stride(), strict=True)
    return (count,), (sum(far * ((wide - 1) // max(count - 1, 1)) for wide, far in along),)


# --- a lens's arguments, and activations that overflow


def require_kinds(adapter: object, hf_model: object) -> None:
    """Check the types of a lens's arguments."""
    require_adapter(adapter)
    if hf_model is not None and not isinstance(hf_model, nn.Module):
        raise ModelStateError(
            f"hf_model is a {type(hf_model).__name__}; pass the loaded base model: "
            "AutoModelForCausalLM.from_pretrained(base)."
        )


def require_adapter(adapter: object) -> None:
    """Check that a lens can be made of it.

    Raises:
        AdapterError: it is no `Adapter`, naming what makes one of it.
    """
    if not isinstance(adapter, Adapter):
        is_path = isinstance(adapter, str | os.PathLike)
        remedy = f"ll.load_adapter({str(adapter)!r})" if is_path else "ll.Adapter.from_peft(…)"
        if isinstance(getattr(adapter, "adapter", None), Adapter):
            remedy = "pass its own, result.adapter"
        raise AdapterError(
            f"the adapter is a {type(adapter).__name__}; LoraLens takes an ll.Adapter: {remedy}."
        )


def first_non_finite(model: Any, run: Callable[[], object]) -> str:
    """A sentence that names the first hook point with a NaN or an infinity. One forward pass."""
    seen: list[str] = []

    def check(name: str, tensor: Any, hook: Any) -> None:
        del hook
        is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
        if not seen and is_float and not torch.isfinite(tensor).all():
            seen.append(name)

    # Masked attention scores are −∞.
    names = [name for name in model.hook_dict if "attn_scores" not in name]
    with attached(model, [(name, functools.partial(check, name)) for name in names]):
        run()
    where = seen[0] if seen else "the unembedding"
    return f"non-finite activations first appear at {where}; check the model's dtype and weights."
