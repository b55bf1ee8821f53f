"""`LoraLens`, whose method `function` is made here.

A lens stands below the engine, and a `Function` above it: the lens has the method and its
signature, and this file tells it what the method returns. Whoever takes `LoraLens` from
`lens_lora` or from `lens_lora.core` has it.
"""

from __future__ import annotations

from lens_lora.core.function.function import function_of
from lens_lora.core.model.lens import LoraLens as LoraLens
from lens_lora.core.model.lens import provide_function

provide_function(function_of)
