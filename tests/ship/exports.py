"""Merged folders, good and broken, as people make them; and what transformers loads from each.

The oracle is transformers' own `from_pretrained` of the folder beside PEFT's active adapter on the
base: the same logits, and the same ids for strings, or not.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import models
import no_ops
import torch
from adapter_files import deltas, set_fields
from differences import largest_difference
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

WEIGHTS = "model.safetensors"
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}w4"


class Export(NamedTuple):
    """A folder that is to be base plus adapter.

    Attributes:
        make: spoils the right merge in a shipment's folder, or only makes it look otherwise.
        ships: how base, adapter and merge are made (`no_ops.ship`).
        says: a part of what is said of a broken one.
        shows: where the fault shows: in the "logits" or the "ids" that transformers gives, or only
            to other "loaders" than this version of transformers. Of a good one nothing shows.
    """

    make: Callable[[Path], object]
    ships: Mapping[str, Any] = {}
    says: str = ""
    shows: str = "logits"


def _nothing(out: Path) -> None:
    """The merge as it was made."""


# --- Edits of a folder


def config(**fields) -> Callable[[Path], object]:
    """Fields of config.json."""
    return lambda out: no_ops.set_merged(out, **fields)


def _generation(**fields) -> Callable[[Path], object]:
    return lambda out: set_fields(out / "merged" / "generation_config.json", **fields)


def _tensors(out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """The tensors of the merged folder, edited in place."""
    file = out / "merged" / WEIGHTS
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})


def _as(dtype: torch.dtype) -> Callable[[Path], object]:
    return lambda out: no_ops.merge(out, dtype)


def _stored_whole(dtype: torch.dtype, times: int = 1) -> Callable[[Path], object]:
    """Merged in half precision, and stored in float32."""

    def make(out: Path) -> None:
        no_ops.merge(out, dtype, times=times)
        _tensors(out, lambda state: state.update({k: v.float() for k, v in state.items()}))
        config(dtype="float32", torch_dtype="float32")(out)

    return make


def _rounded_to_8_bit(matrix: torch.Tensor) -> torch.Tensor:
    """Each row as whole multiples of a step of its own, as int8 weights have it."""
    step = matrix.abs().amax(1, keepdim=True) / 127
    return (matrix / step).round() * step


def _in_8_bit(of: str) -> Callable[[Path], object]:
    """The linear weights of the merge, or of the base, as int8 leaves them, in float32."""

    def make(out: Path) -> None:
        source = load_file(out / of / WEIGHTS)
        _tensors(
            out,
            lambda state: state.update(
                {k: _rounded_to_8_bit(source[k].float()) for k in state if "proj" in k}
            ),
        )

    return make


def _in_shards(out: Path) -> None:
    no_ops.merge(out, max_shard_size="6KB")


def _base_in_shards(out: Path) -> None:
    """Shards and index of the base, in place of the merge's file."""
    (out / "merged" / WEIGHTS).unlink()
    no_ops.base_of(out).save_pretrained(out / "merged", max_shard_size="6KB")


# --- Good ones: what lies beside the merge, and what decides nothing


def _stale_shards(out: Path) -> None:
    """A merge beside the shards of the base, with their index."""
    merge = (out / "merged" / WEIGHTS).read_bytes()
    _base_in_shards(out)
    (out / "merged" / WEIGHTS).write_bytes(merge)


def _beside(name: str) -> Callable[[Path], object]:
    """The base's weights beside the merge, under a name that is not loaded."""
    return lambda out: shutil.copy(out / "base" / WEIGHTS, out / "merged" / name)


def _stale_shard_of_more(out: Path) -> None:
    _in_shards(out)
    shutil.copy(out / "base" / WEIGHTS, out / "merged" / "model-00009-of-00009.safetensors")


def _adapter_weights_beside(out: Path) -> None:
    shutil.copy(out / "adapter" / no_ops.WEIGHTS, out / "merged")


def _pickle_beside(out: Path) -> None:
    torch.save({}, out / "merged" / "pytorch_model.bin")


