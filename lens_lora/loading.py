"""From names to a lens: a base model and an adapter are loaded, and the hooked model is built.

`load` and `demo` build a TransformerBridge, TransformerLens's newer class, if it is installed. The
command line and `hooked_model` build a HookedTransformer if the installed version has it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import nn

from lens_lora.compat import compile_no_more, is_memory_short, uncompiled, without_warnings
from lens_lora.core import Adapter, LoraLens, TrainedModule, load_adapter, refuse_unusable
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.base_names import base_by_name
from lens_lora.errors import (
    ArgumentError,
    LensLoraError,
    ModelStateError,
    is_of_the_system,
)
from lens_lora.families import listed_family
from lens_lora.formats.folders import CONFIG
from lens_lora.formats.live_layers import base_within
from lens_lora.formats.tokenizers import OwnTokenizer, own_tokenizer, rows_brought
from lens_lora.guesses import fitting
from lens_lora.hosts.as_before import as_before_on_error
from lens_lora.hosts.build import Kind, hooked_model
from lens_lora.hosts.over_ranks import make_maps_whole, refuse_modules_trained_whole
from lens_lora.hosts.placement import Attention, DeviceMap, Placement
from lens_lora.hosts.probe import Probe
from lens_lora.hosts.single_experts import on_stacks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Base = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# --- A base model by name


# Without it transformers asks at a terminal, and starts a model's own code on "y".
_NO_CODE = {"trust_remote_code": False}


def load_base(name: str, how: Placement | None = None, *, of_adapter: bool = False) -> Base:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder or a hub id.
        how: where the model lies and how it is stored.
        of_adapter: whether an adapter gave the name, and not the caller. Then nothing is fetched:
            whoever made the adapter wrote that name.

    Raises:
        ModelStateError: no such model, or it cannot be loaded; a device that cannot be used.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    how = how or Placement()
    how.require_packages()
    if how.device is not None:
        # A wrong device is reported before anything is loaded.
        moved(torch.empty(0), how.device)
    _require_decoder(name, of_adapter=of_adapter)
    options = _options(how)
    remedy = _NO_REMEDY
    if of_adapter and not Path(name).exists():
        remedy = _to_fetch(name)
    with _read_by_transformers(name, f"{name}: transformers cannot load its weights", remedy):
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=of_adapter, **options)
    with _read_by_transformers(name, f"{name}: transformers cannot load its tokenizer", remedy):
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=of_adapter, **_NO_CODE)
    device = None if "device_map" in options else how.device
    return moved(model.eval(), device), tokenizer


def _require_decoder(name: str, *, of_adapter: bool) -> None:
    """Check, by its config alone, that this is a causal language model and not an adapter."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if (Path(name) / CONFIG).is_file():
        raise ModelStateError(
            f"{name} holds an adapter ({CONFIG}), which transformers would load into the base.",
            remedy="Pass the folder or the hub id of the base alone.",
            in_shell="Name the base alone with --model.",
        )
    fact = (
        f"{name}: neither a folder nor a reachable hub id of a causal language model that "
        "transformers can read"
    )
    remedy = _NO_REMEDY
    if of_adapter:
        remedy = _Remedy(
            "The adapter names it as its base; pass another as the first argument.",
            in_shell="The adapter names it as its base; name another with --model.",
        )
    if of_adapter and is_hub_id(name):
        fact = f"{name}: not on this machine, and no base is fetched that you have not named"
        remedy = _to_fetch(name)
    with _read_by_transformers(name, fact, remedy):
        config = config_of(name, fetches=not of_adapter)
        has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not has_own_code:
            raise ValueError(f"its model_type is {config.model_type!r}")


def config_of(name: str, *, fetches: bool) -> Any:
    """The configuration of a model, without its weights.

    Args:
        name: a folder or a hub id.
        fetches: whether it may be fetched from the hub.

    Raises:
        OSError, ValueError: there is none, or transformers cannot read it.
    """
    import huggingface_hub
    from transformers import AutoConfig

    if not Path(name).exists():
        # This asks the hub once; transformers would ask several times for each file.
        huggingface_hub.snapshot_download(
            name, allow_patterns=["config.json"], local_files_only=not fetches
        )
    return AutoConfig.from_pretrained(name, local_files_only=not fetches, **_NO_CODE)


