"""Find what a LoRA fine-tune changed in a model, which parts of it did that, and how exactly.

    import lens_lora as ll

    adapter = ll.load_adapter("path/or/hub-id")
    lens = ll.LoraLens(model, adapter)          # a HookedTransformer or a TransformerBridge
    ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")

The call for each question, where (…) is (lens, prompts, readout):

    ll.counted_speech(lens), ll.what_changed(lens)      What was it taught?
    ll.explain(lens, prompt, new, old)                  All there is to know about a prompt
    ll.patch_sites(…, how="leave_one_out")              What does each module do? Measured
    ll.first_order(…), by="head", "position", "rank"    An estimate of it, in one pass
    ll.path_attribution(…)                              How is the whole change divided?
    ll.remainder(…), ll.reliability(…)                  Is the estimate right?
    ll.null_test(…)                                     Would a random change do as much?
    ll.fact_margin(lens, prompt, new, old)              At what strength does the answer change?
    ll.patch_activations(…, names), ll.edges(…)         Through which activations, to whom?
    ll.logit_shift(lens, prompt)                        Which tokens does each module promote?
    ll.token_shifts(lens, prompt, response)             Which words of an answer did it change?
    ll.compare_adapters(lens, other)                    Are two adapters the same change?
    ll.sweep(lens, records, out=…)                      Does it hold on hundreds of prompts?
    with lens.applied() as model:                       TransformerLens's own tools on it

The theory is "Formalising the Logit Shift Induced by LoRA" (arXiv 2604.20313).

A name is imported from its module when it is first used, so `import lens_lora` alone loads neither
torch nor transformers.
"""

from __future__ import annotations

import sys

import lazy_loader

from lens_lora import registered
from lens_lora._version import __version__ as __version__
from lens_lora.core import registry

# __init__.pyi lists the public names and the modules that define them. Names that are needed less
# often are found in these two modules: lens_lora.results, lens_lora.errors.
_MODULES = ("errors", "results")
registry.DRAWERS.update(registered.DRAWERS)
registry.PROVIDERS.update(registered.PROVIDERS)
registry.RESULTS.extend(registered.RESULTS)
registry.FORMATS.extend(registered.FORMATS)
_imported, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__: list[str] = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for name in _names if name not in (*_MODULES, "__version__")
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    """The public name, imported from its module at its first use (PEP 562)."""
    if name not in (*__all__, *_MODULES):
        from lens_lora.guesses import FORMER_OF_PACKAGE, present_name

        if name in FORMER_OF_PACKAGE:
            return _imported(present_name("ll", name, FORMER_OF_PACKAGE))
        raise AttributeError(f"module 'lens_lora' has no attribute {name!r}{_meant(name)}")
    if "plotly.io" in sys.modules:
        _give_plotly_the_templates()
    return _imported(name)


def _meant(name: str) -> str:
    """Say what may be meant by a name that the package lacks, as the end of a message."""
    from lens_lora import core, results
    from lens_lora.guesses import nearest_or_meant

    if name in dir(results):
        return f"; it is ll.results.{name}."
    if name in dir(core):
        return f"; the core has it: `from lens_lora.core import {name}`."
    meant = nearest_or_meant(name, __all__)
    # A user who has a lens has imported this module; to import it here would be circular.
    lens = getattr(sys.modules.get("lens_lora.core.model.lens"), "LoraLens", None)
    if lens is not None and name in dir(lens) and not meant.startswith(": "):
        return f"; a lens has it: lens.{name}."
    return meant or "; help(lens_lora) has the call for each question."


def _give_plotly_the_templates() -> None:
    """Register the template "lens_lora" for a user's own figures, if plotly is imported already."""
    from lens_lora.show import go

    go.register_templates()
