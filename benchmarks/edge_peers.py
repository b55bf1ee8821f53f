"""Compare what edges cost with edge attribution patching (EAP) and with its integrated form.

    python -m benchmarks.edge_peers --check               # are the scores of both peers right?
    python -m benchmarks.edge_peers --write               # time and memory, into docs/edges_data.md

1. EAP (Syed et al., arXiv 2310.10348) has two runs of one model, clean and other. With z_u what
   writer u adds to the residual stream, and x_v what reader v alone takes from it, it scores

       score(u → v) = ⟨z'_u − z_u, ∂g/∂x_v⟩.

   That is one forward pass, and one forward and backward pass.
2. EAP-IG (Hanna et al., arXiv 2403.17806) has two prompts, and takes the mean of ∂g/∂x_v over runs
   whose input embeddings lie between theirs: a forward and a backward pass for each of its steps.
3. `--check` compares every score of both on a tiny model in float64 with finite differences: the
   edge's difference is added to what its reader takes, and g is run again.
4. On the embedded model an adapter of one module is merged for EAP's other run. Its block is then
   the only one upstream that writes something else, so EAP's scores of it are those of `ll.edges`;
   they are compared before anything is timed. All three run on one HookedTransformer, in turns,
   on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import lens_lora as ll
from benchmarks import edges, marks
from benchmarks.measuring import (
    MARGIN,
    cpu_seconds,
    load,
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

STEPS = 5
# The embeddings' output, where a run begins.
START = "blocks.0.hook_resid_pre"
# A block amid the others, and its modules that write to the residual stream directly.
LAYER = 12
WRITERS = {
    "mlp.down": f"*.layers.{LAYER}.mlp.down_proj",
    "attn.o": f"*.layers.{LAYER}.self_attn.o_proj",
}
# The other run has merged weights in float32, which round ΔW.
SAME = 3e-4
# The step of a central difference in float64, whose error falls as its square.
FINITE = 1e-4
EXACT = 1e-7

Value = Callable[[Tensor], Tensor]
Edit = Callable[[Tensor], Tensor]
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Where the writers of a HookedTransformer write, and where its readers read.

    Attributes:
        writers: each hook point, with the number of writers there: heads, or one.
        readers: each hook point, or norm whose input it is, with how many of the writers are
            upstream of it, and how many readers it has.
    """

    writers: dict[str, int]
    readers: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, model: Any, by_head: bool) -> Ends:
        """The ends of all edges, by head or by block."""
        heads = int(model.cfg.n_heads) if by_head else 1
        key_heads = (model.cfg.n_key_value_heads or heads) if by_head else 1
        writers = {START: 1}
        readers: dict[str, tuple[int, int]] = {}
        for layer in range(model.cfg.n_layers):
            block = f"blocks.{layer}"
            upstream = sum(writers.values())
            if by_head:
                readers[f"{block}.hook_q_input"] = (upstream, heads)
                readers[f"{block}.hook_k_input"] = (upstream, key_heads)
                readers[f"{block}.hook_v_input"] = (upstream, key_heads)
                writers[f"{block}.attn.hook_result"] = heads
                readers[f"{block}.hook_mlp_in"] = (sum(writers.values()), 1)
            else:
                readers[f"{block}.ln1"] = (upstream, 1)
                writers[f"{block}.hook_attn_out"] = 1
                readers[f"{block}.ln2"] = (sum(writers.values()), 1)
            writers[f"{block}.hook_mlp_out"] = 1
        readers["ln_final"] = (sum(writers.values()), 1)
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
def replaced(model: Any, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace what readers take: each by its hook point, or by the norm whose input it is.

    A HookedTransformer calls the norm before attention three times, for queries, keys and values.
    A block is one reader, so all three are given one and the same tensor.
    """
    taken: dict[str, Tensor] = {}
    handles: list[Any] = []

    def of_norm(name: str, edit: Edit) -> None:
        def before(module: object, given: tuple[Tensor]) -> tuple[Tensor]:
            if name not in taken:
                taken[name] = edit(given[0])
            return (taken[name],)

        handles.append(model.get_submodule(name).register_forward_pre_hook(before))

    hooks: list[tuple[str, Any]] = []
    for name, edit in edits.items():
        if "hook_" in name:
            hooks.append((name, lambda stream, hook, edit=edit: edit(stream)))
        else:
            of_norm(name, edit)
    try:
        with model.hooks(hooks):
            yield
    finally:
        for handle in handles:
            handle.remove()


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
            with torch.no_grad(), self.model.hooks(self._added_to(differences, 1.0)):
                other()
            scores = self._empty_scores()
            hooks = [(START, as_leaf), *self._added_to(differences, -1.0)]
            self._backward(clean, hooks, differences, scores)
        return scores

    def integrated(self, clean: Tensor, other: Tensor, steps: int = STEPS) -> Tensor:
        """Score every edge between two prompts by the mean of gradients, [writer, reader]."""
        with heads_apart(self.model, self.by_head), torch.enable_grad():
            differences = self._empty(clean)
            with torch.no_grad():
                for ids, sign in ((other, 1.0), (clean, -1.0)):
                    with self.model.hooks(self._added_to(differences, sign)):
                        self.model(ids)
            scores = self._empty_scores()
            for step in range(1, steps + 1):
                begin = functools.partial(between, differences[:, :, 0], 1 - step / steps)
                self._backward(clean, [(START, begin)], differences, scores)
        return scores / steps

    def _empty(self, ids: Tensor) -> Tensor:
        """Zeros for what each writer writes, [batch, pos, writer, d_model]."""
        writers = sum(self.ends.writers.values())
        size = (*ids.shape, writers, self.model.cfg.d_model)
        return torch.zeros(size, dtype=self.model.cfg.dtype)

    def _empty_scores(self) -> Tensor:
        """Zeros, [writer, reader]."""
        readers = sum(count for _, count in self.ends.readers.values())
        return torch.zeros(sum(self.ends.writers.values()), readers, dtype=self.model.cfg.dtype)

    def _added_to(self, differences: Tensor, sign: float) -> list[tuple[str, Any]]:
        """Hooks that add what each writer writes to its part of `differences`."""
        hooks: list[tuple[str, Any]] = []
        first = 0
        for name, count in self.ends.writers.items():
            part = differences[:, :, first : first + count]

            def add(written: Tensor, hook: object, part: Tensor = part) -> None:
                part.add_(written.detach().view(part.shape), alpha=sign)

            hooks.append((name, add))
            first += count
        return hooks

    def _backward(
        self, clean: Tensor, hooks: list[tuple[str, Any]], differences: Tensor, scores: Tensor
    ) -> None:
        """Run forward and back once, and add each reader's column to the scores."""
        edits: dict[str, Edit] = {}
        first = 0
        for name, (upstream, count) in self.ends.readers.items():
            columns = scores[:upstream, first : first + count]

            def contract(gradient: Tensor, columns: Tensor, upstream: int) -> None:
                by_reader = gradient.view(*gradient.shape[:2], -1, gradient.shape[-1])
                written = differences[:, :, :upstream]
                columns.add_(torch.einsum("bpwd,bprd->wr", written, by_reader))

            def tap(stream: Tensor, columns: Tensor = columns, upstream: int = upstream) -> Tensor:
                stream = stream.view_as(stream)
                stream.register_hook(
                    functools.partial(contract, columns=columns, upstream=upstream)
                )
                return stream

            edits[name] = tap
            first += count
        with self.model.hooks(hooks), replaced(self.model, edits):
            self.value(self.model(clean)).backward()


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


def patched(
    peer: EdgeAttributionPatching, clean: Tensor, differences: Tensor, begin: Any
) -> Tensor:
    """The scores by central differences: one edge at a time is patched by a small step."""
    expected = peer._empty_scores()
    column = 0
    for name, (upstream, count) in peer.ends.readers.items():
        for reader in range(count):
            for writer in range(upstream):
                step = FINITE * differences[:, :, writer]

                def patch(
                    stream: Tensor, sign: float, step: Tensor = step, reader: int = reader
                ) -> Tensor:
                    moved = stream.clone()
                    by_reader = moved.view(*moved.shape[:2], -1, moved.shape[-1])
                    by_reader[:, :, reader] += sign * step
                    return moved

                ends = []
                for sign in (1.0, -1.0):
                    edit = functools.partial(patch, sign=sign)
                    begun = peer.model.hooks([(START, begin)])
                    with torch.no_grad(), begun, replaced(peer.model, {name: edit}):
                        ends.append(peer.value(peer.model(clean)))
                expected[writer, column] = (ends[0] - ends[1]) / (2 * FINITE)
            column += 1
    return expected


def check(by_head: bool) -> tuple[float, float]:
    """The largest error of EAP's and EAP-IG's scores, as a share of the largest score."""
    model = tiny_model(by_head)
    clean = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    other = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(2))
    peer = EdgeAttributionPatching(model, by_head, lambda logits: (logits[:, -1, 3]).sum())
    once = peer.eap(clean, lambda: model(other))
    integrated = peer.integrated(clean, other, steps=3)
    with heads_apart(model, by_head):
        differences = peer._empty(clean)
        for ids, sign in ((other, 1.0), (clean, -1.0)):
            with torch.no_grad(), model.hooks(peer._added_to(differences, sign)):
                model(ids)
        begins = [
            functools.partial(between, differences[:, :, 0], 1 - step / 3) for step in (1, 2, 3)
        ]
        expected = [patched(peer, clean, differences, begin) for begin in begins]
    # At its last step the run begins with the clean prompt.
    apart = (once - expected[-1]).abs().max() / expected[-1].abs().max()
    mean = torch.stack(expected).mean(0)
    return float(apart), float((integrated - mean).abs().max() / mean.abs().max())