def _stale_tensor(out: Path) -> None:
    """Add a tensor that old checkpoints of Llama hold and that is no parameter of the model."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _tensors(out, lambda state: state.update({name: torch.ones(2)}))


def _tied_twice(out: Path) -> None:
    """Head and embedding stored apart, with the same values."""

    def edit(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    _tensors(out, edit)


def _untied_with_both(out: Path) -> None:
    _tied_twice(out)
    config(tie_word_embeddings=None)(out)


def _without_generation(out: Path) -> None:
    (out / "merged" / "generation_config.json").unlink()


def _other_padding(out: Path) -> None:
    tokenizer = models.tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(out / "merged")


def _template(folder: Path, template: str) -> None:
    tokenizer = models.tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def _both_templates(out: Path) -> None:
    for part in ("base", "merged"):
        _template(out / part, TEMPLATE)


def _template_in_config(out: Path) -> None:
    """Store the template in tokenizer_config.json, as it was stored before."""
    _template(out / "base", TEMPLATE)
    set_fields(out / "merged" / "tokenizer_config.json", chat_template=TEMPLATE)


def _template_alone(out: Path) -> None:
    """A trainer saved the template beside the adapter, and no vocabulary."""
    (out / "adapter" / "chat_template.jinja").write_text(TEMPLATE)
    _template(out / "merged", TEMPLATE)


def _end_of_adapter(out: Path) -> None:
    """As a trainer sets it: the adapter's own tokenizer ends in another token, and so do both."""
    tokenizer = models.tokenizer()
    tokenizer.eos_token = "w9"
    for part in ("adapter", "merged"):
        tokenizer.save_pretrained(out / part)
    config(eos_token_id=9)(out)
    _generation(eos_token_id=9)(out)


GOOD = {
    "as PEFT merges it": Export(_nothing),
    "in bfloat16": Export(_as(torch.bfloat16)),
    "in float16": Export(_as(torch.float16)),
    "in bfloat16, stored in float32": Export(_stored_whole(torch.bfloat16)),
    "in float16, stored in float32": Export(_stored_whole(torch.float16)),
    "rounded when it is loaded": Export(config(dtype="bfloat16", torch_dtype="bfloat16")),
    "in shards": Export(_in_shards),
    "stale shards and index": Export(_stale_shards),
    "stale shard of another count": Export(_stale_shard_of_more),
    "model_old.safetensors": Export(_beside("model_old.safetensors")),
    "consolidated.safetensors": Export(_beside("consolidated.safetensors")),
    "the adapter's weights alone": Export(_adapter_weights_beside),
    "a pickle": Export(_pickle_beside),
    "a tensor of no parameter": Export(_stale_tensor),
    "rsLoRA": Export(_nothing, {"use_rslora": True}),
    "DoRA": Export(_nothing, {"use_dora": True}),
    "trained head": Export(_nothing, {"modules_to_save": ["lm_head"]}),
    "trained norm": Export(_nothing, {"modules_to_save": ["input_layernorm"]}),
    "tied": Export(_nothing, {"tied": True}),
    "tied, stored twice": Export(_tied_twice, {"tied": True}),
    "tied, and apart in the folder": Export(_untied_with_both, {"tied": True}),
    "tied, trained head": Export(_nothing, {"tied": True, "modules_to_save": ["lm_head"]}),
    "tied by its class": Export(config(tie_word_embeddings=None), {"family": "gpt2"}),
    "biases": Export(_nothing, {"family": "gpt2", "lora_bias": True}),
    "fused": Export(_nothing, {"family": "neox"}),
    "other names in the file": Export(_nothing, {"family": "mixtral"}),
    "names and versions": Export(
        config(
            _name_or_path="x",
            transformers_version="4.40.0",
            unsloth_version="1",
            use_cache=False,
            attention_dropout=0.1,
            temperature=0.3,
        )
    ),
    "without generation_config.json": Export(_without_generation),
    "another padding": Export(_other_padding),
    "a chat template": Export(_both_templates),
    "a chat template in the old place": Export(_template_in_config),
    "the adapter's template alone": Export(_template_alone),
    "the adapter's own end": Export(_end_of_adapter),
}


# --- Broken ones


def _base_alone(out: Path) -> None:
    shutil.copy(out / "base" / WEIGHTS, out / "merged" / WEIGHTS)


def _unmerged_is_loaded(out: Path) -> None:
    """A right merge in shards, beside a file of the base that is loaded in their place."""
    _in_shards(out)
    _base_alone(out)


def _shards_of_base(out: Path) -> None:
    """The merge under another name; what is loaded are shards of the base."""
    shutil.copy(out / "merged" / WEIGHTS, out / "merged" / "model_merged.safetensors")
    _base_in_shards(out)


def _later_shard(out: Path) -> None:
    """A shard that holds a base's tensor again: the later one is loaded."""
    _in_shards(out)
    last = sorted((out / "merged").glob("model-*.safetensors"))[-1]
    name = "model.layers.0.self_attn.q_proj.weight"
    state = {**load_file(last), name: load_file(out / "base" / WEIGHTS)[name]}
    save_file(state, last, metadata={"format": "pt"})


