"""Record G and z of the base at every module that an adapter may target, at ε = 0.

    a_l = ⟨G_l, s_l B_l A_l z_l⟩        z_l is what a map reads, G_l = ∂g/∂(its output)

1. One forward and one backward pass show G and z wherever sites of a lens read and write
   (`record`).
2. Equal tensors are kept once, in a stack of tensors of the same shape (`TensorPool`), since q, k
   and v read the same z.
3. A lens of another adapter is shown the recorded tensors instead of a backward pass
   (`Half.slopes`). An adapter of a module that was not recorded is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_lora.compat import FreedMemory, give_back_freed_memory
from lens_lora.core import Function, Injection, LoraLens, Prompts, Reading, SlopeSums, Visit
from lens_lora.errors import SiteError

# The stack of tensors of each shape, under the name that `TensorPool` gives the shape.
Stacks = Mapping[str, Tensor]
# The place of a kept tensor: the name of its stack, and its index there.
Address = tuple[str, int]
# The addresses of G and of z.
Pair = tuple[Address, Address]
# The pairs that were seen at each place of the model: one for each time that its module runs in a
# pass.
Addresses = dict[str, tuple[Pair, ...]]

# The size of a pool in bytes above which freed memory is given back before its tensors are stacked,
# which takes milliseconds.
_LARGE = 2**26


class TensorPool:
    """A pool that keeps tensors in one stack per shape, and equal tensors only once."""

    def __init__(self) -> None:
        self._by_shape: dict[str, list[Tensor]] = {}
        self._with_sum: dict[tuple[str, float], list[int]] = {}
        self._nbytes: int = 0
        self._freed = FreedMemory()

    def address_of(self, tensor: Tensor) -> Address:
        """Return the address of the tensor, which is copied if no equal one is kept yet."""
        name = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.device}"
        kept = self._by_shape.setdefault(name, [])
        # Equal tensors have equal sums, so only these few are compared.
        candidates = self._with_sum.setdefault((name, float(tensor.sum())), [])
        for index in candidates:
            if torch.equal(kept[index], tensor):
                return name, index
        index = len(kept)
        candidates.append(index)
        kept.append(tensor.detach().clone(memory_format=torch.contiguous_format))
        self._nbytes += tensor.nbytes
        self._freed.note_kept(kept[index])
        return name, index

    def stacks(self) -> dict[str, Tensor]:
        """Stack the tensors of each shape, [tensor, row, pos, …], and empty the pool.

        Only one shape's tensors at a time are held twice. If the pool is large, freed memory is
        given back before each stack, which cannot reuse the memory of smaller tensors.
        """
        stacks: dict[str, Tensor] = {}
        self._with_sum.clear()
        for name in [*self._by_shape]:
            if self._nbytes > _LARGE:
                give_back_freed_memory()
            stacks[name] = torch.stack(self._by_shape.pop(name))
        return stacks


@dataclasses.dataclass(frozen=True, eq=False)
class Half:
    """The base's half of first order over some rows.

    Attributes:
        prompts: the rows.
        owner: the index of each row's prompt.
        columns: the addresses of G and z: one column for g, or one for each token's log p.
    """

    prompts: Prompts
    owner: Int[Tensor, " row"]
    columns: tuple[Addresses, ...]

    @property
    def reading(self) -> Reading:
        """A reading that sums over the rows of each prompt; it cannot read logits."""
        return Reading(self.prompts, _refuse_to_read, self.owner)

    @torch.no_grad()
    def slopes(
        self, lens: LoraLens, stacks: Stacks, axes: tuple[str, ...] = ()
    ) -> Float[Tensor, "batch site *by"]:
        """Compute ∂g/∂ε_l at 0 of the lens's adapter, split along `axes`. No forward pass.

        Raises:
            SiteError: the adapter has a module for which nothing was recorded.
        """
        axes_within_column = tuple(axis for axis in axes if axis != "token")
        by_column: list[Tensor] = []
        for column in self.columns:
            slopes = SlopeSums(lens, self.prompts, axes_within_column)
            for injection in lens.injections:
                if _is_off_at_base(injection):
                    continue
                for gradient, z in _recorded(lens, injection, column, stacks):
                    slopes.visit(injection, None, gradient, z)
            by_column.append(slopes.by_prompt(self.reading))

        if "token" in axes:
            return torch.stack(by_column, -1)
        return torch.stack(by_column).sum(0)


def record(
    g: Function,
    lenses: Iterable[LoraLens],
    pool: TensorPool,
    *,
    by_token: bool = False,
    require_all: bool = False,
) -> tuple[Half, Float[Tensor, " batch"] | None]:
    """Record the base's half wherever a site of these lenses reads and writes, and g(0).

    A lens is run only if one of its places was not seen under an earlier lens.

    Args:
        g: the function, over prompts that fit into one pass.
        lenses: lenses of several adapters over the same model.
        pool: the pool that keeps the tensors.
        by_token: whether each token's log p of a response is kept apart.
        require_all: whether a site that no gradient reaches is refused.

    Returns:
        The half, and g(0), which is None with `by_token`.

    Raises:
        ModelStateError: all sites are required, and a gradient did not reach one of them.
    """
    base: Tensor | None = None
    columns: list[Addresses] = []
    for lens in lenses:
        if columns and _places_of(lens) <= columns[0].keys():
            continue
        seen, base = _run(g.over(lens), pool, by_token, require_all)
        columns = _joined(columns, seen) if columns else seen
    return Half(g.rows, g.reading.owner, tuple(columns)), base


def _places_of(lens: LoraLens) -> set[str]:
    """The places of all injections that may move the base."""
    places: set[str] = set()
    for injection in lens.injections:
        if not _is_off_at_base(injection):
            places.add(place_of(lens, injection))
    return places


def _is_off_at_base(injection: Injection) -> bool:
    """Whether an injection waits for its partner's gate, which is 0 in the base."""
    return injection.partner is not None