@contextlib.contextmanager
def merged(weight: Tensor, delta: Tensor) -> Iterator[None]:
    """Add ΔW to a weight within the block."""
    before = weight.detach().clone()
    weight.data += delta
    try:
        yield
    finally:
        weight.data.copy_(before)


def beside_edges(lens: ll.LoraLens, prompts: ll.results.Prompts, by_head: bool) -> float:
    """How far EAP's scores of one module are from `ll.edges`, as a share of the largest."""
    apart = 0.0
    for kind, module in WRITERS.items():
        alone = lens.with_adapter(lens.adapter.only(module))
        readers = "head" if by_head else "block"
        found = ll.edges(alone, prompts, MARGIN, readers, progress=False)
        peer = EdgeAttributionPatching(lens.model, by_head, margin_of(lens))
        (update,) = alone.adapter.modules.values()
        block = lens.model.blocks[LAYER]
        weight = block.mlp.W_out if kind == "mlp.down" else block.attn.W_O
        delta = (update.scale * update.B @ update.A).T.reshape(weight.shape)

        def adapted(weight: Tensor = weight, delta: Tensor = delta) -> None:
            with merged(weight, delta):
                lens.model(prompts.tokens)

        scores = peer.eap(prompts.tokens, adapted)
        heads = int(lens.model.cfg.n_heads) if by_head else 1
        first = 1 + LAYER * (heads + 1)
        attention, mlp = scores[first : first + heads].sum(0), scores[first + heads]
        scores = attention if kind == "attn.o" else mlp
        expected = by_reader(found, peer.ends)
        apart = max(apart, float((scores - expected).abs().max() / expected.abs().max()))
    return apart


