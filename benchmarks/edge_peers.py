"""Compare what edges cost with edge attribution patching (EAP) and with its integrated form.

    python -m benchmarks.edge_peers --check               # are the scores of both peers right?
    python -m benchmarks.edge_peers --write               # time and memory, into docs/edges_data.md

1. EAP (Syed et al., arXiv 2310.10348) has two runs of one model, clean and other. With z_u what
   writer u adds to the residual stream, and x_v what reader v alone takes from it, it scores

       score(u → v) = ⟨z'_u − z_u, ∂g/∂x_v⟩.

   That is one forward pass, and one forward and backward pass.
2. EAP-IG (Hanna et al., arXiv 2403.17806) has two prompts, and takes the mean of ∂g/∂x_v over runs
   whose input embeddings lie between theirs: a forward and a backward pass for each of its steps.
3. `--check` compares every score of both on a tiny model in float64 with finite differences: a
   small multiple of the edge's difference is added to what its reader takes, and g is run again.
4. On the embedded model, EAP's other run has the adapter of one module merged. Only that module's
   block, and later ones, then write something else, so EAP's scores for that module must equal
   `ll.edges`. This is checked before anything is timed.
5. All three are timed on one HookedTransformer, in turns, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lens_lora as ll
from benchmarks import edges, marks
from benchmarks.measuring import (
    MARGIN,
    cpu_seconds,
    load_average,
    matmul_peak,
    median_seconds,
    peak_memory,
    plain_backward,
    plain_forward,
    text_ids,
    text_prompts,
)
from lens_lora._version import versions
from lens_lora.demonstration import shipped_adapter
from lens_lora.demonstration.embedded import load_embedded
from lens_lora.hosts.build import hooked_model

# The steps of EAP-IG.
STEPS = 5
# The embeddings' output, where a run begins.
START = "blocks.0.hook_resid_pre"
# A block amid the others, and its modules that write to the residual stream directly.
LAYER = 12
WRITERS = {
    "mlp.down": f"*.layers.{LAYER}.mlp.down_proj",
    "attn.o": f"*.layers.{LAYER}.self_attn.o_proj",
}
# How far EAP may be from `ll.edges`: the other run has merged weights in float32, which round ΔW.
TOLERANCE_MERGED = 3e-4
# The step of a central difference in float64, whose error falls as its square.
FINITE_STEP = 1e-4
# How far scores may be from central differences.
TOLERANCE = 1e-7

Value = Callable[[Tensor], Tensor]
Edit = Callable[[Tensor], Tensor]
Run = Callable[[], object]
# A hook point, and what TransformerLens calls there.
Hook = tuple[str, Callable[..., Any]]


class Readers(NamedTuple):
    """The readers at one place.

    Attributes:
        upstream: how many of the writers are upstream of them.
        count: how many readers there are: heads, or one.
    """

    upstream: int
    count: int


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where the writers of a HookedTransformer write, and where its readers read.

    Attributes:
        writers: each hook point, with the number of writers there: heads, or one.
        readers: each hook point, or norm whose input is read, with the readers there.
    """

    writers: dict[str, int]
    readers: dict[str, Readers]

    @classmethod
    def of(cls, model: Any, by_head: bool) -> Ends:
        """The ends of all edges, by head or by block."""
        heads = int(model.cfg.n_heads) if by_head else 1
        key_heads = (model.cfg.n_key_value_heads or heads) if by_head else 1
        writers = {START: 1}
        readers: dict[str, Readers] = {}
        for layer in range(model.cfg.n_layers):
            block = f"blocks.{layer}"
            upstream = sum(writers.values())
            if by_head:
                readers[f"{block}.hook_q_input"] = Readers(upstream, heads)
                readers[f"{block}.hook_k_input"] = Readers(upstream, key_heads)
                readers[f"{block}.hook_v_input"] = Readers(upstream, key_heads)
                writers[f"{block}.attn.hook_result"] = heads
                readers[f"{block}.hook_mlp_in"] = Readers(sum(writers.values()), 1)
            else:
                readers[f"{block}.ln1"] = Readers(upstream, 1)
                writers[f"{block}.hook_attn_out"] = 1
                readers[f"{block}.ln2"] = Readers(sum(writers.values()), 1)
            writers[f"{block}.hook_mlp_out"] = 1
        readers["ln_final"] = Readers(sum(writers.values()), 1)
        return cls(writers, readers)


