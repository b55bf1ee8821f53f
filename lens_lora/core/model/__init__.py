"""The adapter meets the hooked model here: sites, their maps z → δ(z), hooks and gates, the lens.

To read it, begin at the top:

    sites, adapted_modules          an adapter's modules as sites of a model
    updates                         what each site adds, in the Hugging Face basis
    basis, gauge, value_constants   the same in the basis of the model, as a map z → δ(z)
    host                            what is asked of a hooked model
    hooked_host, own_parameters,    what each class of hooked models answers in its own way
      modules, lengths
    base_parameters, bases,         what follows for both: the base, and a site's basis
      site_basis
    hooked_transformer, bridge,     TransformerLens's two classes of hooked models
      bridge_components,
      bridge_points, bridge_cache,
      bridge_gated_mlp, find_host
    plan                            where each site reads and writes, and what
    injections, hooks, locks        the hooks that do it
    gates, adapted_model            the model at any gates, and the blocks with hooks on
    lens                            LoraLens: the same, asked with prompts: f(ε)
    public_call, passes, points,    what a public call may rely on, and what it may be asked of
      unembedding, tokenizers
    check, watch, running,          whether the model can be trusted
      precision
    extensions                      what other folders register
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
