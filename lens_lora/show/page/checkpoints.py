"""A training as one self-contained page."""

from __future__ import annotations

from lens_lora.results.checkpoints import Checkpoints
from lens_lora.show.page.parts import Part, Section, Table
from lens_lora.show.page.render import page_html, plot
from lens_lora.show.page.sections import provenance
from lens_lora.show.tables.checkpoints import checkpoints_heads, checkpoints_rows
from lens_lora.show.text import short_prompt
from lens_lora.show.words.checkpoints import checkpoints_story

__all__ = ["checkpoints_report"]


def checkpoints_report(found: Checkpoints) -> str:
    """The page of a training, as a string.

    Args:
        found: a training.
    """
    numbers = Table(checkpoints_heads(found), checkpoints_rows(found), texts=(1,))
    sections = [
        Section("Through the training", [plot(found.plot())]),
        Section("Which layers move when", [plot(found.plot_modules("moved", "layer"))]),
        Section("Which kinds of module move when", [plot(found.plot_modules("moved", "kind"))]),
        Section("First order by layer", [plot(found.plot_modules("effect", "layer"))]),
        Section("The numbers", [numbers]),
        Section("Made with", [provenance(found.meta)]),
    ]
    prompts = "; ".join(f"“{short_prompt(tokens)}”" for tokens in found.str_tokens)
    subtitle = f"{found.readout} · {prompts}"
    part = Part("training", subtitle, checkpoints_story(found).split("\n"), sections)
    return page_html(f"{len(found.steps)} checkpoints of {found.meta['adapter']}", [part])