@contextlib.contextmanager
def heads_apart(model: Any, by_head: bool) -> Iterator[None]:
    """Have the model keep apart what each head takes and writes, if heads are asked for."""
    switches = ("split_qkv_input", "attn_result", "hook_mlp_in") if by_head else ()
    for name in switches:
        getattr(model, f"set_use_{name}")(True)
    try:
        yield
    finally:
        for name in switches:
            getattr(model, f"set_use_{name}")(False)


@contextlib.contextmanager
def edited_inputs(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Within the block, edit what readers take.

    Args:
        model: the HookedTransformer, which runs once within the block.
        edits: by the reader's hook point, or by the norm whose input is read.
    """
    handles: list[Any] = []
    hooks: list[Hook] = []
    for name, edit in edits.items():
        if "hook_" in name:
            hooks.append((name, hook_that_edits(edit)))
        else:
            norm = model.get_submodule(name)
            handles.append(norm.register_forward_pre_hook(norm_hook_that_edits(edit)))
    try:
        with model.hooks(hooks):
            yield
    finally:
        for handle in handles:
            handle.remove()


def hook_that_edits(edit: Edit) -> Callable[..., Tensor]:
    """A hook of TransformerLens that replaces a stream by what an edit makes of it."""

    def edited(stream: Tensor, hook: object) -> Tensor:
        return edit(stream)

    return edited


def norm_hook_that_edits(edit: Edit) -> Callable[..., tuple[Tensor]]:
    """A pre-hook of a norm that replaces its input by what an edit makes of it.

    A HookedTransformer calls the norm before attention three times, for queries, keys and values.
    A block is one reader, so all three calls are given one and the same tensor.
    """
    edited: list[Tensor] = []

    def edited_input(module: object, inputs: tuple[Tensor]) -> tuple[Tensor]:
        if not edited:
            edited.append(edit(inputs[0]))
        return (edited[0],)

    return edited_input


class EdgeAttributionPatching:
    """EAP and EAP-IG over a HookedTransformer, written as their papers say.

    Args:
        model: the HookedTransformer, whose weights are frozen.
        by_head: whether heads are writers and readers, or blocks.
        value: g, from the logits of all positions.
    """

    def __init__(self, model: Any, by_head: bool, value: Value) -> None:
        self.model = model
        self.by_head = by_head
        self.value = value
        self.ends = Ends.of(model, by_head)

    def eap(self, clean: Tensor, other: Run) -> Tensor:
        """Score every edge, [writer, reader].

        Args:
            clean: the ids at which gradients are taken.
            other: runs the other model, or the same one on another prompt.
        """
        with heads_apart(self.model, self.by_head), torch.enable_grad():
            differences = self._empty(clean)
            with torch.no_grad(), self.model.hooks(self._adding_to(differences, 1.0)):
                other()
            # The run that gives the gradients is the clean run, so it gives −z_u as well.
            hooks = [(START, as_leaf), *self._adding_to(differences, -1.0)]
            scores = self.empty_scores()
            self._add_scores(scores, clean, hooks, differences)
        return scores

    def integrated(self, clean: Tensor, other: Tensor, steps: int = STEPS) -> Tensor:
        """Score every edge between two prompts by the mean of gradients, [writer, reader]."""
        differences = self.differences(clean, other)
        scores = self.empty_scores()
        with heads_apart(self.model, self.by_head), torch.enable_grad():
            for step in range(1, steps + 1):
                begin = functools.partial(between, differences[:, :, 0], 1 - step / steps)
                self._add_scores(scores, clean, [(START, begin)], differences)
        return scores / steps

    def differences(self, clean: Tensor, other: Tensor) -> Tensor:
        """z'_u − z_u of every writer u, [batch, pos, writer, d_model], from two forward passes."""
        differences = self._empty(clean)
        with heads_apart(self.model, self.by_head), torch.no_grad():
            with self.model.hooks(self._adding_to(differences, 1.0)):
                self.model(other)
            with self.model.hooks(self._adding_to(differences, -1.0)):
                self.model(clean)
        return differences

    def empty_scores(self) -> Tensor:
        """Zeros, [writer, reader]."""
        writers = sum(self.ends.writers.values())
        readers = sum(place.count for place in self.ends.readers.values())
        return torch.zeros(writers, readers, dtype=self.model.cfg.dtype)

    def _empty(self, ids: Tensor) -> Tensor:
        """Zeros for what each writer writes, [batch, pos, writer, d_model]."""
        writers = sum(self.ends.writers.values())
        size = (*ids.shape, writers, self.model.cfg.d_model)
        return torch.zeros(size, dtype=self.model.cfg.dtype)

    def _adding_to(self, differences: Tensor, sign: float) -> list[Hook]:
        """Hooks that add what each writer writes, times a sign, to its part of `differences`."""
        hooks: list[Hook] = []
        first = 0
        for name, count in self.ends.writers.items():
            part = differences[:, :, first : first + count]
            hooks.append((name, functools.partial(add_written, part, sign)))
            first += count
        return hooks

    def _add_scores(
        self, scores: Tensor, clean: Tensor, hooks: list[Hook], differences: Tensor
    ) -> None:
        """Run forward and back once, and add ⟨z'_u − z_u, ∂g/∂x_v⟩ of every edge to its score.

        Args:
            scores: [writer, reader].
            clean: the ids.
            hooks: the beginning of the run, and what else is to be hooked.
            differences: z'_u − z_u, at the latest when the forward pass is done.
        """
        edits: dict[str, Edit] = {}
        first = 0
        for name, (upstream, count) in self.ends.readers.items():
            columns = scores[:upstream, first : first + count]
            edits[name] = tap(columns, differences[:, :, :upstream])
            first += count
        with self.model.hooks(hooks), edited_inputs(self.model, edits):
            self.value(self.model(clean)).backward()


def add_written(part: Tensor, sign: float, written: Tensor, hook: object) -> None:
    """Add what writers write, times a sign, to their part of the differences."""
    part.add_(written.detach().view(part.shape), alpha=sign)


def tap(columns: Tensor, differences: Tensor) -> Edit:
    """An edit that leaves the stream as it is, and scores its readers in the backward pass.

    Args:
        columns: the scores of these readers, to which is added, [writer, reader].
        differences: z'_u − z_u of the writers upstream, [batch, pos, writer, d_model].
    """

    def add_to_columns(gradient: Tensor) -> None:
        of_readers = gradient.view(*gradient.shape[:2], -1, gradient.shape[-1])
        columns.add_(torch.einsum("bpwd,bprd->wr", differences, of_readers))

    def tapped(stream: Tensor) -> Tensor:
        # A tensor of its own, whose gradient comes through these readers alone.
        stream_of_readers = stream.view_as(stream)
        stream_of_readers.register_hook(add_to_columns)
        return stream_of_readers

    return tapped


def as_leaf(stream: Tensor, hook: object) -> Tensor:
    """The stream as the beginning of a graph, as weights are frozen."""
    return stream.detach().requires_grad_()


def between(difference: Tensor, share: float, stream: Tensor, hook: object) -> Tensor:
    """The stream of the clean prompt, moved by this share towards that of the other one."""
    return (stream.detach() + share * difference).requires_grad_()


# --- Are the scores right?


def tiny_model(by_head: bool) -> Any:
    """A HookedTransformer of random weights in float64, with shared key and value heads."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=16,
        n_heads=4,
        n_key_value_heads=2,
        d_head=4,
        d_mlp=24,
        d_vocab=40,
        n_ctx=16,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=4,
        dtype=torch.float64,
        device="cpu",
        seed=0,
    )
    model = HookedTransformer(config).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model.requires_grad_(False)


def scores_by_finite_differences(
    peer: EdgeAttributionPatching, clean: Tensor, differences: Tensor, begin: Callable[..., Tensor]
) -> Tensor:
    """The scores by central differences: one edge at a time is patched by a small step.

    Args:
        peer: whose edges are scored.
        clean: the ids.
        differences: z'_u − z_u, [batch, pos, writer, d_model].
        begin: the hook at the beginning of the run.
    """

    def value(place: str, reader: int, step: Tensor) -> Tensor:
        edits = {place: functools.partial(add_to_reader, reader, step)}
        begun = peer.model.hooks([(START, begin)])
        with torch.no_grad(), begun, edited_inputs(peer.model, edits):
            return peer.value(peer.model(clean))

    scores = peer.empty_scores()
    column = 0
    for place, (upstream, count) in peer.ends.readers.items():
        for reader in range(count):
            for writer in range(upstream):
                step = FINITE_STEP * differences[:, :, writer]
                above = value(place, reader, step)
                below = value(place, reader, -step)
                scores[writer, column] = (above - below) / (2 * FINITE_STEP)
            column += 1
    return scores


def add_to_reader(reader: int, step: Tensor, stream: Tensor) -> Tensor:
    """The stream of several readers, with a step added to what one of them takes."""
    changed = stream.clone()
    of_readers = changed.view(*changed.shape[:2], -1, changed.shape[-1])
    of_readers[:, :, reader] += step
    return changed


def relative_error(scores: Tensor, expected: Tensor) -> float:
    """The largest difference of two scores, as a share of the largest; NaN if any score is."""
    return float((scores - expected).abs().max() / expected.abs().max())


class Errors(NamedTuple):
    """The relative errors of EAP's and of EAP-IG's scores."""

    eap: float
    integrated: float


def errors_of_scores(by_head: bool) -> Errors:
    """Compare both peers on the tiny model with finite differences."""
    model = tiny_model(by_head)
    clean = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    other = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(2))
    peer = EdgeAttributionPatching(model, by_head, lambda logits: logits[:, -1, 3].sum())
    steps = 3
    eap = peer.eap(clean, lambda: model(other))
    integrated = peer.integrated(clean, other, steps)
    differences = peer.differences(clean, other)
    at_steps: list[Tensor] = []
    with heads_apart(model, by_head):
        for step in range(1, steps + 1):
            begin = functools.partial(between, differences[:, :, 0], 1 - step / steps)
            at_steps.append(scores_by_finite_differences(peer, clean, differences, begin))
    # The last step begins with the clean prompt, as EAP does.
    return Errors(
        eap=relative_error(eap, at_steps[-1]),
        integrated=relative_error(integrated, torch.stack(at_steps).mean(0)),
    )


def check_scores() -> None:
    """Print the errors of both peers, by block and by head, and refuse scores that are wrong."""
    for by_head in (False, True):
        errors = errors_of_scores(by_head)
        print(
            f"by head: {by_head}; EAP off by {errors.eap:.0e}, EAP-IG by {errors.integrated:.0e}",
            flush=True,
        )
        # NaN is below no bound.
        if not (errors.eap <= TOLERANCE and errors.integrated <= TOLERANCE):
            raise SystemExit("the scores are not those of finite differences")


@contextlib.contextmanager
def merged(weight: Tensor, delta: Tensor) -> Iterator[None]:
    """Add ΔW to a weight within the block."""
    before = weight.detach().clone()
    weight.data += delta
    try:
        yield
    finally:
        weight.data.copy_(before)


def check_against_edges(lens: ll.LoraLens) -> None:
    """Refuse to go on if EAP's scores of one module are not those of `ll.edges`."""
    prompts = text_prompts(lens, 1, 8)
    for by_head in (False, True):
        errors = {kind: error_beside_edges(lens, prompts, by_head, kind) for kind in WRITERS}
        shown = ", ".join(f"{kind} by {error:.0e}" for kind, error in errors.items())
        print(f"by head: {by_head}; EAP and ll.edges of one module differ: {shown}")
        # NaN is below no bound.
        if not all(error <= TOLERANCE_MERGED for error in errors.values()):
            raise SystemExit("the two disagree")


def error_beside_edges(
    lens: ll.LoraLens, prompts: ll.results.Prompts, by_head: bool, kind: str
) -> float:
    """How far EAP's scores of one module are from `ll.edges`, as a share of the largest.

    Args:
        lens: the adapter over the embedded model.
        prompts: the prompts.
        by_head: whether heads are readers and writers, or blocks.
        kind: the module, one of `WRITERS`.
    """
    alone = lens.with_adapter(lens.adapter.only(WRITERS[kind]))
    readers = "head" if by_head else "block"
    found = ll.edges(alone, prompts, MARGIN, readers, progress=False)
    peer = EdgeAttributionPatching(lens.model, by_head, margin_of(lens))
    (update,) = alone.adapter.modules.values()
    block = lens.model.blocks[LAYER]
    weight = block.mlp.W_out if kind == "mlp.down" else block.attn.W_O
    delta = (update.scale * update.B @ update.A).T.reshape(weight.shape)

    def adapted_run() -> None:
        with merged(weight, delta):
            lens.model(prompts.tokens)

    scores = peer.eap(prompts.tokens, adapted_run)
    # The writers are the embedding, then of each block its heads and its MLP.
    heads = int(lens.model.cfg.n_heads) if by_head else 1
    first_head = 1 + LAYER * (heads + 1)
    mlp = first_head + heads
    of_module = scores[mlp] if kind == "mlp.down" else scores[first_head:mlp].sum(0)
    return relative_error(of_module, in_order_of_ends(found, peer.ends))


def in_order_of_ends(found: ll.results.Edges, ends: Ends) -> Tensor:
    """The edges of one writer in the order of `ends`; those that are not downstream are zero."""
    values = dict(zip(found.readers, found.values[0, 0].tolist(), strict=True))
    ordered: list[float] = []
    for name, (_, count) in ends.readers.items():
        block, _, part = name.rpartition(".")
        for head in range(count):
            readers = {
                "hook_q_input": f"{block}.attn.{head}.q",
                "hook_k_input": f"{block}.attn.{head}.k",
                "hook_v_input": f"{block}.attn.{head}.v",
                "hook_mlp_in": f"{block}.mlp",
                "ln1": f"{block}.attn",
                "ln2": f"{block}.mlp",
                "ln_final": "logits",
            }
            ordered.append(values[readers[part]])
    return torch.tensor(ordered)


# --- What does it cost?


def margin_of(lens: ll.LoraLens) -> Value:
    """The margin of the demo at the last position, from all logits."""
    read = MARGIN.of_logits(lens.model, 1)
    return lambda logits: read(logits[:, -1]).sum()


def measured_costs(lens: ll.LoraLens, tokens: int, turns: int) -> dict[str, dict[str, float]]:
    """Seconds and MiB of each method; for `path=True` the seconds of a single run."""
    prompts = text_prompts(lens, 1, tokens)
    clean = prompts.tokens
    other = text_ids(lens.model.tokenizer, 1, tokens, seed=1)
    methods: dict[str, Run] = {
        "F": functools.partial(plain_forward, lens, prompts),
        "FB": functools.partial(plain_backward, lens, prompts),
    }
    path_methods: dict[str, Run] = {}
    for by_head in (False, True):
        readers = "head" if by_head else "block"
        peer = EdgeAttributionPatching(lens.model, by_head, margin_of(lens))
        other_run = functools.partial(lens.model, other)
        eap = functools.partial(peer.eap, clean, other_run)
        integrated = functools.partial(peer.integrated, clean, other)
        edges_of_lens = functools.partial(ll.edges, lens, prompts, MARGIN, readers, progress=False)
        methods[f"EAP, by {readers}"] = eap
        methods[f"EAP-IG of {STEPS} steps, by {readers}"] = integrated
        methods[f"`ll.edges`, by {readers}"] = edges_of_lens
        along_path = functools.partial(edges_of_lens, path=True)
        path_methods[f"`ll.edges(path=True)`, by {readers}"] = along_path
    seconds = median_seconds(methods, turns)
    costs: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        mib = round(peak_memory(method), 0)
        costs[name] = {"seconds": round(seconds[name], 4), "mib": mib}
    for name, method in path_methods.items():
        costs[name] = {"seconds": round(cpu_seconds(method), 4)}
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--check", action="store_true", help="stop after the check against finite differences"
    )
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_scores()
    if options.check:
        return
    model, _ = hooked_model(*load_embedded(quiet=True), kind="HookedTransformer")
    lens = ll.LoraLens(model.requires_grad_(False), ll.load_adapter(shipped_adapter()))
    check_against_edges(lens)
    load_at_start = load_average()
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for tokens in options.tokens:
        costs[str(tokens)] = measured_costs(lens, tokens, options.turns)
    peers = {
        "day": str(datetime.date.today()),
        "versions": versions(),
        "turns": options.turns,
        "steps": STEPS,
        "costs": costs,
        "load": [load_at_start, load_average()],
        "gflops": round(matmul_peak() / 1e9),
    }
    print(edges.peer_table(peers))
    if options.write:
        numbers = json.loads(edges.NUMBERS.read_text()) | {"peers": peers}
        edges.NUMBERS.write_text(json.dumps(numbers, indent=0) + "\n")
        marks.write(edges.PAGE, edges.tables(numbers))


if __name__ == "__main__":
    main()
