"""The updates that a fine-tune added to modules: plain LoRA as PEFT writes it. Knows no model.

`__init__.pyi` names what `formats/` uses of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
