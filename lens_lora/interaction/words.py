"""The words of an interaction of adapters."""

from __future__ import annotations

from lens_lora.core import SIGMAS, drawing
from lens_lora.interaction.together import Together
from lens_lora.show.text import signed


@drawing.story.register(Together)
def together_story(result: Together, prompt: int | None = None) -> str:
    """Say what each adapter does alone, what they do together, and between which modules."""
    index = result.only_prompt(prompt, "stories")
    alone: list[str] = []
    for name, value in zip(result.adapters, result.alone[index].tolist(), strict=True):
        alone.append(f"{name} {signed(value)}")
    shift = float(result.shift[index])
    total = float(result.total[index])
    sentences = [
        f"Alone: {', '.join(alone)} {result.units}. Together: {signed(shift)}, "
        f"{signed(total)} beyond the sum of what each does alone."
    ]
    floor = SIGMAS * float(result.noise_floor[index])
    if abs(total) <= floor:
        sentences.append("That is within rounding: the adapters do not interact on this prompt.")
    if result.parts is not None:
        sentences.append(_where(result, index))
    return " ".join(sentences)


@drawing.body.register(Together)
def together_body(result: Together) -> str:
    """The story of a single prompt, and the largest entries."""
    table = result.top(5).to_string()
    if len(result.base) > 1:
        return table
    return f"{together_story(result)}\n{table}"


def _where(result: Together, index: int) -> str:
    """Name the pair of groups of modules with the largest part, and say what the parts miss."""
    largest = result.top(1, index).iloc[0]
    where = (
        f"The largest part, {signed(largest['value'])}, is between "
        f"{largest['group_a']} of {largest['adapter_a']} and "
        f"{largest['group_b']} of {largest['adapter_b']}."
    )
    if bool(result.is_complete[index].all()):
        return where
    missed = float(result.completeness_error[index].max())
    assert result.group_error is not None, "groups were compared with their shares"
    of_group = float(result.group_error[index].max())
    return (
        f"{where} The parts miss up to {missed:.2g} {result.units} of an interaction, and up to "
        f"{of_group:.2g} of what one group has of it, so they are an indication: more nodes may "
        "help (max_nodes=)."
    )