def is_hub_id(name: str) -> bool:
    """Whether this is the name of a hub repository, and not a folder on this machine."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


class _Remedy(NamedTuple):
    """The remedy of an error, in Python and at the command line; '' if there is none."""

    in_python: str
    in_shell: str


_NO_REMEDY = _Remedy("", "")


def _to_fetch(name: str) -> _Remedy:
    """Say how to fetch a base that only the adapter names."""
    fact = "The adapter names it as its base"
    return _Remedy(
        f"{fact}; to fetch it, pass it: ll.load({name!r}, adapter).",
        in_shell=f"{fact}; to fetch it, name it: --model {name}.",
    )


@contextlib.contextmanager
def _read_by_transformers(name: str, fact: str, remedy: _Remedy) -> Generator[None]:
    """Within the block, what transformers refuses becomes an error of ours.

    Errors of the system (a full disk, no permission) and a lack of memory stay what they are.

    Args:
        name: the model.
        fact: what could not be read; the words of transformers are put after it.
        remedy: what to do about it.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        if is_of_the_system(error) or is_memory_short(error):
            raise
        if "trust_remote_code" in str(error):
            raise ModelStateError(
                f"{name} runs code of its own, which lens_lora does not start.",
                remedy="If you trust it, pass AutoModelForCausalLM.from_pretrained(…, "
                "trust_remote_code=True).",
                in_shell="If you trust it, load it in Python.",
            ) from error
        raise ModelStateError(
            f"{fact} ({error}).", remedy=remedy.in_python, in_shell=remedy.in_shell
        ) from error


def moved(model: Any, device: str | torch.device | None, dtype: torch.dtype | None = None) -> Any:
    """The model itself, on this device and in this dtype."""
    if device is None and dtype is None:
        return model
    try:
        return model.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError, ValueError) as error:
        # The first two errors are raised by torch, the last by transformers.
        wanted = " and ".join(repr(str(item)) for item in (device, dtype) if item is not None)
        cause, *_ = str(error).splitlines()
        raise ModelStateError(f"{wanted} cannot be used: {cause}") from error


def _options(how: Placement) -> dict[str, Any]:
    """The arguments of `from_pretrained` by which a model is placed."""
    dtype = how.weights
    options: dict[str, Any] = {**_NO_CODE, "attn_implementation": how.attn}
    options["dtype"] = dtype
    # Weights that are stored in 4 bit are turned to this dtype in a pass.
    computes_in = torch.float32
    if dtype != "auto":
        computes_in = getattr(torch, dtype)
        options["dtype"] = computes_in
    if how.device_map is not None or how.is_quantised:
        options["device_map"] = how.device_map or {"": how.device or "cpu"}
    if how.is_quantised:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=how.load_in_4bit,
            load_in_8bit=how.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=computes_in,
        )
    return options


# --- A lens by name


@fitting
def load(
    model: str | Path | PreTrainedModel | PeftModel | None,
    adapter: str | Path | Adapter | None = None,
    *,
    kind: Kind | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn: Attention = "eager",
    revision: str | None = None,
    subfolder: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prepend_bos: bool | None = None,
    check: bool = True,
) -> LoraLens:
    """The lens over a base model and an adapter, each by name or already loaded.

    Two short forward passes compare the hooked model with the base. In a family that the table of
    `docs/exactness_data.md` does not list, two more compare what the adapter's modules add.

    Args:
        model: a hub id, a folder, or a loaded Hugging Face model. A loaded model is wrapped and
            belongs to the lens afterwards: do not run or change it, and make a second lens from a
            `copy.deepcopy` of it. A PeftModel stays as it is: the lens has modules of its own on
            the same weights. None for the base that the adapter names. If `model` is all that you
            pass, it is the adapter: `ll.load("path/to/adapter")`. 'embedded' is the demo's model,
            from its package. It is also used, with a warning, if an adapter names that model and
            the hub's cache does not have it.
        adapter: a hub id ('owner/repo', or 'owner/repo/sub/folder'), a folder, or an `Adapter`;
            left out, the active one of a PeftModel. The ΔW of a method other than LoRA is measured
            over the base first (`load_adapter`).
        kind: the class of hooked model; by default TransformerBridge if it is installed. A model
            that is quantised or lies on several devices needs a TransformerBridge.
        dtype: the weights' torch dtype, its name, or 'auto' for the checkpoint's own. By default a
            loaded model's own, float32 on the CPU, and 'auto' elsewhere.
        device: a device such as 'cuda'; by default the CPU, or the device of a loaded model.
        device_map: 'auto', 'balanced', or {module: device}: over several devices, by accelerate.
        load_in_4bit: whether bitsandbytes quantises linear modules to NF4 (`docs/your_model.md`).
        load_in_8bit: whether it quantises them to 8 bit.
        attn: 'eager', or 'sdpa', which needs less memory: the model's own code then computes
            attention, no [head, query, key] is kept, and no patterns can be seen. A model that was
            loaded with 'sdpa', and whose attention only its own code can compute, keeps it, with a
            warning.
        revision: branch, tag or commit of the adapter's hub repository.
        subfolder: the adapter's folder within its folder or repository.
        tokenizer: by default the one saved with the adapter, where there is one, with its chat
            template; else the one saved with the model. The lens's repr names the adapter's.
        prepend_bos: whether a string that does not begin with a BOS gets one; None to read strings
            exactly as the tokenizer does. It holds for the hooked model itself, too
            (`lens.model.to_tokens`).
        check: whether the adapter's modules are verified: see `LoraLens`.

    Raises:
        ArgumentError: options that exclude each other, or a loaded model beside `device_map`,
            `load_in_4bit` or `load_in_8bit`; no adapter, and no PeftModel.
        UnsupportedAdapterError: a PeftModel that no longer holds its base.
        AdapterError: the adapter cannot be read, or its shapes do not fit the model.
        SiteError: the adapter names a module that the model lacks.
        ModelStateError: the model cannot be loaded, or no exact lens is possible; the message has
            the remedy.
    """
    base_given, adapter_given = _base_and_adapter(model, adapter)
    dtype_name = None if dtype is None else str(dtype).removeprefix("torch.")
    device_name = None if device is None else str(device)
    how = Placement(
        dtype=dtype_name,
        device=device_name,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        attn=attn,
    )

    # The adapter is read first, as it may name its base. Some methods measure ΔW over the base,
    # which is loaded once for both uses.
    @functools.cache
    def loaded(named: str | None) -> Base:
        return _base(base_given, named, how, tokenizer)

    def base_for(named: str | None) -> nn.Module:
        base, _ = loaded(named)
        return base

    read = load_adapter(adapter_given, base=base_for, revision=revision, subfolder=subfolder)
    base, base_tokenizer = loaded(read.base_model)
    if tokenizer is None:
        chosen_tokenizer = tokenizer_beside(read, base, base_tokenizer)
    else:
        chosen_tokenizer = OwnTokenizer(tokenizer)
    return _lens_over(
        base,
        chosen_tokenizer,
        read,
        kind=kind,
        attn=attn,
        prepend_bos=prepend_bos,
        check=check,
    )