def _other_file(out: Path) -> None:
    _beside("model_old.safetensors")(out)
    config(transformers_weights="model_old.safetensors")(out)


def _in_the_adapters_folder(out: Path) -> None:
    """The merge saved where the adapter lies."""
    for file in (out / "adapter").iterdir():
        shutil.copy(file, out / "merged")


def _one_map(part: str) -> Callable[[Path], object]:
    """One map is the base's."""

    def make(out: Path) -> None:
        base = load_file(out / "base" / WEIGHTS)
        _tensors(out, lambda state: state.update({k: base[k] for k in state if part in k}))

    return make


def _one_head(out: Path) -> None:
    """The first head's queries are the base's."""
    name = "model.layers.1.self_attn.q_proj.weight"
    base = load_file(out / "base" / WEIGHTS)[name]

    def edit(state):
        state[name][:4] = base[:4]

    _tensors(out, edit)


def _swapped_layers(out: Path) -> None:
    def edit(state):
        zero = {k: v for k, v in state.items() if ".layers.0." in k}
        for name, tensor in zero.items():
            other = name.replace(".0.", ".1.")
            state[name] = state[other]
            state[other] = tensor

    _tensors(out, edit)


def _nan(out: Path) -> None:
    def edit(state):
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    _tensors(out, edit)


def _no_layer(out: Path) -> None:
    def edit(state):
        for name in [name for name in state if ".layers.1." in name]:
            del state[name]

    _tensors(out, edit)


def _live_biases(out: Path) -> None:
    """Biases that the base lacks, and a config that reads them."""

    def edit(state):
        for name in [name for name in state if "self_attn" in name]:
            bias = name.replace(".weight", ".bias")
            state[bias] = torch.full(state[name].shape[:1], 0.5)

    _tensors(out, edit)
    config(attention_bias=True)(out)


def _lost_lora_bias(out: Path) -> None:
    """A merge by hand, of W + ΔW: the bias that LoRA adds has no place in a map without one."""
    adapted = PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter")
    changes = deltas(adapted)

    def edit(state):
        state |= load_file(out / "base" / WEIGHTS)
        for path, delta in changes.items():
            state[f"{path}.weight"] += delta

    _tensors(out, edit)


def _head_from_embedding(out: Path) -> None:
    """The head is not stored, and config.json ties it to the embedding."""
    _tensors(out, lambda state: state.pop("lm_head.weight"))
    config(tie_word_embeddings=True)(out)


def _of_another_shape(out: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    merged.resize_token_embeddings(models.VOCAB + 3)
    merged.save_pretrained(out / "merged")


def _tokens(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """tokenizer.json, edited in place."""

    def make(out: Path) -> None:
        file = out / "merged" / "tokenizer.json"
        fields = json.loads(file.read_text())
        edit(fields)
        file.write_text(json.dumps(fields))

    return make


def _other_spelling(fields: dict[str, Any]) -> None:
    fields["normalizer"] = {"type": "Replace", "pattern": {"String": "The"}, "content": "w4"}


def _with_bos(fields: dict[str, Any]) -> None:
    """A BOS before each text, which training never had."""
    token = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}},
    }


def _added_token(out: Path) -> None:
    tokenizer = models.tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(out / "merged")


def _not_special(fields: dict[str, Any]) -> None:
    """A token of the text's own words that is cut out before it, as an added one is."""
    token = {**fields["added_tokens"][0], "id": 7, "content": "w7", "special": False}
    fields["added_tokens"].append(token)


def _other_end(out: Path) -> None:
    tokenizer = models.tokenizer()
    tokenizer.eos_token = "w9"
    tokenizer.save_pretrained(out / "merged")


def _no_template(out: Path) -> None:
    _template(out / "base", TEMPLATE)


def _template_alone_is_lost(out: Path) -> None:
    """It lies beside the adapter, without a vocabulary."""
    (out / "adapter" / "chat_template.jinja").write_text(TEMPLATE)


def _other_template(out: Path) -> None:
    _both_templates(out)
    _template(out / "merged", TEMPLATE.replace("role", "content"))


def _base_template(out: Path) -> None:
    """The adapter was trained with a template of its own, and the folder has the base's."""
    _both_templates(out)
    _template(out / "adapter", TEMPLATE.replace("w4", "w5"))


