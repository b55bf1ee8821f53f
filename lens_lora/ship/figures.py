"""The figure of the forms of an adapted model."""

from __future__ import annotations

from lens_lora.core import drawing
from lens_lora.errors import many
from lens_lora.ship.forms import Forms
from lens_lora.ship.words import size_text
from lens_lora.show import go
from lens_lora.show.figures import bars

_BELOW = "mean KL to the adapted model in float32, of the next token"


@drawing.figure.register(Forms)
def forms_figure(forms: Forms) -> go.Figure:
    """The mean KL of each form, with its size and how many answers it changes."""
    count = len(forms.values)
    names = [
        f"{name}, {size_text(size)}" for name, size in zip(forms.names, forms.sizes, strict=True)
    ]
    values = forms.values.mean(0).tolist()
    hover = [
        f"{name}<br>{value:.3g} nats<br>{flipped} of {many(count, 'answer')} changed"
        for name, value, flipped in zip(names, values, forms.flipped.sum(0).tolist(), strict=True)
    ]
    below = f"{_BELOW}; base: {float(forms.base_kl.mean()):.3g}, rounding: {_floor(forms):.1g}"
    titles = ("What each form of the adapted model changes", below)
    return bars(titles, names, values, hover, "nats")


def _floor(forms: Forms) -> float:
    return float(forms.floor.mean())
