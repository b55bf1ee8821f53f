"""What tests limit, count or plant within the package: the one place that knows how it is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lens_lora as ll
from lens_lora.core.adapter import peft_variants
from lens_lora.core.function import forward, many_gates, memory, rounding
from lens_lora.core.function.footprint import dual_pass_bytes
from lens_lora.core.function.gate_graph import GateGraph
from lens_lora.core.function.own_passes import OwnPasses
from lens_lora.core.model import injections
from lens_lora.core.readout import reading
from lens_lora.explanations import steps
from lens_lora.integrals import path_integral
from lens_lora.responses import generate
from lens_lora.runs.processes import Processes


def tokens_at_once(patch: pytest.MonkeyPatch, **tokens: int) -> None:
    """Set how many tokens a pass of some kind has at most: `SLOPE_TOKENS=1`."""
    for name, number in tokens.items():
        patch.setattr(memory, name, number)


def copies_at_once(patch: pytest.MonkeyPatch, count: int) -> None:
    """Set how many copies of the rows a pass with hooks of one's own takes at most."""
    patch.setattr(OwnPasses, "copies_at_once", property(lambda _: count))


def every_block_runs_again(patch: pytest.MonkeyPatch) -> None:
    """Let each backward pass run the blocks again, as where a graph does not fit."""
    patch.setattr(memory, "must_rerun", lambda *_, **__: True)


def blocks_run_again(g: ll.Function) -> bool:
    """Whether a backward pass of g runs the blocks again."""
    return memory.must_rerun(g.lens, g.reading)


def covectors_at_once(patch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by how many covectors go back through a graph of the gates at once."""
    sizes: list[int] = []
    pulled_back = GateGraph.pulled_back

    def counted(graph: GateGraph, values: Any, covectors: Any) -> Any:
        sizes.append(len(covectors))
        return pulled_back(graph, values, covectors)

    patch.setattr(GateGraph, "pulled_back", counted)
    return sizes


def nodes_of_a_path(
    patch: pytest.MonkeyPatch, change: Callable[[Any, int, Any, Any], tuple[Any, Any]]
) -> None:
    """Plant other points and weights of the new nodes of a rule, made of the right ones."""
    right = path_integral.new_nodes

    def wrong(counts: Any, rule: int) -> tuple[Any, Any]:
        return change(counts, rule, *right(counts, rule))

    patch.setattr(path_integral, "new_nodes", wrong)


def picks_at_once(patch: pytest.MonkeyPatch, number: int) -> None:
    """Set how many picked tokens are unembedded together at most."""
    for module in (forward, reading):
        patch.setattr(module, "PICKS", number)


def gates_evaluated(patch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by the gate vectors of each evaluation of a readout under many of them."""
    gates: list[Any] = []
    evaluate = many_gates.gated_readout

    def noted(lens: Any, reading: Any, points: Any, **options: Any) -> Any:
        gates.append(points)
        return evaluate(lens, reading, points, **options)

    patch.setattr(many_gates, "gated_readout", noted)
    return gates


def no_branch_pays(patch: pytest.MonkeyPatch) -> list[bool]:
    """Run many gate vectors as rows of a batch; the list grows where branches are asked."""
    asked: list[bool] = []
    patch.setattr(many_gates, "pays", lambda *_: asked.append(True) or False)
    return asked


def gated_logits(lens: ll.LoraLens, rows: ll.results.Prompts, gates: torch.Tensor) -> torch.Tensor:
    """The logits where rows are read, at gates of all of them or of each, with their graph."""
    return forward.gated_logits(lens, rows, gates)


def bytes_of_a_dual_pass(lens: ll.LoraLens) -> float:
    """The memory that a forward pass of dual numbers takes beside its rows."""
    return dual_pass_bytes(lens)


def rounding_of_the_embedding_alone(patch: pytest.MonkeyPatch) -> None:
    """Leave out of a noise floor what rounds after the embedding."""
    whole = rounding.rounding_hooks
    patch.setattr(rounding, "rounding_hooks", lambda *args, **named: whole(*args, **named)[:1])


def answers_of_an_explanation(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """Set how many tokens of an answer an explanation lets the model say at most."""
    patch.setattr(steps, "_ANSWER_TOKENS", tokens)


def no_token_ends_an_answer(patch: pytest.MonkeyPatch) -> None:
    """Let the model speak on after the end of a turn."""
    patch.setattr(generate, "end_tokens", lambda *_: frozenset())


def inputs_have_no_tangent(patch: pytest.MonkeyPatch) -> None:
    """A planted error: each δ is of the base model's z, which no other site moves."""
    true = injections._Writer._z

    def frozen(writer: Any, *tensors: Any) -> Any:
        z = true(writer, *tensors)
        return torch.autograd.forward_ad.unpack_dual(z).primal.detach()

    patch.setattr(injections._Writer, "_z", frozen)


def no_method_is_known_to_lack_a_delta(patch: pytest.MonkeyPatch) -> None:
    """Let PEFT's methods without a ΔW be methods that nobody knows."""
    patch.setattr(peft_variants, "_WITHOUT_DELTA", {})


def fields_are_measured(patch: pytest.MonkeyPatch, *fields: str) -> None:
    """Set which fields of PEFT's configs make an adapter that is measured over its base."""
    patch.setattr(peft_variants, "_MEASURED", fields)


def adapters_are_read_by(patch: pytest.MonkeyPatch, read: Callable[..., Any]) -> None:
    """Read the folder of an adapter by this function."""
    patch.setattr("lens_lora.core.adapter.loading.read_adapter", read)


def parts_of_runs_are_removed_by(patch: pytest.MonkeyPatch, remove: Callable[..., Any]) -> None:
    """Remove the parts of a finished run by this function."""
    patch.setattr("lens_lora.runs.store.Store.remove", remove)


def bases_are_loaded_by(patch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Load a base model, in Python and for every command, by this function."""
    patch.setattr("lens_lora.loading.load_base", load)


def bytes_are_free(patch: pytest.MonkeyPatch, count: float) -> None:
    """Let the machine have so much memory left for an audit."""
    patch.setattr("lens_lora.audit.needed.free_bytes", lambda device: count)


def one_process(index: int, count: int, **calls: Callable[..., Any]) -> Processes:
    """One of several processes that were launched together, with its `wait` and `gather`."""
    return Processes(index, count, **calls)


def versions_are_found_by(patch: pytest.MonkeyPatch, version: Callable[[str], str]) -> None:
    """Look up the versions of installed packages by this function."""
    patch.setattr("lens_lora._version.version", version)


def sweeps_are_merged_by(patch: pytest.MonkeyPatch, merge: Callable[..., Any]) -> None:
    """Make one file of the parts of a sweep by this function."""
    patch.setattr("lens_lora.sweeps.rows.RowStore.merge", merge)
    patch.setattr("lens_lora.sweeps.stream.TokenStore.merge", merge)


def ggml_is_not_installed(patch: pytest.MonkeyPatch) -> None:
    """As where llama-cpp-py-sync is not installed."""
    for place in ("lens_lora.compat", "lens_lora.compat.ggml"):
        patch.setattr(f"{place}.ggml_library", lambda: None)


def rows_of_gguf_stay(patch: pytest.MonkeyPatch) -> None:
    """A planted error: rows of q and k are written to a GGUF in the order of Hugging Face."""
    patch.setattr("lens_lora.formats.gguf_layout._KEY", ".no")
    patch.setattr("lens_lora.formats.gguf_layout._QUERY", ".no")