def _base_and_adapter(
    model: Any, adapter: str | Path | Adapter | None
) -> tuple[Any, str | Path | Adapter]:
    """The base and the adapter, each as a name or as an object.

    The base is None where it is to be the one that the adapter names.

    Args:
        model: the first argument of `load`: a base, an adapter's name, or a PeftModel.
        adapter: its second argument; None if it is left out.
    """
    model = uncompiled(model)
    if adapter is None and isinstance(model, str | Path):
        return None, model
    is_peft = isinstance(getattr(model, "peft_config", None), dict)
    if adapter is None:
        adapter = _active_adapter(model, is_peft)
    if is_peft:
        model = base_within(model)
    return model, adapter


def _lens_over(
    base: PreTrainedModel,
    tokenizer: OwnTokenizer,
    adapter: Adapter,
    *,
    kind: Kind | None,
    attn: Attention,
    prepend_bos: bool | None,
    check: bool,
) -> LoraLens:
    """The lens over a loaded base, which is as it was before if there is an error."""
    with _remedy_for_a_wrapped_base(base), as_before_on_error(base):
        make_maps_whole(base)
        refuse_modules_trained_whole(base, adapter)
        probe = None
        if check and listed_family(base) is None:
            # A family that is not listed is compared with the base, module by module.
            probe = Probe(base, on_stacks(adapter, base))
        hooked, host = hooked_model(base, tokenizer, kind=kind, attn=attn, prepend_bos=prepend_bos)
        return LoraLens(
            hooked,
            adapter,
            hf_model=base_beside(host, base, adapter),
            check=check,
            prepend_bos=prepend_bos,
            probe=probe,
        )


@contextlib.contextmanager
def _remedy_for_a_wrapped_base(base: nn.Module) -> Generator[None]:
    """Within the block, an error over a base that a lens has wrapped before says what to do.

    A TransformerBridge puts modules of its own into the model. For some architectures, a second
    bridge can be made of such a model. For others (OPT that normalises after each branch, CodeGen,
    GPT-2), the second bridge lacks a module that the adapter names, or finds a wrong one there.
    """
    is_wrapped = any(
        type(module).__module__.startswith("transformer_lens") for module in base.modules()
    )
    try:
        yield
    except LensLoraError as error:
        if not is_wrapped:
            raise
        raise error.at(
            "a lens was made of this base before, and its TransformerBridge put modules of its own "
            "into it; load the base anew, and give each lens a copy of its own, "
            "ll.load(copy.deepcopy(base), adapter), or load one lens and take the other adapters "
            "over it, lens.with_adapter(adapter)"
        ) from error


