"""Whether the weights of a model and an adapter are as they were when a lens was made.

Each update is computed once, from the adapter's factors and the model's own γ, β, W and b, and a
later change would leave it wrong. A `Watch` remembers and compares

1. which tensor stands in which place of which module, and which module in which place of another;
2. each tensor's address, which changes with `.to(…)`, `.half()` and `p.data = …`;
3. each tensor's version, which PyTorch counts up at every edit in place, also under no_grad;
4. entries of each, all those of a vector: an edit through `p.data` counts nothing up.

One change may go unseen: an edit through `.data`, of a small part of a matrix. Tensors that were
made in inference mode have no version, so of them the other three are compared. Quantised and
offloaded tensors are left out: they are repacked or replaced in a forward pass, and no update is
made from them. So are those that FSDP2 gathers, which stand in their places only for a pass.

A watch runs no forward pass. At 210 adapted sites of 135 million parameters the first three
comparisons take 0.2 ms, at every run; the fourth takes 2.5 ms, at every call. A run of eight tokens
takes 120 ms there, on one thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from lens_lora import compat
from lens_lora.compat import edits_of, parameters_in
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.errors import ModelStateError

# How many entries of a matrix are compared.
_ENTRIES = 64
# The longest vector that is compared whole.
_WHOLE_VECTOR = 2**15
# Successive entries are this share of a row's width apart; the golden section spreads them evenly
# over the columns.
_GOLDEN = 0.382

_Named = tuple[str, Tensor]
# A name, its tensor, and the tensor's address or version.
_Counted = tuple[str, Tensor, int]


class _Place(NamedTuple):
    """The place where a tensor or a module stands.

    Attributes:
        container: the dictionary of a module: its parameters, its submodules or its attributes.
        key: a key of it.
        value: the tensor or module under this key.
        name: the name of the place in errors.
    """

    container: Mapping[str, Any]
    key: str
    value: Any
    name: str


class _Spacing(NamedTuple):
    """Some entries of a tensor at even distances in memory.

    Attributes:
        entries: how many.
        step: how far apart.
    """

    entries: int
    step: int


class _Group:
    """Tensors of one dtype and device: some entries of each, compared in one go."""

    def __init__(self, tensors: list[_Named]) -> None:
        self._tensors = tensors
        self._spacings = [_spacing(tensor) for _, tensor in tensors]
        self._then = self._entries()

    def _entries(self) -> UInt8[Tensor, " byte"]:
        """The entries bit for bit, so that NaN equals itself."""
        parts: list[Tensor] = []
        for (_, tensor), spacing in zip(self._tensors, self._spacings, strict=True):
            parts.append(tensor.data.as_strided((spacing.entries,), (spacing.step,)))
        return torch.cat(parts).view(torch.uint8)

    def edited(self) -> str | None:
        """The name of the first tensor with a changed entry; None if there is none."""
        now = self._entries()
        if torch.equal(now, self._then):
            return None
        first_byte = int((now != self._then).nonzero()[0])
        itemsize = self._tensors[0][1].element_size()
        end = 0
        for (name, _), spacing in zip(self._tensors, self._spacings, strict=True):
            end += spacing.entries * itemsize
            if first_byte < end:
                return name
        raise AssertionError("a byte beyond the last tensor")


class Watch:
    """Tensors, and the places where they stand, as they are when this is made.

    Args:
        tensors: each with its name.
        places: where these and the modules that hold them stand.
    """

    def __init__(self, tensors: Iterable[_Named] = (), places: Iterable[_Place] = ()) -> None:
        self._places: list[_Place] = list(places)
        self._addresses: list[_Counted] = []
        self._versions: list[_Counted] = []
        by_kind: dict[tuple[torch.dtype, torch.device], list[_Named]] = {}
        for name, tensor in tensors:
            if not _is_watched(tensor):
                continue
            self._addresses.append((name, tensor, tensor.data_ptr()))
            if not tensor.is_inference():
                self._versions.append((name, tensor, edits_of(tensor)))
            by_kind.setdefault((tensor.dtype, tensor.device), []).append((name, tensor))
        self._groups: list[_Group] = [_Group(alike) for alike in by_kind.values()]

    @classmethod
    def of_module(
        cls, module: nn.Module, prefix: str, gathered: Collection[nn.Module] = ()
    ) -> Watch:
        """Every weight of a module, and the modules that hold them.

        Args:
            module: the module.
            prefix: how the names of its places begin in errors, such as "the model's ".
            gathered: the modules within it whose weights FSDP2 gathers, which are left out.
        """
        places = list(_places_of(module, prefix, gathered))
        # A tensor that stands in several places is named by the first of them.
        tensors: dict[int, _Named] = {}
        for place in places:
            if isinstance(place.value, Tensor):
                tensors.setdefault(id(place.value), (place.name, place.value))
        return cls(tensors.values(), places)

    @classmethod
    def of_adapter(cls, adapter: Adapter) -> Watch:
        """Every update by its module, and its tensors."""
        updates = adapter.modules
        places: list[_Place] = []
        tensors: list[_Named] = []
        for module, update in updates.items():
            places.append(_Place(updates, module, update, f"the adapter's update of {module}"))
            for name, tensor in vars(update).items():
                if isinstance(tensor, Tensor):
                    tensors.append((f"the adapter's {name} of {module}", tensor))
        return cls(tensors, places)

    def changed(self, *, entries: bool) -> str | None:
        """Say what changed, as the beginning of a sentence; None if nothing did.

        Args:
            entries: whether entries are compared, too.
        """
        for place in self._places:
            if place.container.get(place.key) is not place.value:
                return f"{place.name} was replaced"
        for name, tensor, address in self._addresses:
            if tensor.data_ptr() != address:
                return f"{name} was moved or cast, or got other data"
        for name, tensor, version in self._versions:
            if edits_of(tensor) != version:
                return f"{name} was edited in place"
        if not entries:
            return None
        for group in self._groups:
            edited = group.edited()
            if edited is not None:
                return f"{edited} was edited in place"
        return None

    def require_same(self, *, entries: bool) -> None:
        """Check that nothing changed.

        Args:
            entries: whether entries are compared, too.

        Raises:
            ModelStateError: naming the first change.
        """
        changed = self.changed(entries=entries)
        if changed is not None:
            raise ModelStateError(
                f"{changed} after the lens was made, and its updates were computed from what was "
                "there before",
                remedy="make a new LoraLens.",
            )


def _is_watched(tensor: Tensor) -> bool:
    """Whether it has entries in memory that can be compared."""
    is_plain = type(tensor.data) is Tensor and tensor.layout is torch.strided
    if not is_plain or not tensor.is_floating_point():
        return False
    return not tensor.is_meta and tensor.numel() > 0


def _places_of(root: nn.Module, prefix: str, gathered: Collection[nn.Module]) -> Iterator[_Place]:
    """Where every weight stands in its module, and every module with weights in its parent.

    Args:
        root: the module that is watched.
        prefix: what the names of its places begin with.
        gathered: modules that are left out.
    """
    modules = dict(root.named_modules())
    listed: set[str] = set()
    for path, module in modules.items():
        if module in gathered:
            continue
        parameters = parameters_in(module)
        weights = {key: tensor for key, tensor in parameters.items() if tensor is not None}
        yield from _places_of_tensors(parameters, weights, path, prefix)
        processed = compat.processed_tensors(module)
        yield from _places_of_tensors(vars(module), processed, path, prefix)
        if weights:
            yield from _places_up_to_root(modules, path, prefix, listed)


def _places_of_tensors(
    container: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str, prefix: str
) -> Iterator[_Place]:
    """The places of these tensors in a dictionary of the module at this path."""
    for key, tensor in tensors.items():
        if _is_watched(tensor):
            name = f"{path}.{key}".lstrip(".")
            yield _Place(container, key, tensor, f"{prefix}{name}")


def _places_up_to_root(
    modules: Mapping[str, nn.Module], path: str, prefix: str, listed: set[str]
) -> Iterator[_Place]:
    """The place of the module at this path in its parent, of that in its own, and so on.

    It ends at a path that is in `listed`, and adds each path to it.
    """
    while path and path not in listed:
        listed.add(path)
        parent, _, key = path.rpartition(".")
        children = compat.children_of(modules[parent])
        yield _Place(children, key, modules[path], f"{prefix}{path}")
        path = parent


def _spacing(tensor: Tensor) -> _Spacing:
    """Choose the entries of a tensor that are compared.

    They are all entries of a vector. Of a matrix they are some, each in another row and column. If
    the matrix is not contiguous, they lie along its diagonal.
    """
    if not tensor.is_contiguous():
        count = min(max(tensor.shape), _ENTRIES)
        step = 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            step += stride * ((size - 1) // max(count - 1, 1))
        return _Spacing(count, step)
    size = tensor.numel()
    is_whole = tensor.ndim < 2 and size <= _WHOLE_VECTOR
    count = size if is_whole else min(size, _ENTRIES)
    step = size // count
    if tensor.ndim:
        # Whole rows apart, the entries would all lie in one column. Widths are often powers of two,
        # and with an odd offset the columns do not repeat.
        column_offset = int(_GOLDEN * tensor.shape[-1]) | 1
        if step > column_offset:
            step -= column_offset
    return _Spacing(count, step)
