"""The words and the table of the forms of an adapted model."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.errors import many
from lens_lora.ship.forms import Forms
from lens_lora.show import tables


def size_text(size: int) -> str:
    """A size on disk, such as '76.5 MB'.

    Args:
        size: the size in bytes.
    """
    megabytes = size / 1e6
    return f"{megabytes:,.0f} MB" if megabytes >= 100 else f"{megabytes:.3g} MB"


def forms_table(forms: Forms) -> tables.Table:
    """A row per form: size, KL and changed answers.

    Args:
        forms: what was compared.
    """
    count = len(forms.values)
    largest = forms.values.amax(0).tolist()
    means = forms.values.mean(0).tolist()
    flipped = forms.flipped.sum(0).tolist()
    rows: list[tuple[str, ...]] = []
    for index, name in enumerate(forms.names):
        size = size_text(forms.sizes[index])
        changed = f"{flipped[index]} of {count}"
        rows.append((name, size, f"{means[index]:.3g}", f"{largest[index]:.3g}", changed))
    heads = ("form", "on disk", "KL, mean", "KL, largest", "answers changed")
    return tables.Table(heads, rows, texts=(0,))


@drawing.story.register(Forms)
def forms_story(forms: Forms) -> str:
    """The smallest form that keeps every answer, and what the worst does."""
    means = forms.values.mean(0).tolist()
    flipped = forms.flipped.sum(0).tolist()
    keeping = [index for index, changed in enumerate(flipped) if changed == 0]
    smallest = min(keeping, key=lambda index: forms.sizes[index]) if keeping else None
    worst = max(range(len(means)), key=lambda index: means[index])
    sentences = [_smallest_sentence(forms, smallest)]
    if worst != smallest:
        sentences.append(_worst_sentence(forms, worst))
    elif len(means) > 1:
        sentences.append("No other form has a larger KL.")
    sentences.append(
        f"Without the adapter the KL would be {float(forms.base_kl.mean()):.2g} nats; rounding in "
        f"the computation explains {float(forms.floor.mean()):.1g}."
    )
    sentences += forms.notes
    return " ".join(sentences)


def _smallest_sentence(forms: Forms, smallest: int | None) -> str:
    """Say which form to ship: the smallest of those that change no answer."""
    answers = _all_of(len(forms.values))
    if smallest is None:
        return f"No form keeps {answers}."
    kl = float(forms.values[:, smallest].mean())
    return (
        f"The smallest form that keeps {answers} is {forms.names[smallest]}: "
        f"{size_text(forms.sizes[smallest])}, KL {kl:.2g} nats."
    )


def _worst_sentence(forms: Forms, worst: int) -> str:
    """Say what the form with the largest mean KL changes."""
    kl = float(forms.values[:, worst].mean())
    changed = int(forms.flipped[:, worst].sum())
    answers = many(len(forms.values), "answer")
    return f"{forms.names[worst]} changes most: KL {kl:.2g} nats, and {changed} of {answers}."


def _all_of(count: int) -> str:
    return "the answer" if count == 1 else f"all {count} answers"


@drawing.body.register(Forms)
def _forms_body(forms: Forms) -> str:
    return f"{forms_story(forms)}\n{forms.to_frame().to_string(index=False)}"
