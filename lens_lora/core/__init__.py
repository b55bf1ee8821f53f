"""The note: an adapter over a hooked model, as one function g(ε) of its gates.

This page is the order in which to read the core, for someone who knows PyTorch and the note
(arXiv 2604.20313). What is not named here serves one of these files, and can be left for later. The
names that other folders use stand in `__init__.pyi`, the door, in the same order.

1. The adapter: ΔW_l = s_l B_l A_l of each module.

       adapter/factors.py              `LoRAFactors`, ΔW = s B A, kept as factors; `TrainedModule`
       adapter/adapter.py              `Adapter`, an update for each module; chosen, scaled, added
       adapter/peft_read.py            how PEFT's files become these, s = α/r or α/√r among them

2. What is asked: u_y, the readout.

       readout/prompts.py              tokens, and the positions that are read
       readout/reading.py              g = u_yᵀ f: the rows that are run, and how g is read of them
       readout/readout.py              `Logit`, `LogProb`, `Margin`: from tokens to a reading

3. Sites: W_l z_l + ε_l ΔW_l z_l, with z_l live.

       model/sites.py                  a site: where one adapted map reads z_l and writes
       model/basis.py                  δz_l = ΔW_l z_l in the hooked model's basis (norms folded,
                                       writing weights centred): δ(z) = s B'(A'z + a₀)
       model/value_constants.py        the one term that is added elsewhere than at its own site
       model/plan.py                   the sites, maps and places of one lens
       model/injections.py             the hooks that add ε_l δz_l in a forward pass
       model/adapted_model.py          a hooked model with its sites: gates, and hooks at them
       model/lens.py                   `LoraLens`: such a model, asked with prompts
       model/host.py                   what is asked of a hooked model; `bridge.py` and
                                       `hooked_transformer.py` are the two that answer

4. The function g(ε) = readout(f(ε)).

       function/function.py            `Function`: every quantity of the note as a method
       function/forward.py             f(ε) and g(ε): one forward pass
       function/corners.py             points of the cube [0, 1]^S: g(0), g(1), g(e_l), g(1 − e_l)
       function/reverse.py             a_l = u_yᵀ J_{l→L} δz_l = ∂g/∂ε_l (Prop. 1): one way back
       function/contraction.py         the same split by position, head and rank
       function/tangents.py            J δz by dual numbers, the other route to Prop. 1
       function/gate_graph.py          H v, H_lm = ∂²g/∂ε_l∂ε_m (§6, item 4)
       function/noise.py, rounding.py  σ, what rounding alone makes of each of these numbers
       function/cache.py               `Evaluations`: the same function with a memory

   How much runs at once (`memory.py`, `footprint.py`, `rerun.py`) and what is run once for many
   points (`tree.py`, `many_gates.py`) changes no number but by rounding.

5. The note's own analyses, each a function of g with a result (`results/base.py`).

       analyses/first_order.py         a_l at 0 and at 1 (Prop. 1), and its parts
       analyses/components.py          ‖δz_l‖ · ‖Jᵀu_y‖ · cos, and the gain (§3)
       analyses/remainder.py           u_yᵀ r_l = g(e_l) − g(0) − a_l (§3); R_y, where
                                       g(1) − g(0) = Σ a_l + R_y (§4), and its order in ε
                                       (Assumption 2)
       analyses/margin.py              m = m₀ + Σ (u_doc − u_pre)ᵀ J δz_l + R_m, and its sign (§5)
       analyses/patching.py            the corners themselves: a site added, or left out
       analyses/activation_patching.py activations set to those of the other model

What is beyond the note (an integral along the path, second order by site, edges, nulls, other
adapters and other models) stands in folders of its own, which ask g. What the core itself needs of
them it declares in an `extensions.py` beside the code that calls it; `provided.py` says how.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
