"""What did this fine-tune change in this model, which parts of it did, and can I trust the answer?

    import lens_lora as ll

    adapter = ll.load_adapter("path/or/hub-id")
    lens = ll.LoraLens(model, adapter)          # a HookedTransformer or a TransformerBridge
    ll.fact_margin(lens, "The capital of France is", " Lyon", " Paris")

The theory is "Formalising the Logit Shift Induced by LoRA" (arXiv 2604.20313).

A name is imported from its module when it is first used, so `import lens_lora` alone loads neither
torch nor transformers.
"""

from __future__ import annotations

import sys

import lazy_loader

from lens_lora import registered
from lens_lora._version import __version__ as __version__
from lens_lora.core import extensions

# Which names there are, and where they live, is written in __init__.pyi. What these two hold is not
# typed every day, and is found in them: lens_lora.results, lens_lora.errors.
_MODULES = "errors", "results"
extensions.DRAWERS.update(registered.DRAWERS)
extensions.PROVIDERS.update(registered.PROVIDERS)
extensions.RESULTS.extend(registered.RESULTS)
extensions.FORMATS.extend(registered.FORMATS)
_imported, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__: list[str] = [  # pyright: ignore[reportUnsupportedDunderAll]
    name for name in _names if name not in (*_MODULES, "__version__")
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    """The public name, imported from its module at its first use (PEP 562)."""
    if name not in (*__all__, *_MODULES):
        from lens_lora.guesses import (
            FORMER_OF_PACKAGE,
            OF_PACKAGE,
            nearest_or_by_word,
            present_name,
        )

        if name in FORMER_OF_PACKAGE:
            return _imported(present_name("ll", name, FORMER_OF_PACKAGE))
        if name in OF_PACKAGE:
            remedy = OF_PACKAGE[name]
            raise AttributeError(f"module 'lens_lora' has no attribute {name!r}: {remedy}.")
        place = _place_of(name)
        meant = nearest_or_by_word(name, __all__) or "; see dir(lens_lora)."
        if place:
            meant = f"; {place}."
        raise AttributeError(f"module 'lens_lora' has no attribute {name!r}{meant}")
    if "plotly.io" in sys.modules:
        _give_plotly_the_templates()
    return _imported(name)


def _place_of(name: str) -> str:
    """Where a name stands that the package has elsewhere, in words; '' of any other name."""
    # Who has a lens has this module; to import it here would be a circle within the package.
    lens = getattr(sys.modules.get("lens_lora.core.model.lens"), "LoraLens", None)
    if lens is not None and hasattr(lens, name):
        return f"a lens has it: lens.{name}"
    from lens_lora import core, results

    if name in dir(results):
        return f"it is ll.results.{name}"
    if name in dir(core):
        return f"the core has it: `from lens_lora.core import {name}`"
    return ""


def _give_plotly_the_templates() -> None:
    """For figures of one's own, `template="lens_lora"`; plotly itself is not imported for it."""
    from lens_lora.show import go

    go.register_templates()