def _joined(earlier: Sequence[Addresses], later: Sequence[Addresses]) -> list[Addresses]:
    """The columns of two runs; of a place that both have seen, what the earlier one saw."""
    return [{**second, **first} for first, second in zip(earlier, later, strict=True)]


def place_of(lens: LoraLens, injection: Injection) -> str:
    """Name where an injection reads and writes, and at which firing of its read point."""
    kind = lens.sites[injection.site].kind
    ports = injection.ports
    return f"{kind} {ports.read} {ports.write} {ports.firing}"


def _run(
    g: Function, pool: TensorPool, by_token: bool, require_all: bool
) -> tuple[list[Addresses], Float[Tensor, " batch"] | None]:
    """Record one forward pass and its backward passes: one for g, or one for each token.

    Returns:
        The addresses of what was seen, and g(0), which is None with `by_token`.
    """
    recorder = _Recorder(g.lens, pool)
    # Unless all sites are required, a module on which g does not depend is not recorded, and an
    # adapter of it is refused later.
    base: Tensor | None = None
    if by_token:
        g.passes.visit_tokens(lambda _token: recorder.next_visitor(), require_all=require_all)
    else:
        base = g.passes.visit(recorder.next_visitor(), require_all=require_all)
    # A site that runs before the point that is read but cannot move it has nothing to sum.
    for injection in g.lens.injections:
        if g.lens.sites[injection.site].name in g.reading.unmoved:
            for column in recorder.columns:
                column.setdefault(place_of(g.lens, injection), ())
    return recorder.columns, base


class _Recorder:
    """Keeps G and z of each place where an adapter adds its updates, as backward passes show them.

    Attributes:
        columns: the addresses of G and z: one column for g, or one for each token's log p.
    """

    def __init__(self, lens: LoraLens, pool: TensorPool) -> None:
        self._lens = lens
        self._pool = pool
        # Several updates of one module share a place, and show the same tensors there.
        self._shown_by: dict[str, Injection] = {}
        self.columns: list[Addresses] = []

    def next_visitor(self) -> Visit:
        """Begin the next column; what is returned is called with each G and z of its pass."""
        addresses: Addresses = {}
        self.columns.append(addresses)

        def visit(injection: Injection, weight: Tensor | None, gradient: Tensor, z: Tensor) -> None:
            del weight
            self._keep(addresses, injection, gradient, z)

        return visit

    def _keep(
        self, addresses: Addresses, injection: Injection, gradient: Tensor, z: Tensor
    ) -> None:
        """Keep G and z, once for each place and each time that its module runs in a pass."""
        if _is_off_at_base(injection):
            return
        place = place_of(self._lens, injection)
        if self._shown_by.setdefault(place, injection) is not injection:
            return
        address_of_gradient = self._pool.address_of(gradient)
        address_of_z = address_of_gradient
        if injection.ports.read is not None:
            address_of_z = self._pool.address_of(z)
        earlier = addresses.get(place, ())
        addresses[place] = (*earlier, (address_of_gradient, address_of_z))


def _recorded(
    lens: LoraLens, injection: Injection, column: Addresses, stacks: Stacks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield G and z of one injection, once for each time that its module runs in a pass."""
    place = place_of(lens, injection)
    is_constant = injection.ports.read is None
    if is_constant and place not in column:
        # The constant part of v is added where o writes, and G there is the same.
        place = _place_of_o(injection, column) or place
    if place not in column:
        raise _not_recorded(lens, injection)

    for address_of_gradient, address_of_z in column[place]:
        gradient = _at(stacks, address_of_gradient).to(injection.map.device)
        if is_constant:
            z = gradient.new_zeros(*gradient.shape[:2], injection.map.width)
        else:
            z = _at(stacks, address_of_z).to(injection.map.device)
        yield gradient, z


def _place_of_o(injection: Injection, column: Addresses) -> str | None:
    """Find the place of the o that writes where this injection writes, if it was recorded."""
    writes = f" {injection.ports.write} "
    for place in column:
        if place.startswith("o ") and writes in place:
            return place
    return None


def _not_recorded(lens: LoraLens, injection: Injection) -> SiteError:
    site = lens.sites[injection.site]
    lacking = "this module"
    if injection.ports.read is None:
        lacking = "the o of this layer, into whose bias v's is folded"
    return SiteError(
        f"{site.name} ({site.module}): the bank lacks {lacking}, and what it lacks is not "
        "counted as zero. Make a bank of more modules (modules=), or leave this one out: "
        f"adapter.without_modules({site.module!r})."
    )


def _at(stacks: Stacks, address: Address) -> Tensor:
    name, index = address
    return stacks[name][index]


def _refuse_to_read(logits: Tensor) -> Tensor:
    raise RuntimeError("what is read of the logits is in the recorded gradients already")
