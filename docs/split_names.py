"""What the reference shows otherwise than it stands in the source.

1. Docstrings that name several things at once, 'doc, pre: …', as one entry for each.
2. An analysis, `@analysis def verb(g, …)`, with the parameters of its call: lens, prompts, readout
   in place of g, and progress; and max_memory where the decorator says that the call takes it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from griffe import Extension, Object

_SEVERAL = re.compile(r"^ {4}(\w+(?:, \w+)+):(.*(?:\n {5,}.*)*)", re.MULTILINE)
_COMMON = {"lens": "LoraLens", "prompts": "PromptsLike", "readout": "Readout"}


class SplitNames(Extension):
    """Parsers of docstrings take 'base, adapted: …' for one thing of a strange name."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite a docstring before it is parsed, and the parameters of an analysis."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = split_names(obj.docstring.value)
        if isinstance(obj, griffe.Function):
            decorators = [str(decorator.value) for decorator in obj.decorators]
            for decorator in decorators:
                if decorator == "analysis" or decorator.startswith("analysis("):
                    takes_max_memory = "takes_max_memory=True" in decorator
                    obj.parameters = call_parameters(obj.parameters, takes_max_memory)


def call_parameters(own: griffe.Parameters, takes_max_memory: bool) -> griffe.Parameters:
    """(lens, prompts, readout, …, max_memory=None, progress=True), of (g, …)."""
    kinds = griffe.ParameterKind
    common = [
        griffe.Parameter(name, annotation=annotation, kind=kinds.positional_or_keyword)
        for name, annotation in _COMMON.items()
    ]
    max_memory = griffe.Parameter(
        "max_memory", annotation="float | None", kind=kinds.keyword_only, default="None"
    )
    progress = griffe.Parameter(
        "progress", annotation="bool", kind=kinds.keyword_only, default="True"
    )
    added = [max_memory, progress] if takes_max_memory else [progress]
    return griffe.Parameters(*common, *list(own)[1:], *added)


def split_names(docstring: str) -> str:
    """Each name of an entry as an entry with the same text."""
    return _SEVERAL.sub(_entries, docstring)


def _entries(several: re.Match[str]) -> str:
    return "\n".join(f"    {name}:{several[2]}" for name in several[1].split(", "))
