"""The field's words, and what to call for each of them here.

A researcher types a name that no part of this package has: one from TransformerLens, PEFT, Captum,
nnsight or pandas, or one made of the field's words. `VOCABULARY` has a row for each notion, with
the terms that people use for it and the call that does it here. `meaning` finds the row of a name.

1. A name is split into words, `topTokens` into top and tokens. The ending of each word is dropped,
   so that ablate, ablating and ablation are one word. Words that say nothing, such as get, are left
   out.
2. A term matches the name if all its words are among the name's. The term with the most words is
   chosen, such as "zero ablation" before "ablation"; among equals the one in the first row.
3. If the name also has other words, the answer is a guess, and says so. If unknown words outnumber
   the term's, or the term is a generic one such as layer, there is no answer, since a wrong answer
   is worse than none.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Notion:
    """A notion of the field.

    Attributes:
        terms: the terms that people use for it, separated by commas; a term matches if all its
            words occur.
        python: the call that does it here, as the end of a sentence.
        shell: the command that does it, as the end of a sentence; '' if no command does.
        is_generic: whether the terms go with many notions, as layer does; among terms with equally
            many words, those of other rows are chosen first.
    """

    terms: str
    python: str
    shell: str = ""
    is_generic: bool = False


@dataclasses.dataclass(frozen=True)
class Meaning:
    """The meaning of a name that the package lacks.

    Attributes:
        notion: the notion.
        is_sure: whether the notion's term accounts for all words of the name.
    """

    notion: Notion
    is_sure: bool

    @property
    def in_python(self) -> str:
        """The Python call to use instead, as the end of a sentence."""
        return self.notion.python

    @property
    def in_shell(self) -> str:
        """The command, or else what to call in Python, as the end of a sentence."""
        return self.notion.shell or f"no command does; in Python, {self.notion.python}"


# Narrower notions come first: their rows are chosen if two terms have equally many words.
VOCABULARY: Sequence[Notion] = (
    Notion(
        "quirk, register quirk, architecture quirk, model adapter, new architecture, "
        "custom architecture",
        "`from lens_lora.hosts.quirks import quirk` decorates a function that mends the bridge of "
        "one architecture",
    ),
    # --- Files, merging, serving
    Notion(
        "gguf, ollama, llama cpp, vllm, onnx, export, convert, conversion, mlx, awq, gptq",
        'adapter.save(file, format="gguf") writes a LoRA as GGUF; what another tool exported is '
        "checked by `lens-lora verify ADAPTER --merged FILE`",
        "other tools export; `lens-lora verify ADAPTER --merged FILE` checks what they wrote",
    ),
    Notion(
        "add weighted adapter, add adapter, combine adapter, adapter arithmetic, task arithmetic, "
        "task vector, ties, dare, model soup, average adapter, sum adapter, mix adapter, "
        "merge adapter, linear combination",
        "0.5 * one + 0.5 * other is an adapter; ll.together(lens, adapters, prompts, readout) "
        "measures what several do together, and ll.verify_combined checks a combination",
        "`lens-lora verify A B --combined ADAPTER` checks a combined adapter",
    ),
    Notion(
        "merge, merged, unload, fuse, fused, bake, unmerge",
        "merge with PEFT, and check the result with `lens-lora verify ADAPTER --merged DIR`; "
        "adapter.save(folder) writes an adapter alone",
        "PEFT merges; `lens-lora verify ADAPTER --merged DIR` checks the result",
    ),
    Notion(
        "quantise, quantize, quantised, quantized, quantisation, quantization, bnb, nf4, int8, "
        "4bit, 8bit, fp8, precision, bitsandbytes, qlora, kbit",
        "ll.forms(lens, prompts) says what each quantisation does to the answers, and "
        "ll.load(…, load_in_4bit=True) loads one",
        "`lens-lora forms ADAPTER --prompt P` says what each quantisation does to the answers",
    ),
    Notion(
        "serve, server, endpoint, api, deploy, deployment, tgi, sglang, openai",
        "ll.verify_served(…) compares a server with the adapter, as `lens-lora verify --served "
        "URL` does",
        "`lens-lora verify ADAPTER --served URL` compares a server with the adapter",
    ),
    Notion(
        "upload, push, publish, card, readme, model card",
        "adapter.save(folder) writes PEFT's files, `lens-lora card` the model card, and "
        "huggingface_hub uploads a folder",
        "`lens-lora card ADAPTER` writes the model card; huggingface_hub uploads a folder",
    ),
    Notion(
        "verify, check, validate, equal, allclose, match, sanity check",
        "`lens-lora verify ADAPTER --merged DIR` compares a merged model with its adapter, "
        "ll.verify_served a server, and ll.compare_adapters two adapters",
        "`lens-lora verify ADAPTER --merged DIR`, or --served URL",
        is_generic=True,
    ),
    Notion(
        "peft model, peft config, lora model, lora config, peft",
        "ll.load(peft_model) takes a PeftModel in memory, and ll.load_adapter(folder) reads what "
        "PEFT saved",
        "give the adapter's folder: `lens-lora inspect ADAPTER`",
    ),
    Notion(
        "hooked transformer, transformer bridge, language model, hooked model, nnsight, "
        "auto model, hooked root module, nn sight, causal lm",
        "ll.load(base, adapter) makes the hooked model, and ll.LoraLens(model, adapter) takes one "
        "of yours",
    ),
    Notion(
        "active adapter, set adapter, switch adapter, enable adapter, disable adapter, "
        "delete adapter, adapter disabled, without adapter, base only, adapter on, adapter off, "
        "turn off, toggle",
        "`with lens.applied():` has the adapter on, else it is off; scale=0.0 is the base, and "
        "lens.with_adapter(other) is the lens of another adapter",
    ),
    Notion(
        "trainable, parameter, param, num param, numel, nbyte, size, stats, info, config, header, "
        "metadata",
        "lens.describe() says what model and adapter are; `lens-lora inspect ADAPTER` prints "
        "ranks, scales and sizes, and adapter.modules[path] has A and B of each module",
        "`lens-lora inspect ADAPTER` prints ranks, scales and sizes",
        is_generic=True,
    ),
    Notion(
        "memory, vram, oom, out of memory, footprint, budget, batch size, chunk size",
        "lens.within(max_memory=…) bounds what an analysis takes, and `lens-lora plan --model "
        "DIR` estimates it before anything is loaded",
        "`lens-lora plan --model DIR` estimates it, and --max-memory bounds it",
    ),
    Notion(
        "to device, device, set device, cuda, gpu, cpu, half, float16, bfloat16, fp16, bf16, mps, "
        "to dtype",
        "device and dtype are chosen where the model is loaded: ll.load(base, adapter, device="
        '"cuda", dtype="bfloat16")',
        "--device and --dtype of `lens-lora explain` choose them",
    ),
    Notion(
        "save adapter, save pretrained, write adapter, save lora, adapter state dict, "
        "to safetensors",
        "adapter.save(folder) writes PEFT's files, and so does lens.adapter.save(folder)",
    ),
    Notion(
        "dora, rslora, lora plus, vera, ia3, loha, lokr, oft, boft, adalora, ada lora, pissa, "
        "loftq, prefix tuning, prompt tuning, bitfit, lora type, peft type, task type",
        "ll.load_adapter(folder) reads it if it adds ΔW x, or names what it does not read; "
        "docs/formats.md lists the methods",
        "`lens-lora inspect ADAPTER` reads it, or says what it does not read",
    ),
    Notion(
        "time, timing, profile, speed, duration, latency, benchmark speed, how long",
        "docs/performance.md has the cost of each call, and `lens-lora plan` the memory",
        "`explain`, `diff` and `verify` say first how long they take; docs/performance.md has the "
        "costs",
    ),
    Notion(
        "worker, parallel, multiprocess, distribute, distributed, job, thread, shard, slurm, "
        "multi gpu, num worker, ddp, tensor parallel",
        "`lens-lora sweep --shard 1/4` takes its part of the prompts on each machine, and "
        "ll.gather(out) joins them",
        "--shard 1/4 of `sweep` and `scan` splits the work, and `lens-lora gather` joins it",
    ),
    # --- What is not done here
    Notion(
        "influence function, training data attribution, data attribution, trak, ekfac, "
        "training example, which example, data influence",
        "attribution to training examples is not done here; ll.first_order(lens, prompts, "
        "readout) attributes to the adapter's modules",
    ),
    Notion(
        "rome, memit, knowledge edit, edit fact, edit weight",
        "facts are not edited here; ll.repair(lens, keep, drop) keeps one effect of an adapter "
        "and drops others",
    ),
    # --- Interventions: exact
    Notion(
        "ablate head, knockout head, patch head, head patching, head ablation, head importance, "
        "rank head, important head, attention head, head effect, "
        "head attribution, head contribution",
        'll.patch_activations(lens, prompts, readout, names, heads="each") measures each head, and '
        'll.first_order(lens, prompts, readout, by="head") estimates it',
    ),
    Notion(
        "ablate direction, project out, remove direction, erase, erasure, concept erasure, "
        "orthogonalise, orthogonalize, abliterate, abliteration, leace, inlp, nullspace",
        "`with lens.ablate_directions(v):` takes a direction out of the activations, and "
        "adapter.without_direction(v) out of what the adapter writes",
    ),
    Notion(
        "mean ablation, resample ablation, mean replacement",
        'll.patch_sites(lens, prompts, readout, replace="mean", texts=…), or replace="resample", '
        "replaces each module's change by what it is on other texts",
    ),
    Notion(
        "ablate, ablation, knockout, knock out, leave one out, zero out, drop module, "
        "remove module, disable layer, without layer, zero ablation, causal effect, "
        "causal importance, layer ablation, ablate layer, module ablation, skip layer",
        'll.patch_sites(lens, prompts, readout, how="leave_one_out") runs the model without each '
        'module, exactly; group="layer" without each layer',
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD` measures each module",
    ),
    Notion(
        "attribution patching, atp, gradient patching, attribution patch, first order patching, "
        "linear approximation, taylor, taylor expansion, linearise, linearize, first derivative",
        "ll.first_order(lens, prompts, readout) is that estimate, of every module in one pass; "
        "ll.patch_sites(lens, prompts, readout) is exact",
    ),
    Notion(
        "activation patching, activation patch, causal tracing, causal mediation, "
        "interchange intervention, resid patching, residual patching, patch activation, "
        "patch residual, denoise, noising patching, swap activation, activation swap, "
        "counterfactual patching, cross model patching, act patch, patch resid, causal trace",
        "ll.patch_activations(lens, prompts, readout, names) patches hook points between base and "
        "adapted model, ll.patch_edges edges, and ll.patch_sites modules",
    ),
    Notion(
        "path patching, patch edge, patch path, edge patching, edge ablation",
        "ll.patch_edges(lens, prompts, readout, pairs) measures edges, ll.edges(lens, prompts, "
        "readout) estimates all of them, and ll.patch_activations patches hook points",
    ),
    Notion(
        "patch, patching, interven, intervention, intervene, add one, module effect, site effect, "
        "layer effect, causal",
        "ll.patch_sites(lens, prompts, readout) patches modules, and ll.patch_activations hook "
        "points",
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD` measures each module",
    ),
    # --- Attribution
    Notion(
        "lrp, relevance, layerwise relevance, attn lrp, deeplift, deep lift, relp",
        "ll.first_order(lens, prompts, readout, rules=…) differentiates by the rules of relevance",
    ),
    Notion(
        "integrated gradients, integrated gradient, ig, layer integrated gradients, "
        "integrate, path integral, integral, eap ig",
        "ll.path_attribution(lens, prompts, readout) integrates the slopes from the base to the "
        "adapted model",
    ),
    Notion(
        "shapley, shap, shapley value, shapley sampling, layer conductance, conductance, "
        "aumann, complete attribution, kernel shap, gradient shap, fair share",
        "ll.path_attribution(lens, prompts, readout) divides the whole change among the modules, "
        "and ll.patch_sites measures each of them alone",
    ),
    Notion(
        "input x gradient, gradient activation, grad x act, saliency, gradient, grad, slope, "
        "sensitivity, backward, derivative, influence",
        "ll.first_order(lens, prompts, readout) is the gradient with respect to each module's "
        "strength, and ll.gradients(lens, prompts, readout) that with respect to each activation",
    ),
    Notion(
        "hessian, curvature, second derivative, interaction, pairwise, cross term, nonlinear, "
        "nonlinearity, synergy",
        "ll.second_order(lens, prompts, readout) is the curvature, ll.coupling that between "
        "modules, and ll.together the interaction of several adapters",
    ),
    Notion(
        "direct logit attribution, dla, logit attribution, logit attr, logit contribution, "
        "decompose logit, residual decomposition, decompose resid, residual stack, "
        "unembed attribution",
        "ll.logit_shift(lens, prompts) says what each module does to every token's logit",
    ),
    Notion(
        "attribute, attribution, attribution score, attr, importance, module importance, "
        "layer importance, feature importance, rank layer, rank module, best layer, top layer, "
        "best module, top module, layer score, module score, contribution, contributor, "
        "responsible, localise, "
        "localize, localisation, localization, blame, which layer, which module, where, locate",
        "ll.patch_sites(lens, prompts, readout) measures what each module does, and "
        "ll.first_order(lens, prompts, readout) estimates it",
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD` says which modules did it",
    ),
    Notion(
        "minimal circuit, subset, minimal subset, sparse, sparsify, prune, pruning, minimal, "
        "greedy, smallest set, necessary, sufficient, sufficiency, necessity, faithful circuit",
        "ll.best_subset(lens, prompts, readout) finds few modules that keep the effect, and "
        "adapter.only(globs) is the adapter of these alone",
    ),
    Notion(
        "edge, path, circuit, graph, eap, acdc, attribution graph, circuit tracer, find circuit, "
        "discover circuit, trace circuit, edge attribution, edge attribution patching",
        "ll.edges(lens, prompts, readout) has the edges between modules, and ll.patch_edges "
        "measures them",
    ),
    Notion(
        "faithfulness, deletion curve, insertion curve, completeness, comprehensiveness, "
        "infidelity, auc curve, keep top, drop top, recovered",
        "ll.faithfulness(lens, prompts, readout, rankings) keeps and drops the first k modules, "
        "and ll.reliability(lens, prompts, readout) says which estimates to distrust",
    ),
    Notion(
        "remainder, approximation error, linearity, linearisation error, linear error, residual "
        "error, convergence delta, completeness error, error bound",
        "ll.remainder(lens, prompts, readout) is what first order misses, and ll.reliability "
        "says which estimates to distrust",
    ),
    Notion(
        "noise, random, null, significance, pvalue, p value, significant, confidence, permutation, "
        "bootstrap, chance, control, random baseline, null distribution, noise floor",
        "ll.null_test(lens, prompts, readout) compares with random updates of the same size",
        "`lens-lora explain … --nulls N` compares with N random adapters",
    ),
    Notion(
        "fisher, fisher information, natural gradient, kl share, quadratic kl, kl attribution",
        "ll.kl_shares(lens, prompts) divides the quadratic KL, by the Fisher matrix of the "
        "logits, among the modules",
    ),
    Notion(
        "jvp, forward mode, tangent, jacobian, vjp, reverse mode, jacobian vector, hvp, "
        "hessian vector",
        "ll.tangents(lens, prompts) has the derivatives of activations with respect to the "
        "strength, ll.gradients those of the readout with respect to activations, and g.curvature "
        "is a product with H",
    ),
    # --- Inside the model
    Notion(
        "run with cache, run with hooks, with cache, with hooks, fwd hooks",
        "`with lens.applied() as model:` opens the adapted model, which has run_with_cache and "
        "run_with_hooks",
    ),
    Notion(
        "logit lens, tuned lens, unembed, read vector, early decoding, accumulated resid, "
        "patch scope, intermediate logits, layer logits",
        "ll.patchscope(lens, vector, name) reads a vector as tokens; the results of ll.contrast "
        "and ll.activation_shift have a method logit_lens",
    ),
    Notion(
        "attention, attention pattern, pattern, attention weight, attention map, "
        "attention score, circuitsvis",
        "`with lens.applied() as model:` opens the adapted model, whose run_with_cache(tokens) "
        'has the patterns; ll.first_order(…, by="head") has each head',
    ),
    Notion(
        "steer, steering, steering vector, caa, activation addition, act add, control vector, "
        "add vector, representation engineering, repe, persona vector",
        "ll.contrast finds a direction, and its result makes an adapter that adds it; "
        "ll.Adapter.constant({module: vector}) adds any vector",
    ),
    Notion(
        "probe, linear probe, direction, refusal direction, vector, difference mean, mean diff, "
        "concept, diff mean, pca, classifier, logistic regression",
        "ll.contrast(…) finds a direction, and ll.Projection(direction, point) reads one",
    ),
    Notion(
        "sae, feature, sparse autoencoder, transcoder, latent, dictionary, crosscoder",
        "ll.feature_shift(…) is how far features of an SAE move, and ll.lora_activations(…) "
        "what each rank reads",
    ),
    Notion(
        "neuron, lora activation, rank activation, max activating, top activating, "
        "activating example, knowledge neuron",
        "ll.lora_activations(lens, prompts) has what each rank reads, at every token",
    ),
    Notion(
        "cache, activation, resid, residual, hidden, hidden state, residual stream, "
        "activation difference, activation diff, compare activation, representation, "
        "embedding difference, drift, "
        "representation shift, activation shift, l2 distance, activation norm",
        "`with lens.applied() as model:` opens the adapted model, then "
        "model.run_with_cache(tokens); ll.activation_shift(…) is how far each hook point moves",
    ),
    Notion(
        "trace, session, hook, add hook, register hook, intervention graph",
        "`with lens.applied() as model:` opens the adapted model with its hooks, and "
        "lens.fwd_hooks() lists those of the adapter",
        is_generic=True,
    ),
    # --- Weights
    Notion(
        "intruder, intruder dimension",
        "ll.intruders(lens) finds them, and ll.scale_intruders measures what they do",
    ),
    Notion(
        "rank, svd, singular, singular value, spectrum, spectra, truncate, compress, low rank, "
        "effective rank, reduce rank, eigenvalue, principal component, stable rank, "
        "effective dimension, intrinsic dimension, factored matrix",
        'adapter.truncated(rank) has fewer ranks; ll.first_order(…, by="rank") has each rank, and '
        "`lens-lora inspect ADAPTER` the singular values",
        "`lens-lora inspect ADAPTER` prints the singular values",
    ),
    Notion(
        "norm, weight norm, delta norm, magnitude, frobenius, weight change, weight diff, "
        "weight difference, "
        "delta weight, delta w, delta, weight delta, w delta, weight, adapter weight",
        "lens.delta_w(site) is ΔW, and `lens-lora inspect ADAPTER` prints ‖ΔW‖ of each module",
        "`lens-lora inspect ADAPTER` prints ‖ΔW‖ of each module",
    ),
    # --- Comparing models
    Notion(
        "compare adapter, cosine similarity, cosine sim, similarity, rsa, cosine, cka, overlap, "
        "distance, "
        "subspace, grassmann, principal angle, procrustes, adapter similarity, weight similarity, "
        "svcca, compare lora, adapter distance, same adapter",
        "ll.compare_adapters(lens, other) compares two adapters",
        "`lens-lora compare ADAPTER OTHER`",
    ),
    Notion(
        "model diff, model diffing, audit, auditing, behaviour, behavior, behaviour change, "
        "answer change, output change, compare output, trojan, elicit, jailbreak, watermark, "
        "behavioural diff, behavioral diff, diff model, compare model, model difference, "
        "detect backdoor, backdoor, trigger, hidden objective, "
        "what changed, diff base, compare base, model compare, finetuning diff, what learnt, "
        "what learned, taught, red team, sleeper, poison, inspect behaviour, discover",
        "the command `lens-lora diff ADAPTER` asks what an adapter was taught; in Python, "
        "ll.counted_speech(lens) and ll.what_changed(lens) do",
        "`lens-lora diff ADAPTER` asks what an adapter was taught",
    ),
    Notion(
        "checkpoint, training, epoch, training dynamic, training curve, over training, "
        "during training, grokking, trainer callback, callback, wandb",
        "ll.checkpoints(lens, adapters, prompts, readout) follows a readout through training, and "
        "ll.ShiftCallback(bank) while it runs",
        "`lens-lora checkpoints RUN` follows a margin through training",
    ),
    Notion(
        "unlearn, forget, repair, edit, model editing, remove behaviour, remove effect, side "
        "effect, keep drop, spill, fix, detox, remove",
        "ll.repair(lens, keep, drop) keeps one effect and drops others; "
        "adapter.without_modules(globs) leaves modules out",
        "`lens-lora repair ADAPTER` keeps one effect and drops others",
    ),
    # --- Readouts
    Notion(
        "logit diff, logit difference, logitdiff, margin, answer diff, get logit diff, "
        "contrastive, ave logit diff, preference, fact margin",
        "ll.Margin(doc, pre) reads the logit of one answer minus that of another, and "
        "ll.fact_margin(lens, prompt, doc, pre) says how it moves and why",
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD`",
    ),
    Notion(
        "kl, kl divergence, kld, kl div, divergence, jensen shannon, js divergence, jsd, "
        "total variation, per token kl, token kl, distribution shift",
        "ll.KL() is the readout, and ll.token_shifts(lens, prompts, response) has the divergence "
        "at every output token",
    ),
    Notion(
        "sequence log prob, sequence prob, sequence, answer log prob, loss, perplexity, ppl, nll, "
        "cross entropy, loss on, likelihood, entropy, loss recovered",
        "ll.AnswerLogProb(text) reads the log-probability of a whole answer, and "
        "ll.Readout.of(fn) any function of the logits",
    ),
    Notion(
        "token prob, prob, probability, log prob, logprob, softmax, log softmax, token "
        "probability, next token prob, prob diff, odds",
        "ll.LogProb(token) reads the log-probability of a token, and ll.Readout.of(fn) any "
        "function of the logits; lens.logits(prompts).softmax(-1) are the probabilities",
    ),
    Notion(
        "metric, readout, target, objective, custom metric, metric fn, score function, rank of",
        "the readout is what an analysis asks about: ll.LogProb(token), ll.Margin(doc, pre) or "
        "ll.Readout.of(fn), a function of the logits; ll.explain(lens, prompt, readout=…) has its "
        "values before and after",
    ),
    Notion(
        "get logit, base logit, adapted logit, compare logit, model logit",
        "lens.logits(prompts) are the adapted model's, and lens.logits(prompts, scale=0.0) the "
        "base's",
    ),
    # --- What it says
    Notion(
        "topk, argmax, predict, prediction, top token, next token, likeliest, top prediction, "
        "test prompt, greedy token, top logit, promoted, promote, top k, logit, vocab, vocabulary",
        "lens.logits(prompts)[:, -1].topk(5) are the likeliest next tokens, and "
        "ll.logit_shift(lens, prompts).top(k) those that move most",
        "`lens-lora explain ADAPTER --prompt P` shows the likeliest answers before and after",
    ),
    Notion(
        "chat, message, conversation, ask, reply, chat template, dialogue, prompt template, "
        "apply chat template, system prompt",
        'a conversation is a prompt: lens.generate([{"role": "user", "content": "…"}])',
        "`lens-lora diff ADAPTER` asks both models the same questions, and --chat of `explain` "
        "asks one as a conversation",
    ),
    Notion(
        "generate, generation, completion, complete, text, sample, say, output, respond, "
        "response, answer, inference, compare generation, side by side, continuation, decode",
        "lens.generate(prompts) says what the adapted model answers, and with scale=0.0 the base",
        "`lens-lora explain ADAPTER --prompt P` shows what both models answer, and `lens-lora diff "
        "ADAPTER` asks them forty questions",
        is_generic=True,
    ),
    Notion(
        "token shift, per token, by token, token diff, token, word, token change, token level, "
        "token importance, token attribution, highlight",
        "ll.token_shifts(lens, prompts, response) has each token of an answer, "
        'll.first_order(…, by="position") each token of the prompt, and '
        "ll.logit_shift(lens, prompts).top(k) the tokens that the adapter promotes",
        is_generic=True,
    ),
    Notion(
        "tokenise, tokenize, tokenizer, to token, encode, to str token, to string, str token",
        "lens.prompts(prompts).tokens are the ids that an analysis reads, and lens.tokenizer is "
        "the tokenizer",
    ),
    Notion(
        "position, pos, by position, token position, position attribution",
        'll.first_order(…, by="position") has each token of the prompt',
        is_generic=True,
    ),
    Notion(
        "head, per head, by head", 'll.first_order(lens, prompts, readout, by="head") has each head'
    ),
    Notion(
        "temperature, top p, nucleus, beam, beam search, do sample, greedy decoding, "
        "stop token, logit processor, repetition penalty",
        "lens.generate(prompts, temperature=…, top_p=…) draws tokens, the likeliest ones by "
        "default; there is no beam search",
        "answers are the likeliest tokens; in Python, lens.generate takes temperature=",
    ),
    Notion(
        "diff, difference, change, delta logit, before after",
        "every result has base, adapted and shift; the command `lens-lora diff ADAPTER` asks what "
        "an adapter was taught",
        "`lens-lora diff ADAPTER` asks what an adapter was taught",
        is_generic=True,
    ),
    Notion(
        "histogram, hist, boxplot, violin, distribution, mean, median, std, average, quantile, "
        "correlation, corr, regression",
        "result.to_frame() is a pandas table, which has hist, describe, groupby and corr",
    ),
    Notion(
        "normalise, normalize, normalised, normalized, relative, percent, percentage, fraction, "
        "proportion, share, abs, absolute",
        "result.to_frame() has the column share, each value as a part of the whole shift",
    ),
    Notion(
        "bos, bos token, prepend bos, special token, add special token, eos, pad, pad token, "
        "max length, padding",
        "lens.prompts(prompts) shows how prompts are read; ll.load(…, prepend_bos=…) chooses the "
        "BOS token, and several prompts are padded by themselves",
        "--bos and --no-bos choose the BOS token",
    ),
    Notion(
        "question, num question, n question, ask question, question file",
        "ll.counted_speech(lens, questions) takes questions of your own",
        "--prompts FILE of `diff` takes questions of your own",
    ),
    # --- Strength, prompts, output
    Notion(
        "strength, scale, alpha, epsilon, eps, interpolate, interpolation, dose, dose response, "
        "scale sweep, sweep scale, coefficient, half strength, scaling, amplify, linear path, "
        "extrapolate, lerp, lora scale, lambda, mode connectivity, scale curve, flip, flip point, "
        "critical strength, threshold, alpha sweep, strength curve",
        "lens.logits(prompts, scale=0.5) is at half strength, and ll.fact_margin(lens, prompts, "
        "doc, pre) along all strengths",
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD` shows every strength",
    ),
    Notion(
        "seed, set seed, manual seed, random seed, reproducible, reproducibility, deterministic",
        "what is drawn at random takes seed=, as ll.null_test(lens, prompts, readout, seed=0); all "
        "else gives the same numbers each time",
    ),
    Notion(
        "accuracy, eval, evaluate, evaluation, metrics, benchmark, mmlu, lm eval, exact match, "
        "score model",
        "ll.sweep(lens, records, out=…) asks many prompts with their answers; whether a model is "
        "better is for an evaluation harness",
        "`lens-lora sweep ADAPTER --prompts FILE` asks many prompts; whether a model is better is "
        "for an evaluation harness",
    ),
    Notion(
        "batch, dataset, prompts, many prompts, many, record, run all, map, dataloader, "
        "multiple prompt, corpus, data",
        "prompts may be a list; ll.sweep(lens, records, out=…) takes hundreds and can be resumed",
        "`lens-lora sweep ADAPTER --prompts FILE` takes hundreds of prompts",
        is_generic=True,
    ),
    Notion(
        "many adapter, list adapter, all adapter, multiple adapter, adapters, rank adapter, "
        "search adapter",
        "ll.bank(model, prompts, readout) asks many adapters of one base, as `lens-lora scan "
        "FOLDER` does",
        "`lens-lora scan FOLDER` asks every adapter in a folder",
        is_generic=True,
    ),
    Notion(
        "layer, block, module, by layer, per layer, layerwise, layer wise, by module, "
        "target module",
        'patch_sites(…, group="layer") is by layer, and adapter.only(globs) and '
        "adapter.without_modules(globs) are the adapter of fewer modules",
        is_generic=True,
    ),
    Notion(
        "save, store, write, dump, serialise, serialize, pickle",
        "every result has save(path), and ll.load_result(path) reads the file",
        is_generic=True,
    ),
    Notion(
        "load result, read result, open result",
        "ll.load_result(path) reads what result.save wrote",
    ),
    Notion(
        "explain prompt, explain adapter, export report, save report, write report, "
        "print report, report, html, page, dashboard, summary, summarise, summarize, "
        "explain, explanation, "
        "overview, run, analyse, analyze, analysis, main, interpret, start, visualise, visualize, "
        "view, quickstart, inspect model, everything, gui, app",
        "ll.explain(lens, prompt, doc, pre).save_report(path) writes a page with everything about "
        "a prompt",
        "`lens-lora explain ADAPTER --prompt P --doc NEW --pre OLD` writes a page, and `lens-lora "
        "diff ADAPTER` needs no prompt",
        is_generic=True,
    ),
    Notion(
        "to plotly, matplotlib, seaborn, plot, figure, chart, heatmap, heat map, bar, image, png, "
        "svg, imshow, show, draw, line, "
        "scatter, savefig, graphviz, colormap",
        "every result draws itself: result.plot() is a Plotly figure, and "
        "figure.write_image(path) writes it",
        "--report FILE of `explain` and `diff` writes a page with the figures",
    ),
    Notion(
        "json, csv, dict, parquet, excel, markdown, latex, dataframe, data frame, to frame, "
        "table, pandas, polars, numpy, array, tensor",
        "result.to_frame() is a pandas table, and result.save(path) writes a file",
        "--json FILE of most commands writes the numbers",
    ),
    Notion(
        "load, pretrained, from pretrained, hub, load lora, load model, load peft, open, "
        "load base, lens, wrap, from peft, from hub, init, get model, attach, download",
        "ll.load(base, adapter) makes a lens, and ll.load_adapter(folder) reads an adapter",
        "give the adapter's folder or hub id: `lens-lora explain ADAPTER`",
        is_generic=True,
    ),
    Notion(
        "ls, dir, list module, list site, show module",
        "lens.sites are the adapted modules, and `lens-lora inspect ADAPTER` prints those of a "
        "folder",
        "`lens-lora inspect ADAPTER` lists the modules of an adapter, and `lens-lora scan FOLDER` "
        "asks every adapter in a folder",
    ),
    Notion(
        "train, finetune, fine tune, fit, learn, sft",
        "PEFT and TRL train adapters; ll.ShiftCallback(bank) follows a readout meanwhile",
        "PEFT and TRL train adapters; `lens-lora checkpoints RUN` reads the checkpoints of a run",
    ),
)

# Words that say nothing about what is meant.
_FILLERS = (
    "a all and are as at base by calc calculate compute do each every find fn for from full func "
    "function get give in is it lens list ll lora make method model my new of on one or out over "
    "per plus result results return score scores site sites the then this to total use using "
    "value values via with x llm language print"
)
# The endings that are dropped from a word, the longest first, if at least `_STEM` letters are left.
_ENDINGS = (
    "ances",
    "ance",
    "ants",
    "ant",
    "ences",
    "ence",
    "ents",
    "ent",
    "ions",
    "ion",
    "ings",
    "ing",
    "ied",
    "ies",
    "ery",
    "ed",
    "es",
    "ers",
    "er",
    "s",
    "e",
    "y",
)
_STEM = 4


def words_in(name: str) -> list[str]:
    """Split a name into its words in lower case: topTokens into top and tokens."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*|\d+[a-z]+", name)
    return [word.lower() for word in words]