def by_reader(found: Any, ends: Ends) -> Tensor:
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


def measured(lens: ll.LoraLens, tokens: int, turns: int) -> dict[str, dict[str, float]]:
    """Seconds and MiB of each way, by its name; of edges along the path the seconds of one run."""
    prompts = text_prompts(lens, 1, tokens)
    clean = prompts.tokens
    other = text_ids(lens.model.tokenizer, 1, tokens, seed=1)
    works: dict[str, Run] = {
        "F": functools.partial(plain_forward, lens, prompts),
        "FB": functools.partial(plain_backward, lens, prompts),
    }
    along: dict[str, Run] = {}
    for by_head in (False, True):
        readers = "head" if by_head else "block"
        peer = EdgeAttributionPatching(lens.model, by_head, margin_of(lens))
        works[f"EAP, by {readers}"] = functools.partial(
            peer.eap, clean, functools.partial(lens.model, other)
        )
        works[f"EAP-IG of {STEPS} steps, by {readers}"] = functools.partial(
            peer.integrated, clean, other
        )
        ours = functools.partial(ll.edges, lens, prompts, MARGIN, readers, progress=False)
        works[f"`ll.edges`, by {readers}"] = ours
        along[f"`ll.edges(path=True)`, by {readers}"] = functools.partial(ours, path=True)
    seconds = median_seconds(works, turns)
    found = {
        name: {"seconds": round(seconds[name], 4), "mib": round(peak_memory(work), 0)}
        for name, work in works.items()
    }
    for name, work in along.items():
        found[name] = {"seconds": round(cpu_seconds(work), 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="only by finite differences")
    parser.add_argument("--write", action="store_true", help="into docs/")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for by_head in (False, True):
        once, integrated = check(by_head)
        print(f"by head: {by_head}; EAP off by {once:.0e}, EAP-IG by {integrated:.0e}", flush=True)
        if max(once, integrated) > EXACT:
            raise SystemExit("the scores are not those of finite differences")
    if asked.check:
        return
    model, _ = hooked_model(*load_embedded(quiet=True), kind="HookedTransformer")
    lens = ll.LoraLens(model.requires_grad_(False), ll.load_adapter(shipped_adapter()))
    for by_head in (False, True):
        apart = beside_edges(lens, text_prompts(lens, 1, 8), by_head)
        print(f"by head: {by_head}; EAP and ll.edges of one module differ by {apart:.0e}")
        if apart > SAME:
            raise SystemExit("the two disagree")
    at_start = load()
    peers = {
        "day": str(datetime.date.today()),
        "versions": versions(),
        "turns": asked.turns,
        "steps": STEPS,
        "costs": {str(tokens): measured(lens, tokens, asked.turns) for tokens in asked.tokens},
        "load": [at_start, load()],
        "gflops": round(matmul_peak() / 1e9),
    }
    print(edges.peer_table(peers))
    if asked.write:
        numbers = json.loads(edges.NUMBERS.read_text()) | {"peers": peers}
        edges.NUMBERS.write_text(json.dumps(numbers, indent=0) + "\n")
        marks.write(edges.PAGE, edges.tables(numbers))


if __name__ == "__main__":
    main()
