"""Repairs that single architectures need, so that a TransformerBridge computes what they compute.

Each quirk is a function below, under `@quirk`. It is called with the Hugging Face model before the
bridge is made, and may return a function that is called with the bridge. `ll.load` calls all of
them; a quirk that does not concern a model does nothing to it. To add another one:

1. Write the function here, with a docstring that says what the architecture does, what the bridge
   does instead, and how far off it is. It decides by what the model is made of (a class, a field
   of the configuration) whether it has something to do.

       from lens_lora.hosts.quirks import quirk   # in a script of your own

       @quirk
       def attention_is_scaled_twice(hf_model: PreTrainedModel) -> Mend | None:
           if type(hf_model).__name__ != "TwiceForCausalLM":
               return None
           return lambda bridge: …

2. Names that a library keeps to itself are read in `compat/`, by a function with a test in
   `tests/house/test_compat.py`.
3. Add the architecture to `tests/lib/architectures.py`: then `tests/hosts/` compares lenses over it
   with PEFT, in float64, and the logits of the bridge with those of the model. A row there is a
   class of transformers; one that transformers lacks, such as a model's own code, has no row.
4. Test the repair alone in `tests/hosts/test_variants.py`; the bridge without it is the negative
   control. A class that transformers lacks is written in its test, as those of
   `tests/hosts/test_quirks.py` are: two of them need a quirk, shown there in full, the third none.

A repair of attention's output, such as a factor, acts after `o.hook_out`. The site of o writes
there, and what an adapter adds, ΔW z, must go through the repair as W z does. A repair of what o
reads, such as a gain of z, acts before `o.hook_in`, as a pre-hook of `block.attn.o`: what an
adapter adds reads z from there. A repair that is right only for the base model is refused:
`hosts/probe.py` compares random updates with the Hugging Face model's own.

Other things that an architecture may need are handled elsewhere:

    the paths of its modules, which norm reads what, what is folded     an entry in `families.py`
    a fused projection that the bridge takes apart                      nothing: it is measured
    experts, by the flags of their class                                `hosts/experts.py`
    rotary tables that depend on the length of a row                    `compat.rotary_rules`
    another class of hooked models altogether                           `register_host`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lens_lora.compat import (
    children_of,
    complete_codegen,
    drop_new_biases,
    keep_rows_at_last_norms,
    wraps_nothing,
)
from lens_lora.errors import ArgumentError
from lens_lora.hosts.attention import drop_unused_caps
from lens_lora.hosts.over_ranks import is_split, make_maps_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What to do about a bridge that computes something else than its model, as a part of a sentence.
TEACH = (
    "teach the bridge what this architecture does, by a function under @quirk "
    "(lens_lora.hosts.quirks)"
)
# A function that repairs a bridge once it is made.
Mend = Callable[[Any], None]
_Quirk = Callable[["PreTrainedModel"], Mend | None]
_QUIRKS: list[_Quirk] = []


def quirk(function: _Quirk) -> _Quirk:
    """Decorate a function of a Hugging Face model, to be called for every bridge from now on.

    Args:
        function: changes the model if necessary, and returns a function that repairs the bridge,
            or None.

    Raises:
        ArgumentError: something that cannot be called.
    """
    if not callable(function):
        raise ArgumentError(
            f"{function!r} is no function of a Hugging Face model",
            remedy="write @quirk, without arguments, above a function.",
        )
    _QUIRKS.append(function)
    return function


def mends_of(hf_model: PreTrainedModel) -> list[Mend]:
    """Make a model ready for its bridge, and return the functions that repair the bridge."""
    mends = [function(hf_model) for function in _QUIRKS]
    return [mend for mend in mends if mend is not None]


@quirk
def caps_that_are_not_computed(hf_model: PreTrainedModel) -> None:
    """Gemma 3 holds a soft-cap of attention scores that it never computes, and a bridge does."""
    drop_unused_caps(hf_model)


@quirk
def biases_that_are_not_offloaded(hf_model: PreTrainedModel) -> Mend:
    """A bridge gives a head without a bias one of zeros, which accelerate cannot bring in."""
    del hf_model
    return drop_new_biases


@quirk
def maps_that_are_split_over_ranks(hf_model: PreTrainedModel) -> Mend | None:
    """In a model that transformers has split (`tp_plan=`), maps write only parts of their outputs.

    Also, a bridge gives its head a bias of zeros for the whole vocabulary, which does not fit the
    part of the logits that a process computes.
    """
    if not is_split(hf_model):
        return None
    make_maps_whole(hf_model)
    return drop_new_biases


@quirk
def modules_that_are_absent(hf_model: PreTrainedModel) -> Mend:
    """A bridge puts a component that wraps nothing where the model has None for a module.

    An OPT that normalises after each branch has None in place of a last norm, and Granite hybrid in
    place of its rotary embedding. Both call the module if it is not None.
    """
    absent = absent_modules(hf_model)

    def mend(bridge: Any) -> None:
        del bridge  # The components are in the model's own modules.
        leave_absent(absent)

    return mend


@quirk
def norms_behind_branches(hf_model: PreTrainedModel) -> Mend:
    """A bridge's hooks flatten the positions of an OPT that normalises after each branch."""
    del hf_model
    return keep_rows_at_last_norms


@quirk
def tables_of_codegen(hf_model: PreTrainedModel) -> Mend:
    """A bridge looks for CodeGen's tables in each attention; transformers 5 has them only once."""
    del hf_model
    return complete_codegen


# --- Modules that a model does without


class Absent(NamedTuple):
    """A place where a model has None for a module: the name that an owner has for it."""

    owner: nn.Module
    name: str


def absent_modules(hf_model: nn.Module) -> list[Absent]:
    """The places where a model has None for a module.

    An OPT that normalises after each branch has None in place of a last norm, and Granite hybrid in
    place of its rotary embedding.
    """
    absent: list[Absent] = []
    for module in hf_model.modules():
        members = {**vars(module), **children_of(module)}
        absent += [Absent(module, name) for name, member in members.items() if member is None]
    return absent


def leave_absent(absent: Sequence[Absent]) -> None:
    """Put None back where a bridge has put a component that wraps nothing.

    The model calls the module if it is not None, and such a component raises an error when called.
    """
    for place in absent:
        if wraps_nothing(getattr(place.owner, place.name, None)):
            setattr(place.owner, place.name, None)