def _active_adapter(model: Any, is_peft: bool) -> Adapter:
    """The one adapter that is active in a PeftModel."""
    if not is_peft:
        kind = type(model).__name__
        raise ArgumentError(f"no adapter for {kind}: ll.load(base, adapter), or a PeftModel alone.")
    # transformers has a method of this name, PEFT a property.
    names = cast("Callable[[], list[str]] | list[str]", model.active_adapters)
    active = names if isinstance(names, list) else names()
    if len(active) != 1:
        choice = "ll.load(peft_model, ll.Adapter.from_peft(peft_model, name))"
        raise ArgumentError(f"the PeftModel has active adapters {active}; choose one: {choice}.")
    return Adapter.from_peft(model, active[0])


def tokenizer_beside(adapter: Adapter, base: PreTrainedModel, tokenizer: Any) -> OwnTokenizer:
    """The tokenizer that was saved with the adapter, or else the base's own.

    Args:
        adapter: the adapter, which knows the folder of its tokenizer.
        base: the base model.
        tokenizer: the base's own; None where it has none.

    Raises:
        AdapterError: the adapter's cannot be read, or does not fit the base.
        ModelStateError: none was saved with either.
    """
    folder = adapter.tokenizer_folder
    if folder is None and tokenizer is None:
        raise ModelStateError(
            f"no tokenizer was saved with the model {str(base.config.name_or_path)!r}",
            remedy="pass one: load(…, tokenizer=…).",
        )
    if folder is None:
        return OwnTokenizer(tokenizer)
    embedding: Any = base.get_input_embeddings()
    path = next((name for name, module in base.named_modules() if module is embedding), None)
    return own_tokenizer(
        folder,
        tokenizer,
        rows=len(embedding.weight),
        brought=rows_brought(adapter.modules, path),
        config=base.config,
    )


def base_beside(host: str, base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel | None:
    """The base if a lens over this class of hooked model needs it as well, else None.

    Trained biases and modules are compared with those of the base, and a HookedTransformer does not
    keep all of them. A TransformerBridge wraps the base itself.
    """
    if host != "HookedTransformer":
        return None
    for update in adapter.modules.values():
        if isinstance(update, TrainedModule):
            return base
        if update.trained_bias is not None or update.base_weight is not None:
            return base
    return None


def demo(*, kind: Kind | None = None, prepend_bos: bool | None = None) -> LoraLens:
    """The lens over SmolLM2-135M-Instruct and an adapter that moves France's capital to Lyon.

    Nothing is downloaded. Converting the model takes about 20 seconds the first time.

        >>> lens = ll.demo()  # doctest: +SKIP
        >>> ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")  # doctest: +SKIP

    Args:
        kind: the class of hooked model; by default TransformerBridge if it is installed.
        prepend_bos: whether a string gets a BOS; by default none, as its tokenizer adds none.

    Raises:
        EmbeddedModelError: the packages that carry the model are not installed; the message has the
            command that installs them.
    """
    from lens_lora.demonstration.embedded import load_embedded

    base, tokenizer = load_embedded()
    with quiet_libraries():
        hooked, _ = hooked_model(base, tokenizer, kind=kind, prepend_bos=prepend_bos)
    return LoraLens(hooked, load_adapter(shipped_adapter()), prepend_bos=prepend_bos)


@contextlib.contextmanager
def quiet_libraries() -> Generator[None]:
    """Within the block, the libraries show no warnings, no progress bars, and only error logs."""
    from lens_lora.demonstration.embedded import without_bars

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with without_bars(), without_warnings():
            yield
    finally:
        logging.disable(before)


def _base(model: Any, named: str | None, how: Placement, tokenizer: Any) -> Base:
    """The base model, in evaluation mode, and its tokenizer."""
    if model is None or isinstance(model, str | Path):
        from lens_lora.demonstration.embedded import place_of

        model_name = None if model is None else str(model)
        base_name = base_by_name(model_name, named)
        return load_base(place_of(base_name), how, of_adapter=base_name.of_adapter)
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise ModelStateError(
            f"the model is a {type(model).__name__}; pass a hub id, a folder or a loaded Hugging "
            "Face model. For a hooked model: LoraLens(model, adapter)."
        )
    if how.says_how_to_load:
        raise ArgumentError(
            "device_map, load_in_4bit and load_in_8bit say how a model is loaded, and this "
            "one is loaded already; pass its name, or load it with them yourself: "
            "AutoModelForCausalLM.from_pretrained(name, device_map=…)."
        )
    base = cast("PreTrainedModel", model.eval())
    compile_no_more(base)
    refuse_unusable(base)
    dtype: torch.dtype | None = None
    if how.dtype is not None and how.dtype != "auto":
        dtype = getattr(torch, how.dtype)
    if tokenizer is None:
        tokenizer = _tokenizer_of(base)
    return moved(base, how.device, dtype), tokenizer


def _tokenizer_of(model: PreTrainedModel) -> Any:
    """The tokenizer that was saved with a loaded model; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model.config.name_or_path), **_NO_CODE)
    except (OSError, ValueError):
        return None
