"""First guesses, typed before reading anything, work, or their error names the call that is meant.

The table was written before the code that answers it, by what a researcher knows from
TransformerLens, PEFT, Captum, numpy and pandas. `NAMED` has words of the remedy, not of the fact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import models
import numpy as np
import pandas as pd
import pytest
import torch
import typer
from every_result import every_result

import lens_lora as ll
from lens_lora import cli, guesses
from lens_lora.results import Explanations
from lens_lora.vocabulary import VOCABULARY, meaning

PROMPT = "w5 w6 w7"
MARGIN = ll.Margin("w8", "w9")
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def t():
    base = models.hf_model("llama", dtype=torch.float32)
    adapter = ll.Adapter.from_peft(models.peft_model("llama", base))
    model = next(iter(models.MAKERS.values()))(base)
    lens = ll.LoraLens(model, adapter)
    found = ll.first_order(lens, PROMPT, MARGIN, **QUIET)
    return SimpleNamespace(
        lens=lens,
        adapter=adapter,
        att=found,
        effects=ll.patch_sites(lens, PROMPT, MARGIN, how="add_one", **QUIET),
        margin=ll.fact_margin(lens, PROMPT, "w8", "w9", **QUIET),
        site=lens.sites[3].name,
    )


# Each works, and is equal to what a reader of the documents would have written.
WORKS = {
    "lens.tokenizer": (lambda t: t.lens.tokenizer is t.lens.model.tokenizer, True),
    "lens(prompt)": (lambda t: torch.equal(t.lens(PROMPT), t.lens.logits(PROMPT)), True),
    "lens(prompt, 0)": (lambda t: torch.equal(t.lens(PROMPT, 0), t.lens.logits(PROMPT, 0)), True),
    "lens.cfg.n_layers": (lambda t: t.lens.cfg.n_layers == t.lens.model.cfg.n_layers, True),
    "att[site]": (lambda t: t.att[t.site].value.item(), lambda t: t.att.values[0, 3].item()),
    "att[0]": (lambda t: t.att[0]["value"], lambda t: t.att.values[0, 0].item()),
    "att[-1]": (lambda t: t.att[-1]["site"], lambda t: t.lens.sites[-1].name),
    "att[:2]": (lambda t: [row["site"] for row in t.att[:2]],
        lambda t: [site.name for site in t.lens.sites[:2]]),
    "att['value']": (lambda t: t.att["value"].tolist(), lambda t: t.att.values[0].tolist()),
    "len(att)": (lambda t: len(t.att), lambda t: len(t.lens.sites)),
    "list(att)": (lambda t: [row["value"] for row in t.att], lambda t: t.att.values[0].tolist()),
    "DataFrame(att)": (lambda t: pd.DataFrame(t.att).equals(t.att.to_frame()), True),
    "np.asarray(att)": (lambda t: np.asarray(t.att)[0].tolist(),
        lambda t: t.att.values[0].tolist()),
    "att.to_dataframe()": (lambda t: t.att.to_dataframe().equals(t.att.to_frame()), True),
    "att.to_pandas()": (lambda t: t.att.to_pandas().equals(t.att.to_frame()), True),
    "att.total": (lambda t: t.att.total.item(), lambda t: t.att.values.sum().item()),
    "margin.shift": (lambda t: t.margin.shift.item(), lambda t: (t.margin.m - t.margin.m0).item()),
    "margin.base": (lambda t: t.margin.base.item(), lambda t: t.margin.m0.item()),
    "lens.sites[name]": (lambda t: t.lens.sites[t.site] is t.lens.sites[3], True),
    "lens.sites[path]": (lambda t: t.lens.sites[t.lens.sites[3].module] is t.lens.sites[3], True),
    "0.5 * adapter": (
        lambda t: t.lens.with_adapter(0.5 * t.adapter).logits(PROMPT).equal(
            t.lens.with_adapter(t.adapter.scaled(0.5)).logits(PROMPT)), True),
    "lens.sites[:2]": (lambda t: t.lens.sites[:2] == tuple(t.lens.sites)[:2], True),
    "torch.tensor(att)": (lambda t: torch.tensor(t.att)[0].tolist(),
        lambda t: t.att.values[0].tolist()),
    "torch.as_tensor(att)": (lambda t: torch.as_tensor(t.att)[0].tolist(),
        lambda t: t.att.values[0].tolist()),
    "att['q_proj']": (lambda t: list(t.att["q_proj"].kind.unique()) == ["q"], True),
    "att['mlp.down']": (lambda t: list(t.att["mlp.down"].kind.unique()) == ["down"], True),
    "att['mlp']": (lambda t: t.att["mlp"].site.str.contains(".mlp.", regex=False).all(), True),
    "att['layers.1']": (lambda t: list(t.att["layers.1"].layer.unique()) == [1], True),
    "att['blocks.0.*']": (lambda t: list(t.att["blocks.0.*"].layer.unique()) == [0], True),
    "margin.adapted": (lambda t: t.margin.adapted.item(), lambda t: t.margin.m.item()),
    "adapter[path]": (
        lambda t: t.adapter[t.lens.sites[3].module] is t.adapter.modules[t.lens.sites[3].module],
        True),
    "list(adapter)": (lambda t: list(t.adapter) == list(t.adapter.modules), True),
    "path in adapter": (lambda t: t.lens.sites[3].module in t.adapter, True),
    "att['layer 1']": (lambda t: list(t.att["layer 1"].layer.unique()) == [1], True),
}  # fmt: skip


@pytest.mark.parametrize("guess, expected", WORKS.values(), ids=WORKS)
def test_a_natural_guess_works(t, guess, expected):
    right = expected(t) if callable(expected) else expected
    assert guess(t) == pytest.approx(right)


READOUT = r"ll\.LogProb\(.*ll\.Margin\("
# Each is refused, and the message has these words.
NAMED = {
    "lens.base": (lambda t: t.lens.base, r"lens\.model .*lens\.logits\(prompts, scale=0\.0\)"),
    "lens.run_with_cache": (lambda t: t.lens.run_with_cache(PROMPT),
        r"with lens\.applied\(\) as model.*model\.run_with_cache"),
    "lens.run_with_hooks": (lambda t: t.lens.run_with_hooks(PROMPT), r"with lens\.applied\(\)"),
    "lens.run": (lambda t: t.lens.run(PROMPT), r"expected Prompts, not str.*lens\.logits\(text\)"),
    "lens.to": (lambda t: t.lens.to("cpu"), r"ll\.load\(base, adapter, device="),
    "lens.to_tokens": (lambda t: t.lens.to_tokens(PROMPT), r"lens\.prompts\(prompts\)\.tokens"),
    "lens.eval": (lambda t: t.lens.eval(), r"lens\.model\.eval"),
    "lens.disable_adapter": (lambda t: t.lens.disable_adapter(), r"scale=0\.0 is the base"),
    "lens.merge_and_unload": (lambda t: t.lens.merge_and_unload(), "merge with PEFT"),
    "lens.adapters": (lambda t: t.lens.adapters, r"lens\.adapter "),
    "lens.ablate": (lambda t: t.lens.ablate(0), r"lens\.ablate_directions\(v\).*leave_one_out"),
    "lens.layers": (lambda t: t.lens.layers, r"lens\.sites"),
    "lens.first_order": (lambda t: t.lens.first_order(PROMPT), r"ll\.first_order\(lens"),
    "LoraLens.from_pretrained": (lambda t: ll.LoraLens.from_pretrained("a", "b"), r"ll\.load\("),
    "Adapter.from_pretrained": (lambda t: ll.Adapter.from_pretrained("a"), r"ll\.load_adapter"),
    "adapter.target_modules": (lambda t: t.adapter.target_modules, r"adapter\.modules"),
    "adapter.r": (lambda t: t.adapter.r, r"adapter\.modules\[path\]"),
    "att.top_k": (lambda t: t.att.top_k(5), r"result\.top\(k\)"),
    "att.heatmap": (lambda t: t.att.heatmap(), r"result\.plot\(\)"),
    "att.show": (lambda t: t.att.show(), r"result\.plot\(\)"),
    "att.df": (lambda t: t.att.df, r"result\.to_frame\(\)"),
    "att.scores": (lambda t: t.att.scores, r"result\.values"),
    "effects.effect": (lambda t: t.effects.effect, r"result\.values"),
    "att.groupby": (lambda t: t.att.groupby("layer"), r'result\.sum\("layer"\)'),
    "att.by_layer": (lambda t: t.att.by_layer(), r'result\.sum\("layer"\)'),
    "att.to_csv": (lambda t: t.att.to_csv("a.csv"), r"result\.to_frame\(\).*to_csv"),
    "att.to_html": (lambda t: t.att.to_html(), r"save_report"),
    "att.completness_error": (lambda t: t.att.completness_error,
        "nearest are completeness_error"),
    "att['no site']": (lambda t: t.att["blocks.0.attn.w"], r"nearest are .*blocks\.0\.attn\."),
    "att.sum(by=)": (lambda t: t.att.sum(by="layer"), "It is group="),
    "first_order(target=)": (lambda t: ll.first_order(t.lens, PROMPT, target="w8"), READOUT),
    "first_order(doc=, pre=)": (lambda t: ll.first_order(t.lens, PROMPT, doc="w8", pre="w9"),
        READOUT),
    "first_order(layers=)": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, layers=[1]),
        r'result\.to_frame\(\).*group="layer"'),
    "first_order(prompt=)": (lambda t: ll.first_order(t.lens, prompt=PROMPT, readout=MARGIN),
        "It is prompts="),
    "patch_sites(by=)": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, by="layer"),
        "It is group="),
    "patch_sites(layers=)": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, layers=[1]),
        "It is sites="),
    "first_order without readout": (lambda t: ll.first_order(t.lens, PROMPT), READOUT),
    "first_order(prompt, lens, …)": (lambda t: ll.first_order(PROMPT, t.lens, MARGIN),
        r"comes first: first_order\(lens, …\)"),
    "a string for a readout": (lambda t: ll.first_order(t.lens, PROMPT, "w8"),
        r"ll\.LogProb\('w8'\).*ll\.Margin.*ll\.Readout\.of"),
    "a pair for a readout": (lambda t: ll.first_order(t.lens, PROMPT, ("w8", "w9")),
        r"ll\.Margin\('w8', 'w9'\)"),
    "a function for a readout": (lambda t: ll.first_order(t.lens, PROMPT, lambda f: f[:, 0]),
        r"ll\.Readout\.of\(fn\)"),
    "a class for a readout": (lambda t: ll.first_order(t.lens, PROMPT, ll.KL), r"ll\.KL\(…\)"),
    "load(base=, lora=)": (lambda t: ll.load("a", lora="b"), "It is adapter="),
    "ll.quirk": (lambda t: ll.quirk, r"from lens_lora\.hosts\.quirks import quirk"),
    "ll.TrainedModule": (lambda t: ll.TrainedModule, r"it is ll\.results\.TrainedModule"),
    "ll.Evaluations": (lambda t: ll.Evaluations, "from lens_lora.core import Evaluations"),
    "ll.ablate": (lambda t: ll.ablate, r"ll\.patch_sites.*leave_one_out"),
    "ll.activation_patching": (lambda t: ll.activation_patching, r"ll\.patch_activations"),
    "ll.attribute": (lambda t: ll.attribute, r"ll\.patch_sites.*ll\.first_order"),
    "ll.integrated_gradients": (lambda t: ll.integrated_gradients, r"ll\.path_attribution"),
    "ll.kl_divergence": (lambda t: ll.kl_divergence, r"ll\.KL\(\)"),
    "ll.LogitDiff": (lambda t: ll.LogitDiff, r"ll\.Margin\(doc, pre\)"),
    "ll.logit_diff": (lambda t: ll.logit_diff, r"ll\.Margin\(doc, pre\)"),
    "ll.plot": (lambda t: ll.plot, r"result\.plot\(\)"),
    "ll.steering_vector": (lambda t: ll.steering_vector, r"ll\.contrast.*ll\.Adapter\.constant"),
    "lens.to_single_token": (lambda t: t.lens.to_single_token("w5"),
        r"it is lens\.model\.to_single_token"),
    "lens.W_U": (lambda t: t.lens.W_U, r"it is lens\.model\.W_U"),
    "lens.n_layers": (lambda t: t.lens.n_layers, r"lens\.cfg"),
    "lens.trace": (lambda t: t.lens.trace(PROMPT), r"with lens\.applied\(\) as model"),
    "lens.print_trainable_parameters": (lambda t: t.lens.print_trainable_parameters(),
        r"lens\.describe\(\)"),
    "adapter.peft_config": (lambda t: t.adapter.peft_config, r"adapter\.base_model"),
    "att.nlargest": (lambda t: t.att.nlargest(5), r"result\.top\(k\)"),
    "att.sort_values": (lambda t: t.att.sort_values("value"), r"result\.top\(k\)"),
    "att.iloc": (lambda t: t.att.iloc[0], r"it is result\.to_frame\(\)\.iloc"),
    "att.abs": (lambda t: t.att.abs(), r"result\.to_frame\(\)\.abs or result\.values\.abs"),
    "att.detach": (lambda t: t.att.detach(), r"it is result\.values\.detach"),
    "att.convergence_delta": (lambda t: t.att.convergence_delta, r"completeness_error"),
    "path(n_steps=)": (
        lambda t: ll.path_attribution(t.lens, PROMPT, MARGIN, n_steps=50), "It is max_nodes="),
    "first_order(baseline=)": (
        lambda t: ll.first_order(t.lens, PROMPT, MARGIN, baseline=0), "is the base model"),
    "first_order(batch_size=)": (
        lambda t: ll.first_order(t.lens, PROMPT, MARGIN, batch_size=8), r"lens\.within\("),
    "a folder for a lens": (lambda t: ll.first_order("folder", PROMPT, MARGIN), r"ll\.load\("),
    "ll.PeftModel": (lambda t: ll.PeftModel, r"ll\.load\(peft_model\)"),
    "ll.shapley": (lambda t: ll.shapley, r"ll\.path_attribution.*ll\.patch_sites"),
    "ll.IntegratedGradients": (lambda t: ll.IntegratedGradients, r"ll\.path_attribution"),
    "ll.direct_logit_attribution": (lambda t: ll.direct_logit_attribution, r"ll\.logit_shift"),
    "lens.sites['no site']": (lambda t: t.lens.sites["blocks.0.attn.w"],
        r"nearest are .*blocks\.0\.attn"),
    "lens.sites.to_frame": (lambda t: t.lens.sites.to_frame(), r"pandas\.DataFrame\(lens\.sites"),
    "site.delta_w": (lambda t: t.lens.sites[0].delta_w, r"lens\.delta_w\(site\.name\)"),
    "update.lora_A": (lambda t: next(iter(t.adapter.modules.values())).lora_A, r"update\.A"),
    "readout.compute": (lambda t: MARGIN.compute(PROMPT), r"ll\.first_order\(lens"),
    "att - effects": (lambda t: t.att - t.effects, r"result\.values.*ll\.compare"),
    "abs(att)": (lambda t: abs(t.att), r"result\.values"),
    "Margin of one": (lambda t: ll.Margin("w8"), r"between two answers.*ll\.LogProb"),
    "Margin(correct=)": (lambda t: ll.Margin(correct="w8", wrong="w9"), "It is doc="),
    "logits(strength=)": (lambda t: t.lens.logits(PROMPT, strength=0.5), "It is scale="),
    "by='module'": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, by="module"),
        r"\.sum\('layer'\)"),
    "adapter.num_trainable_params": (lambda t: t.adapter.num_trainable_params(),
        "lens-lora inspect"),
    "adapter.print_trainable_parameters": (lambda t: t.adapter.print_trainable_parameters(),
        "lens-lora inspect"),
    "ll.export_to_gguf": (lambda t: ll.export_to_gguf, r'format="gguf"'),
    "ll.verify_merged": (lambda t: ll.verify_merged, "lens-lora verify ADAPTER --merged"),
    "ll.patch_heads": (lambda t: ll.patch_heads, r'by="head"'),
    "ll.SequenceScore": (lambda t: ll.SequenceScore, r"ll\.AnswerLogProb"),
    "lens.topk": (lambda t: t.lens.topk(PROMPT), r"topk\(5\)"),
    "adapter.push_to_hub": (lambda t: t.adapter.push_to_hub("a"), r"adapter\.save\(folder\)"),
    "patch_sites(ablate=)": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, ablate="zero"),
        "It is replace="),
    "first_order(n_random=)": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, n_random=3),
        r"ll\.null_test"),
    "lens.sites[glob]": (lambda t: t.lens.sites["blocks.0.*"], r"sites\.chosen\("),
    "ll.topTokens": (lambda t: ll.topTokens, r"ll\.logit_shift\("),
    "lens.chat": (lambda t: t.lens.chat("hello"), r'lens\.generate\(\[\{"role"'),
    "lens.next_token_probs": (lambda t: t.lens.next_token_probs(PROMPT), "softmax"),
    "ll.Prob": (lambda t: ll.Prob, r"ll\.LogProb"),
    "att.plot().savefig": (lambda t: t.att.plot().savefig("a.png"), r"figure\.write_image"),
    "a subplot's savefig": (lambda t: t.margin.plot().savefig("a.png"), r"figure\.write_image"),
    "ll.run": (lambda t: ll.run, r"ll\.explain\("),
    "ll.model_diff": (lambda t: ll.model_diff, r"ll\.what_changed\(lens\)"),
    "ll.attribution_patching": (lambda t: ll.attribution_patching, r"ll\.first_order\("),
    "ll.zero_ablation": (lambda t: ll.zero_ablation, "leave_one_out"),
    "ll.resample_ablation": (lambda t: ll.resample_ablation, "resample"),
    "ll.ablate_heads": (lambda t: ll.ablate_heads, 'heads="each"'),
    "ll.find_important_layers": (lambda t: ll.find_important_layers, r"ll\.patch_sites"),
    "ll.circuit_discovery": (lambda t: ll.circuit_discovery, r"ll\.edges"),
    "ll.Attribution": (lambda t: ll.Attribution, r"it is ll\.results\.Attribution"),
    "ll.Sites": (lambda t: ll.Sites, "from lens_lora.core import Sites"),
    "ll.no_such_thing": (lambda t: ll.no_such_thing, r"help\(lens_lora\)"),
    "lens.readout": (lambda t: t.lens.readout(PROMPT, MARGIN), r"lens\.function\("),
    "readout(lens, prompt)": (lambda t: MARGIN(t.lens, PROMPT), r"lens\.function\("),
    "Readout.of(readout)": (lambda t: ll.Readout.of(MARGIN), "give it as it is"),
    "lens.save_pretrained": (lambda t: t.lens.save_pretrained("a"), r"lens\.adapter\.save"),
    "lens.num_layers": (lambda t: t.lens.num_layers, r"lens\.cfg\.n_layers"),
    "lens.active_adapters": (lambda t: t.lens.active_adapters, r"lens\.adapter\.name"),
    "att.normalize": (lambda t: t.att.normalize(), "column share"),
    "att.most_important": (lambda t: t.att.most_important(3), r"result\.top\(k\)"),
    "first_order(n_steps=)": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, n_steps=20),
        r"ll\.path_attribution"),
    "att.sum()": (lambda t: t.att.sum(), r'sum\("layer"\).*result\.total'),
    "att.layer": (lambda t: t.att.layer(1), r'query\("layer'),
    "att.plot(cmap=)": (lambda t: t.att.plot(cmap="viridis"), r"figure\.update_layout"),
    "margin.plot(title=)": (lambda t: t.margin.plot(title="a"), r"figure\.update_layout"),
    "att.top(n=)": (lambda t: t.att.top(n=3), "It is k="),
    "adapter.to": (lambda t: t.adapter.to("cuda"), r"device=.cuda"),
    "lens[site]": (lambda t: t.lens["blocks.0.attn.q"], r"lens\.sites\[.*ll\.patch_sites"),
    "list(lens)": (lambda t: list(t.lens), r"lens\.sites\["),
    "att.plot.bar": (lambda t: t.att.plot.bar(), r"result\.plot\(\)"),
    "margin.plot.line": (lambda t: t.margin.plot.line(), r"result\.plot\(\)"),
    "att.plot(kind=)": (lambda t: t.att.plot(kind="bar"), r"result\.plot\(\)"),
    "att.top(by=)": (lambda t: t.att.top(3, by="layer"), r'sort_values.*result\.sum\("layer"\)'),
    "logits(return_type=)": (lambda t: t.lens.logits(PROMPT, return_type="loss"),
        r"ll\.AnswerLogProb"),
    "lens(return_type=)": (lambda t: t.lens(PROMPT, return_type="loss"), r"ll\.AnswerLogProb"),
    "two answers in a list": (lambda t: ll.first_order(t.lens, [PROMPT] * 2, ["w8", "w9"]),
        r"ll\.LogProb\(\['w8', 'w9'\]\)"),
    "token_shifts(progress=)": (
        lambda t: ll.token_shifts(t.lens, PROMPT, "w8", progress=False), "It shows no bar"),
    "how='zero'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, how="zero"),
        "'leave_one_out' is meant.*is the default"),
    "how='noise'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, how="noise"),
        'replace="resample"'),
    "sites='attn'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, sites="attn"),
        r"the glob '\*attn\*' takes all"),
    "exclude=": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, exclude="*.mlp.*"),
        r"without_modules\(globs\)"),
    "at='base'": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, at="base"),
        r"at=0\.0 is the base model"),
    "ll.compare of adapters": (lambda t: ll.compare(t.adapter, t.adapter),
        r"ll\.compare_adapters\(lens, other\)"),
    "update.delta_w": (lambda t: next(iter(t.adapter.modules.values())).delta_w,
        r"update\.materialise\(\)"),
    "how='leave-one-out'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, how="leave-one-out"),
        "'leave_one_out' is meant"),
    "how='mean'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, how="mean"),
        'replace="mean"'),
    "replace='base'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, replace="base"),
        "'zero' is meant"),
    "mode='backward'": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, mode="backward"),
        "'reverse' is meant"),
    "by='heads'": (lambda t: ll.first_order(t.lens, PROMPT, MARGIN, by="heads"),
        "'head' is meant"),
    "group='layers'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, group="layers"),
        "'layer' is meant"),
    "group='head'": (lambda t: ll.patch_sites(t.lens, PROMPT, MARGIN, group="head"), 'by="head"'),
    "lens.prompt_tokens": (lambda t: t.lens.prompt_tokens(PROMPT), r"lens\.prompts\(prompts\)"),
    "effects.sort": (lambda t: t.effects.sort(), r"result\.top\(k\)"),
    "margin.crossing": (lambda t: t.margin.crossing, r"result\.flip_scale"),
    "logits(adapter=)": (lambda t: t.lens.logits(PROMPT, adapter=False), "0.0 is the base model"),
    "by='token' of a margin": (
        lambda t: ll.first_order(t.lens, PROMPT, MARGIN, by="token"), "by='position'"),
    "adapter[site]": (lambda t: t.adapter["blocks.0.attn.q"],
        r"lens\.sites\['blocks\.0\.attn\.q'\]\.module"),
    "adapter[glob]": (lambda t: t.adapter["*.q_proj"], r"adapter\.only\('\*\.q_proj'\)"),
    "adapter.items": (lambda t: t.adapter.items(), r"adapter\.modules"),
    "adapter.delta_w": (lambda t: t.adapter.delta_w("a"), r"adapter\[path\]\.materialise\(\)"),
    "lens.config": (lambda t: t.lens.config, r"lens\.cfg.*lens\.adapter"),
    "lens.model_name": (lambda t: t.lens.model_name, r"lens\.cfg\.model_name"),
    "lens.rank": (lambda t: t.lens.rank, r"lens\.adapter\[path\]"),
    "lens.compare": (lambda t: t.lens.compare(PROMPT), r"ll\.token_shifts.*ll\.compare_adapters"),
    "lens.top_tokens": (lambda t: t.lens.top_tokens(PROMPT), r"topk\(5\)"),
    "ll.attribution": (lambda t: ll.attribution, r"ll\.patch_sites.*ll\.first_order"),
    "effects.total": (lambda t: t.effects.total, r"result\.shift"),
    "effects.remainder": (lambda t: t.effects.remainder, r"ll\.remainder\("),
    "generated.tokens": (lambda t: t.lens.generate(PROMPT, max_new_tokens=1, **QUIET).tokens,
        r"said\.ids"),
    "generated.logprobs": (lambda t: t.lens.generate(PROMPT, max_new_tokens=1, **QUIET).logprobs,
        r"ll\.token_shifts\("),
    "generated[0]": (lambda t: t.lens.generate(PROMPT, max_new_tokens=1, **QUIET)[0],
        r"said\.texts\[0\].*said\.ids\[0\]"),
    "prompts[0]": (lambda t: t.lens.prompts(PROMPT)[0], r"prompts\.chosen\(\[0\]\)"),
    "list(prompts)": (lambda t: list(t.lens.prompts(PROMPT)), r"prompts\.texts\[0\]"),
    "lens * 0.5": (lambda t: t.lens * 0.5, r"lens\.with_adapter\(lens\.adapter\.scaled\(0\.5"),
    "0.5 * lens": (lambda t: 0.5 * t.lens, r"scale=0\.5"),
    "att.top('layer')": (lambda t: t.att.top("layer"), r'result\.sum\("layer"\)'),
    "prompts.shape": (lambda t: t.lens.prompts(PROMPT).shape, r"prompts\.tokens"),
    "prompts.to_str_tokens": (lambda t: t.lens.prompts(PROMPT).to_str_tokens(),
        r"convert_ids_to_tokens"),
    "lens.at": (lambda t: t.lens.at(0.5), r"lens\.logits\(prompts, scale=0\.5\)"),
    "adapter.names": (lambda t: t.adapter.names, r"adapter\.modules"),
    "att.to_list": (lambda t: t.att.to_list(), r"list\(result\)"),
    "ll.set_device": (lambda t: ll.set_device, r"ll\.load\("),
    "ll.set_seed": (lambda t: ll.set_seed, r"seed=0"),
    "load(adapter=)": (lambda t: ll.load(adapter="a"), r"ll\.load\(base, adapter\)"),
    "patch_activations(layer=)": (
        lambda t: ll.patch_activations(t.lens, PROMPT, MARGIN, layer=0), "It is names="),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize("guess, words", NAMED.values(), ids=NAMED)
def test_a_guess_that_fails_names_what_is_meant(t, guess, words):
    with pytest.raises((AttributeError, ll.errors.LensLoraError), match=words):
        guess(t)


# --- the vocabulary

# Names of the field with words of the call that each means. A "?" is a guess, and says so.
MEANT = {
    "attributionPatching": "ll.first_order(",
    "get_module_contributions": "?ll.patch_sites(",
    "rank_heads": 'heads="each"',
    "IntegratedGradients": "ll.path_attribution(",
    "EAP": "ll.edges(",
    "EAPIG": "ll.path_attribution(",
    "run_acdc": "?ll.edges(",
    "mean_kl": "?ll.KL()",
    "lora_similarity": "ll.compare_adapters(",
    "steering_vectors": "ll.contrast",
    "add_weighted_adapter": "0.5 * one",
    "get_adapter_weights": "lens.delta_w(",
    "compute_logprobs": "ll.LogProb(",
    "influence_functions": "not done here",
    "effective_rank": "adapter.truncated(",
    "explain_prompt": "ll.explain(",
}
# What no row means is not answered.
NOT_MEANT = ["composition_scores", "frobnicate", "odd_thing_layer", "adapter_names", "x", ""]


@pytest.mark.parametrize("name", MEANT)
def test_a_name_is_read_by_its_words(name):
    found = meaning(name)
    assert found is not None
    expected = MEANT[name]
    assert expected.lstrip("?") in found.in_python
    assert found.is_sure == (not expected.startswith("?"))


@pytest.mark.parametrize("name", NOT_MEANT)
def test_a_name_of_other_words_is_not_answered(name):
    assert meaning(name) is None


def test_every_term_is_answered_by_its_own_row():
    """A term that another row has as well would never be reached."""
    for row, notion in enumerate(VOCABULARY):
        for term in notion.terms.split(", "):
            found = meaning(term.replace(" ", "_"))
            assert found is not None, term
            assert VOCABULARY.index(found.notion) == row, (term, found.notion.terms)


# --- former names

FORMER = {
    "ll.activations": (
        lambda t: ll.activations is ll.lora_activations, r"write ll\.lora_activations"),
    "ll.alignment": (lambda t: ll.alignment is ll.weight_alignment, r"write ll\.weight_alignment"),
    "adapter.without": (
        lambda t: list(t.adapter.without("*.q_proj").modules)
        == list(t.adapter.without_modules("*.q_proj").modules),
        r"write adapter\.without_modules"),
    "lens.without": (lambda t: within(t.lens.without) == within(t.lens.ablate_directions),
        r"write lens\.ablate_directions"),
}  # fmt: skip


def within(block: Callable[..., Any]) -> list[float]:
    """The last logits with a direction ablated."""
    with torch.no_grad(), block(torch.eye(16)[0]) as model:
        return model(torch.tensor([[5, 6, 7]]))[0, -1].tolist()


@pytest.mark.parametrize("former, words", FORMER.values(), ids=FORMER)
def test_a_former_name_works_and_warns_where_it_is_written(t, former, words):
    with pytest.warns(ll.errors.LensLoraWarning, match=words) as caught:
        assert former(t)
    # Where shapes are checked, each function is wrapped, and a frame stands between.
    if os.environ.get("LENS_LORA_SHAPES") != "checked":
        assert caught[0].filename == __file__


def test_a_former_name_is_not_shown(t):
    shown = {"ll": dir(ll), "lens": dir(t.lens), "adapter": dir(t.adapter)}
    assert "activations" not in shown["ll"]
    assert "alignment" not in shown["ll"]
    assert "without" not in shown["lens"]
    assert "without" not in shown["adapter"]


# --- nothing is hidden


class Broken(ll.results.Labelled):
    values: torch.Tensor

    def __post_init__(self) -> None:
        """Nothing is checked."""

    @property
    def share(self):
        return self.base.no_such_thing


def test_an_error_within_a_property_stays_as_it_was(t):
    """`__getattr__` is asked for `share` as well, and must not say that there is no such name."""
    header = {
        name: vars(t.att)[name]
        for name in ("sites", "base", "adapted", "str_tokens", "readout", "units", "meta")
    }
    broken = Broken(values=t.att.values, **header)
    with pytest.raises(AttributeError, match="no_such_thing"):
        print(broken.share)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("scale", "lens.logits(prompts, scale=0.5)"),
        ("adapter", "lens.with_adapter(adapter)"),
        ("model", "ll.LoraLens(model, lens.adapter)"),
        ("nonsense", "nothing would read it"),
    ],
)
def test_what_no_call_would_heed_cannot_be_set_on_a_lens(t, name, words):
    lens = t.lens
    before = dict(vars(lens))
    with pytest.raises(AttributeError, match=re.escape(words)):
        setattr(lens, name, 0.5)
    assert vars(lens) == before


def test_absent_names_are_absent(t):
    """So that hasattr, copy and pickle work as for any other object."""
    for thing in (t.lens, t.adapter, t.att):
        assert not hasattr(thing, "no_such_name")
        assert not hasattr(thing, "__no_such_name__")
        assert getattr(thing, "_no_such_name", None) is None


def test_wrong_arguments_are_a_type_error():
    assert issubclass(ll.errors.CallError, TypeError)


# --- a result reads as its table


def test_every_result_reads_as_its_table():
    seen = 0
    for result in every_result():
        if isinstance(result, Explanations):  # a sequence of explanations
            continue
        frame = result.to_frame()
        again = pd.DataFrame(result)
        assert len(result) == len(frame)
        assert bool(result)
        assert list(again) == list(frame)
        # Where nothing stands, a column of the table has None, and of the rows NaN.
        assert again.astype(object).fillna("").equals(frame.astype(object).fillna(""))
        seen += 1
    assert seen > 40


# --- what the tables name is there


def _named_calls() -> set[str]:
    tables = (guesses.OF_LENS, guesses.OF_ADAPTER, guesses.OF_RESULT)
    remedies = [remedy for table in tables for remedy in table.values()]
    text = " ".join([*remedies, *(notion.python for notion in VOCABULARY)])
    return set(re.findall(r"\b(?:ll|lens|adapter|result)\.\w+", text))


def test_what_a_remedy_names_is_there(t):
    of = {"ll": [ll], "lens": [t.lens], "adapter": [t.adapter]}
    of["result"] = [*every_result(), t.att]
    calls = _named_calls()
    assert len(calls) > 30
    for call in calls:
        owner, name = call.split(".")
        assert any(name in dir(each) for each in of[owner]), call


def test_no_remedy_is_for_a_name_that_is_there(t):
    for name in guesses.OF_LENS:
        assert name not in dir(t.lens), name
    for name in guesses.OF_ADAPTER:
        assert name not in dir(t.adapter), name


def test_the_options_that_a_remedy_names_are_there():
    names: set[str] = set()
    for command in typer.main.get_command(cli.app).commands.values():
        for parameter in command.params:
            names.update([*parameter.opts, *parameter.secondary_opts])
    text = " ".join(f"{notion.python} {notion.shell}" for notion in VOCABULARY)
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert len(named) > 10 and named <= names, named - names