_TIED = {"tied": True}
_NO_TIE = "config.json has no tie_word_embeddings, which is LlamaConfig's default of false"
BROKEN = {
    "the base in 8 bit": Export(_in_8_bit("base"), says="14 of 14 tensors: the base"),
    "the base": Export(_base_alone, says="14 of 14 tensors: the base (nothing was merged)"),
    "an unmerged file is loaded": Export(
        _unmerged_is_loaded, says="loaded: model.safetensors, and not model-00001-of-00005"
    ),
    "shards of the base are loaded": Export(
        _shards_of_base, says="and not model_merged.safetensors"
    ),
    "a later shard of the base": Export(_later_shard, says="1 of 14 tensors: the base"),
    "another file is named": Export(_other_file, says="loaded: model_old.safetensors"),
    "in the adapter's folder": Export(
        _in_the_adapters_folder, says="transformers lays it over them", shows="loaders"
    ),
    "twice": Export(lambda out: no_ops.merge(out, times=2), says="base + 2.00 ΔW"),
    "twice in bfloat16, stored in float32": Export(
        _stored_whole(torch.bfloat16, times=2), says="base + 2.0"
    ),
    "saved without merging": Export(no_ops.NO_OPS["unmerged"].make, says="the adapter's own"),
    "α lost": Export(no_ops.NO_OPS["α lost"].make, says="α is lost, s = 1"),
    "another adapter": Export(no_ops.NO_OPS["other adapter"].make, says="neither base nor base"),
    "attention only": Export(no_ops.NO_OPS["some"].make, says="6 of 14 tensors: the base"),
    "one map is the base's": Export(_one_map("1.mlp.down"), says="layers.1.mlp.down_proj"),
    "one head is the base's": Export(_one_head, says="neither base nor base + ΔW"),
    "layers swapped": Export(_swapped_layers, says="neither base nor base + ΔW"),
    "not a number": Export(_nan, says="layers.0.mlp.up_proj"),
    "half of the tensors": Export(_no_layer, says="9 of 21 tensors: not in the folder"),
    "another vocabulary": Export(_of_another_shape, says="vocab_size is 64, the base's 61"),
    "a trained norm is the base's": Export(
        _one_map("input_layernorm"), {"modules_to_save": ["input_layernorm"]}, "input_layernorm"
    ),
    "LoRA on a tied head": Export(
        _nothing, {**_TIED, "targets": ["q_proj", "lm_head"]}, "a merge changes both"
    ),
    "rms_norm_eps": Export(config(rms_norm_eps=0.1), says="rms_norm_eps is 0.1, the base's 1e-06"),
    "hidden_act": Export(config(hidden_act="gelu"), says="hidden_act is 'gelu', the base's 'silu'"),
    "heads": Export(
        config(num_attention_heads=8, num_key_value_heads=4, head_dim=2),
        says="num_attention_heads is 8, the base's 4",
    ),
    "a layer less": Export(
        config(num_hidden_layers=1), says="num_hidden_layers is 1, the base's 2"
    ),
    "a layer more": Export(
        config(num_hidden_layers=3), says="num_hidden_layers is 3, the base's 2"
    ),
    "rope's frequency": Export(
        config(rope_theta=100.0, rope_parameters={"rope_theta": 100.0, "rope_type": "default"}),
        says="rope_theta is 100.0, the base's 10000.0",
    ),
    "rope's scaling": Export(
        config(
            rope_scaling={"rope_type": "linear", "factor": 4.0},
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        ),
        says="rope_type is 'linear'",
    ),
    "attention_bias": Export(
        config(attention_bias=True),
        says="attention_bias is True, the base's False",
        shows="loaders",
    ),
    "live biases": Export(_live_biases, says="config.json makes it live, and the base lacks it"),
    "a soft cap less": Export(
        config(final_logit_softcapping=0.5), {"family": "gemma2"}, "final_logit_softcapping is 0.5"
    ),
    "another class": Export(
        config(architectures=["FSDPLlamaForCausalLM"]), says="architectures is", shows="loaders"
    ),
    "a head from the embedding": Export(_head_from_embedding, says="(tie_word_embeddings)"),
    "a tie that loses the head": Export(
        config(tie_word_embeddings=True), says="config.json ties the two", shows="loaders"
    ),
    "no tie": Export(config(tie_word_embeddings=None), _TIED, _NO_TIE),
    "no tie, and says so": Export(
        config(tie_word_embeddings=False), _TIED, "says tie_word_embeddings: false"
    ),
    "a bias that has no place": Export(
        _lost_lora_bias, {"family": "llama", "lora_bias": True, "merged": False}, "adds a bias"
    ),
    "two ids swapped": Export(
        no_ops.NO_OPS["other tokenizer"].make,
        says="2 tokens of another id: 'w5' is 6, was 5",
        shows="ids",
    ),
    "a token too many": Export(_added_token, says="1 token too many: '<tool>'", shows="ids"),
    "another spelling": Export(_tokens(_other_spelling), says="is read as", shows="ids"),
    "a BOS before each text": Export(_tokens(_with_bos), says="is read as [0", shows="ids"),
    "a token that is cut out first": Export(
        _tokens(_not_special), says="1 added token differ: 7 is AddedToken", shows="ids"
    ),
    "another end": Export(_other_end, says="eos_token is 'w9', was '<eos>'", shows="ids"),
    "another end of answers": Export(
        _generation(eos_token_id=9), says="eos_token_id is [9], the base's [2]", shows="loaders"
    ),
    "no chat template": Export(
        _no_template, says="no chat template, and there was one", shows="ids"
    ),
    "not the adapter's template": Export(
        _template_alone_is_lost, says="no chat template, and there was one", shows="ids"
    ),
    "another chat template": Export(_other_template, says="another chat template", shows="ids"),
    "the base's chat template": Export(_base_template, says="another chat template", shows="ids"),
}


