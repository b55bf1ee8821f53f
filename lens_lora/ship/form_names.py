"""The names of the forms in which an adapted model may be shipped; imports nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

Form = Literal[
    "bfloat16 + adapter",
    "NF4 + adapter",
    "Q8_0 + adapter",
    "Q4_0 + adapter",
    "Q4_1 + adapter",
    "Q4_K + adapter",
    "merged float32",
    "merged bfloat16",
    "merged NF4",
    "merged Q8_0",
    "merged Q4_0",
    "merged Q4_1",
    "merged Q4_K",
]
FORMS: tuple[Form, ...] = get_args(Form)