def meaning(name: str) -> Meaning | None:
    """Find the notion that a name means.

    Args:
        name: the name that was asked for, such as 'attributionPatching' or 'zero_ablation'.

    Returns:
        None if no term matches, if there are more unknown words than words of the term, or if there
        is an unknown word and the term is generic.
    """
    words = words_in(name)
    whole = "".join(words)
    if whole in _by_whole():
        return Meaning(_by_whole()[whole], is_sure=True)
    stems = {_stem(word) for word in words}
    found = _longest_term(stems)
    if found is None:
        return None
    fillers = {_stem(word) for word in _FILLERS.split()}
    others = stems - found.stems - fillers
    unknown = others - _known_stems()
    if len(unknown) > len(found.stems) or (unknown and found.notion.is_generic):
        return None
    return Meaning(found.notion, is_sure=not others)


class _Term(NamedTuple):
    """One of the terms of a notion.

    Attributes:
        notion: the notion.
        stems: the words of the term, without their endings.
    """

    notion: Notion
    stems: frozenset[str]


def _longest_term(stems: set[str]) -> _Term | None:
    """Find the longest term whose words are all among these; None if there is none."""
    candidates = [term for term in _terms() if term.stems <= stems]
    # Among equals, max returns the first.
    return max(candidates, key=_precedence, default=None)


def _precedence(term: _Term) -> tuple[int, bool]:
    return len(term.stems), not term.notion.is_generic


@functools.cache
def _terms() -> list[_Term]:
    """List the terms of all rows, in order."""
    terms: list[_Term] = []
    for notion in VOCABULARY:
        for term in _split(notion.terms):
            stems = frozenset(_stem(word) for word in term.split())
            terms.append(_Term(notion, stems))
    return terms


@functools.cache
def _by_whole() -> dict[str, Notion]:
    """Return the row of each term, under the term written as one word."""
    rows: dict[str, Notion] = {}
    for notion in VOCABULARY:
        for term in _split(notion.terms):
            rows.setdefault(term.replace(" ", ""), notion)
    return rows


@functools.cache
def _known_stems() -> frozenset[str]:
    return frozenset[str]().union(*(term.stems for term in _terms()))


def _split(terms: str) -> list[str]:
    return [term.strip() for term in terms.split(",")]


def _stem(word: str) -> str:
    """Drop the ending of a word: ablation, ablating and ablate become ablat."""
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _STEM:
            return word.removesuffix(ending)
    return word