# --- What cannot be decided


def _no_tokenizer(out: Path) -> None:
    for file in (out / "merged").glob("tokenizer*"):
        file.unlink()


def _code_of_its_own(out: Path) -> None:
    set_fields(
        out / "merged" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Own", None]},
        tokenizer_class="Own",
    )


def _other_decoder(fields: dict[str, Any]) -> None:
    fields["decoder"] = {"type": "Fuse"}


UNDECIDED = {
    "no tokenizer": Export(_no_tokenizer, says="no tokenizer in the folder"),
    "a tokenizer with code": Export(_code_of_its_own, says="it runs code of its own"),
    "another part of the tokenizer": Export(
        _tokens(_other_decoder), says="which no text tried here showed: decoder"
    ),
    "an unknown field": Export(
        config(new_scale=2.0), says="new_scale: no field of LlamaConfig in this version"
    ),
    "rounded away": Export(no_ops.NO_OPS["rounded away"].make, says="rounding to bfloat16 leaves"),
    "in 8 bit, and written in float32": Export(
        _in_8_bit("merged"), says="14 of 14 tensors: base + ΔW, rounded to 8 bit"
    ),
    "quantised": Export(config(quantization_config={}), says="quantised weights are no W + ΔW"),
}


# --- The oracle


IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25, 26, 27]])


def tokenizer_of(out: Path):
    """The one that the adapter was trained with."""
    place = "adapter" if (out / "adapter" / "tokenizer.json").is_file() else "base"
    tokenizer = AutoTokenizer.from_pretrained(out / place)
    template = out / "adapter" / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text()
    return tokenizer


def _is_half(model) -> bool:
    """Whether its numbers are those of half precision, in whatever dtype they are stored."""
    state = model.state_dict().values()
    return any(
        all(bool((t.to(dtype).to(t.dtype) == t).all()) for t in state)
        for dtype in (torch.bfloat16, torch.float16)
    )


def shows_in_logits(out: Path) -> bool:
    """Whether transformers' model of the folder is not PEFT's of base and adapter."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = (
            PeftModel.from_pretrained(no_ops.base_of(out), out / "adapter").eval()(IDS).logits
        )
        try:
            loaded = AutoModelForCausalLM.from_pretrained(out / "merged", dtype="auto").eval()
        except (RuntimeError, ValueError, OSError):
            return True
        logits = loaded(IDS).logits.float()
    room = 0.1 if _is_half(loaded) else 1e-4
    return logits.shape != expected.shape or not bool(
        largest_difference(logits, expected) <= room * (expected.max() - expected.min())
    )


def shows_in_ids(out: Path) -> bool:
    """Whether strings, conversations or their end are read otherwise."""
    found = AutoTokenizer.from_pretrained(out / "merged")
    expected = tokenizer_of(out)
    texts = ("w5 w6 w7w8", "The kettle <tool> w7", "<bos>w9<eos>")
    talk = [{"role": "user", "content": "w5"}]
    is_same = (
        [found(text).input_ids for text in texts] == [expected(text).input_ids for text in texts]
        and found.eos_token_id == expected.eos_token_id
        and repr(found.added_tokens_decoder) == repr(expected.added_tokens_decoder)
        and bool(found.chat_template) == bool(expected.chat_template)
    )
    if is_same and expected.chat_template:
        asked = [t.apply_chat_template(talk, tokenize=False) for t in (found, expected)]
        return asked[0] != asked[1]
    return not is_same
