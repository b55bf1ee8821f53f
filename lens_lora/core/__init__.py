"""The note: an adapter over a hooked model, as one function g(ε) of its gates.

This page is the order in which to read the core, for someone who knows PyTorch and the note
(arXiv 2604.20313). The first part takes an afternoon, and from it the rest can be read in any
order; the second part says of every other file when it is needed. The names that other folders use
stand in `__init__.pyi`, the door.

# An afternoon: from ΔW = s B A to the fact margin

1. The adapter: ΔW_l = s_l B_l A_l of each module.

       adapter/factors.py              `LoRAFactors`, ΔW = s B A, kept as factors; `TrainedModule`
                                       may wait

2. What is asked: u_y, the readout.

       readout/prompts.py              tokens, and the positions that are read
       readout/reading.py              g = u_yᵀ f: the rows that are run, and how g is read of them
       readout/readout.py              `Logit`, `LogProb`, `Margin`: from tokens to a reading

3. Sites: W_l z_l + ε_l ΔW_l z_l, with z_l live. A `LoraLens` is a hooked model with its sites. Of
   it the files below use `lens.sites`, `lens.gates(ε)`, `lens.run(prompts)`, and
   `lens.plan.injections`: for each place at which modules write, which they are. Where a model's
   value biases were folded into o, the constant part of v's update passes through ΔW_O as well.
   That term has two gates, ε_v ε_o, and each of the two sites is the other's partner there. It may
   wait.

       model/sites.py                  a site: where one adapted map reads z_l and writes
       model/basis.py                  δz_l = ΔW_l z_l in the hooked model's basis: `SiteMap` is
                                       δ(z) = s B'(A'z + a₀); how folded norms make it may wait
       model/injections.py             the hooks that add ε_l δz_l in a forward pass

4. The function g(ε) = readout(f(ε)).

       function/function.py            `Function`: every quantity of the note as a method
       function/corners.py             points of the cube [0, 1]^S: g(0), g(1), g(e_l), g(1 − e_l)
       function/forward.py             f(ε) and g(ε): one forward pass
       function/reverse.py             a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (Prop. 1): one way back
       function/contraction.py         the same split by position, head and rank
       function/cache.py               `Evaluations`: the same function with a memory. A method of g
                                       asks its file through an evaluator, which changes no number

5. The note's own analyses, each a function of g with a result.

       analyses/first_order.py         a_l at 0 and at 1 (Prop. 1), and its parts
       analyses/remainder.py           u_yᵀ r_l = g(e_l) − g(0) − a_l (§3); R_y, where
                                       g(1) − g(0) = Σ a_l + R_y (§4), and its order in ε
                                       (Assumption 2)
       analyses/margin.py              m = m₀ + Σ (u_doc − u_pre)ᵀ J δz_l + R_m, and its sign (§5);
                                       the noise of its slopes may wait

# When it is needed

More of the note:

    J δz by dual numbers, the other route to Prop. 1
        function/tangents.py, duals.py, forward_mode.py, pulled_back.py
    H v, where H_lm = ∂²g/∂ε_l∂ε_m (§6, item 4)
        function/gate_graph.py
    σ, what rounding alone makes of each of these numbers
        function/noise.py, rounding.py
    ‖δz_l‖ · ‖Jᵀu_y‖ · cos, and the gain (§3)
        analyses/components.py
    how good first order is, and at which ε a margin changes its sign
        analyses/verdict.py, flips.py
    the corners themselves: a site added, or left out
        analyses/patching.py
    first order of several readouts through one graph, and the calls of `first_order` for type
    checkers
        analyses/readouts_together.py, first_order_types.py

What other folders ask of g:

    `@analysis`, and passes over the same rows under hooks of one's own, `g.passes`
        analyses/own_analyses.py, function/own_passes.py, recording.py
    activations set to those of the other model; δz_l replaced by a mean, or by that of another text
        analyses/activation_patching.py, function/interventions.py, activations.py

How an adapter is read:

    an update for each module; chosen, scaled, added
        adapter/adapter.py
    what a folder is, and which function reads it
        adapter/loading.py, formats.py
    how PEFT's files become updates, s = α/r or α/√r among them
        adapter/peft_read.py, peft_files.py, peft_keys.py, peft_patterns.py, module_paths.py
    what was trained whole, a bias, a dense ΔW
        adapter/peft_trained.py, constants.py, dense.py
    what is refused, with its remedy
        adapter/peft_variants.py

How a prompt is read, and a readout of one's own is made:

    from what a caller gives to ids
        readout/tokenising.py, texts.py, conversations.py, tokens.py
    which tokens are meant, and which count once
        readout/positions.py, beginnings.py
    answers of several tokens, and what a model itself said
        readout/responses.py
    `@readout`
        readout/declared.py

How the model is made ready, and guarded:

    `LoraLens`: a hooked model with its sites, asked with prompts
        model/lens.py, adapted_model.py
    the sites, maps and places of one lens
        model/plan.py, updates.py, adapted_modules.py, value_constants.py
    what a caller gives it, or is told
        model/gates.py, gauge.py, points.py, description.py
    what is asked of a hooked model, and the two that answer
        model/host.py, hooked_host.py, own_parameters.py, base_parameters.py, bases.py,
        site_basis.py, hooked_transformer.py, bridge.py, bridge_components.py, bridge_points.py,
        bridge_gated_mlp.py, bridge_cache.py, find_host.py, modules.py
    one forward pass of it
        model/hooks.py, passes.py, prompt_pass.py, lengths.py, unembedding.py
    what a call is protected from, and what is refused
        model/public_call.py, locks.py, check.py, running.py, watch.py, precision.py, tokenizers.py

How much runs at once, which changes no number but by rounding:

    between a method of g and its passes
        function/binding.py, evaluator.py, remembering.py, exclusive.py
    what fits into `max_memory`
        function/memory.py, footprint.py, planned.py, rerun.py
    many points, or many readouts, at the cost of few passes
        function/many_gates.py, tree.py, logits.py, slopes_at_points.py, modes.py

Results:

    what a result holds
        results/base.py, attribution.py, effects.py, labelled.py
    its check, table, file, figure and words
        results/axes.py, tables.py, storage.py, drawing.py, signs.py, keys.py

What is beyond the note (an integral along the path, second order by site, edges, nulls, other
adapters and other models) stands in folders of its own, which ask g. What the core itself needs of
them it declares in an `extensions.py` beside the code that calls it: `provided.py` says how, and
`registry.py` which modules provide it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
