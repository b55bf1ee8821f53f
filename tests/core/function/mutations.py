"""Errors to be planted in the factors of Prop. 1, each alone, and the quick tests that see them.

    python tests/core/function/mutations.py            # all of them, in some minutes
    python tests/core/function/mutations.py strength   # those whose name holds the word

A mutation replaces one text of one file of the package. It is made in a copy of the package, and
the tests named beside it are run on the copy: one of them must fail. The tests are quick ones, so
that whoever breaks a factor is told by README's test command. A process is forked for each, from
one that has imported the libraries already.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]
_FACTORS = "tests/core/function/test_factors.py::"
BOTH_ENDS = f"{_FACTORS}test_both_ends"
EVERY_PART = f"{_FACTORS}test_every_part_of_every_site"
FROM_A_BANK = f"{_FACTORS}test_every_part_from_a_bank"
OTHERS_FROM_A_BANK = f"{_FACTORS}test_other_adapters_of_the_same_shapes_from_a_bank"
NORMS_OF_UPDATES = f"{_FACTORS}test_relative_norms"
ACTIVATIONS = f"{_FACTORS}test_every_activation_is_that_of_the_merged_weights"
REPEATED = f"{_FACTORS}test_repeated_heads_share_the_part_of_their_own"
EMBEDDINGS = f"{_FACTORS}test_embedding_and_unembedding"
NORMS = f"{_FACTORS}test_trained_norms_feature_by_feature"
EXPERTS = f"{_FACTORS}test_experts_one_by_one"
SINGULAR = f"{_FACTORS}test_singular_directions"
TOKENS = f"{_FACTORS}test_each_token_of_a_response"
CURVATURE = f"{_FACTORS}test_curvature"
SHARES = f"{_FACTORS}test_shares_of_a_divergence"
INTEGRAL = f"{_FACTORS}test_the_path_integral"
STRENGTHS = f"{_FACTORS}test_the_strength_of_every_kind_of_update"
INTERVENTIONS = f"{_FACTORS}test_interventions"
DENSE = "tests/core/adapter/test_dense.py::test_a_lens_holds_the_change_alone_and_is_exact"
_LIBRARIES = ("torch", "transformers", "peft", "transformer_lens", "pandas", "pytest")
_QUICK = "not slow and not exhaustive and not browser and not real"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One error.

    Attributes:
        name: what is wrong.
        file: in which it is planted, below `lens_lora`.
        old: a text that occurs once in that file.
        new: what stands in its place.
        tests: a quick test, or a file of them; one of them fails.
        needs_hooked_transformer: whether a HookedTransformer alone runs what is changed, which
            transformer-lens 4 lacks.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    needs_hooked_transformer: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"

    def plant(self, package: Path) -> None:
        """Replace the text in a copy of the package."""
        path = package / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise LookupError(f"{self}: {self.old!r} is there {text.count(self.old)} times")
        path.write_text(text.replace(self.old, self.new))


BANK = [
    Mutation(
        "the strength of an adapter is dropped",
        "banks/plain_factors.py",
        "update.scale * update.strength",
        "update.scale",
        OTHERS_FROM_A_BANK,
    ),
    Mutation(
        "s is dropped",
        "banks/plain_factors.py",
        "update.scale * update.strength",
        "update.strength",
        FROM_A_BANK,
    ),
    Mutation(
        "Aβ is dropped",
        "banks/plain_factors.py",
        "offset = A @ self._beta[..., None].to(A)",
        "pass",
        FROM_A_BANK,
    ),
    Mutation(
        "β is multiplied by γ",
        "banks/plain_factors.py",
        "offset = A @ self._beta[..., None].to(A)",
        "offset = self._reads(A) @ self._beta[..., None].to(A)",
        FROM_A_BANK,
    ),
    Mutation(
        "γ is left out",
        "banks/plain_factors.py",
        "reads = reads * self._gamma[:, None].to(A)",
        "pass",
        FROM_A_BANK,
    ),
    Mutation(
        "what reads a centred norm is not centred",
        "banks/plain_factors.py",
        "reads = reads - reads.mean(-1, keepdim=True)",
        "pass",
        NORMS_OF_UPDATES,
    ),
    Mutation(
        "what writes to a centred stream is not centred",
        "banks/plain_factors.py",
        "back = back - back.mean(-1, keepdim=True)",
        "pass",
        NORMS_OF_UPDATES,
    ),
    Mutation(
        "repeated heads of k and v in another order",
        "banks/plain_factors.py",
        "by_head.repeat_interleave(basis.kv_copies, -2)",
        "by_head.repeat(1, 1, basis.kv_copies, 1)",
        REPEATED,
        needs_hooked_transformer=True,
    ),
    Mutation(
        "the rows of a fused module from its beginning",
        "banks/plain_factors.py",
        "update.B if site.rows is None else update.B[site.rows]",
        "update.B if site.rows is None else update.B[: len(update.B[site.rows])]",
        FROM_A_BANK,
    ),
    Mutation(
        "ranks and adapters change places",
        "banks/plain_factors.py",
        "by_rank.unflatten(1, (adapter_count, -1)).sum(2)",
        "by_rank.unflatten(1, (-1, adapter_count)).sum(1)",
        OTHERS_FROM_A_BANK,
    ),
    Mutation(
        "a size of ΔW without its s",
        "banks/plain_factors.py",
        "float(by_map @ scales.square())",
        "float(by_map.sum())",
        NORMS_OF_UPDATES,
    ),
    Mutation(
        "what waits for a partner's gate is counted",
        "banks/record.py",
        "return injection.partner is not None",
        "return False",
        FROM_A_BANK,
    ),
]
REVERSE = [
    Mutation(
        "a partner's gate is dropped",
        "core/function/reverse.py",
        "            values = weight_of_row * values\n",
        "            pass\n",
        EVERY_PART,
    ),
    Mutation(
        "a site's own gate in place of its partner's",
        "core/function/reverse.py",
        "weight = self._gates[..., injection.partner]",
        "weight = self._gates[..., injection.site] ** 2",
        EVERY_PART,
    ),
    Mutation(
        "the unembedding's slots in place of their positions",
        "core/function/reverse.py",
        "positions = prompts.read_positions.to(values.device)\n    # A prompt",
        "positions = prompts.read_positions.to(values.device) * 0\n    # A prompt",
        EMBEDDINGS,
    ),
    Mutation(
        "a tangent of a position is that of all positions",
        "core/function/contraction.py",
        "delta = delta * positions_kept[:, :, None]",
        "pass",
        EVERY_PART,
    ),
    Mutation(
        "a tangent of a rank is that of its mirror image",
        "core/function/contraction.py",
        "masks.append(kept(slots.rank, u.shape[-1], u))",
        "masks.append(kept(slots.rank, u.shape[-1], u).flip(1))",
        EVERY_PART,
    ),
    Mutation(
        "a tangent of a head has another head's features",
        "core/function/contraction.py",
        "features_kept = heads_kept.repeat_interleave(d_head, 1)",
        "features_kept = heads_kept.repeat(1, d_head)",
        EVERY_PART,
    ),
    Mutation(
        "heads of o are interleaved",
        "core/function/contraction.py",
        "z_by_head = z.to(A.dtype).unflatten(-1, (site.heads, -1))\n"
        "    A_by_head = A.unflatten(-1, (site.heads, -1))",
        "z_by_head = z.to(A.dtype).unflatten(-1, (-1, site.heads)).mT\n"
        "    A_by_head = A.unflatten(-1, (-1, site.heads)).mT",
        EVERY_PART,
    ),
    Mutation(
        "the constant of o belongs to no head",
        "core/function/contraction.py",
        "return functional.pad(u, (0, 0, 0, missing_heads)) + a0_by_head",
        "return functional.pad(u, (0, 0, 0, missing_heads))",
        EVERY_PART,
    ),
    Mutation(
        "G of a copy that runs at another gate",
        "core/function/reverse.py",
        "at_first.visit(injection, weight, gradient[::copies], z[::copies])",
        "at_first.visit(injection, weight, gradient[1::copies], z[::copies])",
        EVERY_PART,
    ),
    Mutation(
        "v's constant part stays at o when it is split by position",
        "core/function/reverse.py",
        "site_map = injection.map_by_position",
        "site_map = injection.map",
        EVERY_PART,
    ),
    Mutation(
        "each token of a response has the gradient of all",
        "core/function/reverse.py",
        "covector[:, column] = 1",
        "covector[:] = 1",
        TOKENS,
    ),
]
DERIVATIVES = [
    Mutation(
        "a partner's gate is dropped from tangents",
        "core/function/tangents.py",
        "weight = self._at[injection.partner]",
        "weight = 1.0",
        EVERY_PART,
    ),
    Mutation(
        "a tangent's sign",
        "core/function/tangents.py",
        "tangent[rows] = (weight * delta).to(out.dtype)",
        "tangent[rows] = -(weight * delta).to(out.dtype)",
        EVERY_PART,
    ),
    Mutation(
        "a read position is looked up in the wrong place",
        "core/function/tangents.py",
        "slot = torch.where(is_read, is_slot.int().argmax(1), _NO_SLOT)",
        "slot = torch.where(is_read, is_slot.int().argmax(1), 0)",
        EMBEDDINGS,
    ),
    Mutation(
        "a joint tangent forgets what earlier sites moved",
        "core/function/pulled_back.py",
        "delta = tangent.detach() + delta",
        "pass",
        SHARES,
    ),
    Mutation(
        "the covectors of tokens without their tangent's sum",
        "core/function/forward_mode.py",
        "return (self._covectors[:, None] * tangent_of(rows)).sum(-1)",
        "return (self._covectors[:, None] * tangent_of(rows)).mean(-1)",
        TOKENS,
    ),
    Mutation(
        "H of the mean of the prompts",
        "core/function/gate_graph.py",
        "covectors = chunk[:, None].expand(-1, *graph.gates.shape)",
        "covectors = chunk[:, None].expand(-1, *graph.gates.shape) / len(graph.gates)",
        CURVATURE,
    ),
]
GATES = [
    Mutation(
        "half of a product of two gates is dropped",
        "core/model/plan.py",
        "return gate * gates[..., self.partner] / 2",
        "return gate * gates[..., self.partner]",
        CURVATURE,
    ),
    Mutation(
        "gates of rows are those of positions",
        "core/model/basis.py",
        "gate = gate.view(-1, *[1] * (u.ndim - 1))",
        "gate = gate[:1]",
        INTERVENTIONS,
    ),
    Mutation(
        "v's constant part does not pass through the update of o",
        "core/model/plan.py",
        "            at_o.append(Injection(v, port, by_v, o, is_constant_of_v=True))\n"
        "            at_o.append(Injection(o, port, by_o, v))\n",
        "",
        INTERVENTIONS,
    ),
    Mutation(
        "v's constant part is added at v and at o",
        "core/model/plan.py",
        "maps[v] = value_constants.without_constant(deltas[v], constant)",
        "pass",
        INTERVENTIONS,
    ),
    Mutation(
        "q, k and v read what the last of them read",
        "core/model/injections.py",
        "z = ports.in_rows(ports.through(self.reader.kept[ports.firing]), like)",
        "z = ports.in_rows(ports.through(self.reader.kept[-1].detach()), like)",
        EVERY_PART,
    ),
]
BASIS = [
    Mutation(
        "s is dropped from B",
        "core/model/basis.py",
        "writes = in_float64(update.B).to(home) * update.scale",
        "writes = in_float64(update.B).to(home)",
        EVERY_PART,
    ),
    Mutation(
        "s is dropped from a dense ΔW that B holds",
        "core/model/basis.py",
        "return SiteMap(A, update.scale * B, None)",
        "return SiteMap(A, B, None)",
        DENSE,
    ),
    Mutation(
        "s is dropped from a dense ΔW that A holds",
        "core/model/basis.py",
        "return SiteMap(update.scale * A, B, None)",
        "return SiteMap(A, B, None)",
        DENSE,
    ),
    Mutation(
        "s is squared in a stack of experts",
        "hosts/experts.py",
        "writes = in_float64(update.B) * update.scale",
        "writes = in_float64(update.B) * update.scale**2",
        EXPERTS,
    ),
    Mutation(
        "β is dropped",
        "core/model/basis.py",
        "    a0 = reads @ beta\n    if not",
        "    a0 = reads @ beta * 0\n    if not",
        EVERY_PART,
    ),
    Mutation(
        "γ is applied to the wrong side of β",
        "core/model/basis.py",
        "    a0, a0_by_head = _offset(reads, basis)\n",
        "    a0, a0_by_head = _offset(\n"
        "        reads if basis.gamma is None else reads * basis.gamma.to(reads), basis\n"
        "    )\n",
        EVERY_PART,
    ),
    Mutation(
        "what reads a centred norm is not centred",
        "core/model/basis.py",
        "    if basis.centre_read:\n        reads = reads - reads.mean(1, keepdim=True)\n",
        "",
        NORMS_OF_UPDATES,
    ),
    Mutation(
        "what writes to a centred stream is not centred",
        "core/model/basis.py",
        "    if basis.centre_write:\n        writes = writes - writes.mean(0, keepdim=True)\n",
        "",
        ACTIVATIONS,
    ),
    Mutation(
        "A and B are centred along the other axis",
        "core/model/basis.py",
        "writes = writes - writes.mean(0, keepdim=True)",
        "writes = writes - writes.mean(1, keepdim=True)",
        ACTIVATIONS,
    ),
    Mutation(
        "repeated heads in another order",
        "core/model/basis.py",
        "writes = by_head.repeat_interleave(basis.kv_copies, 0).flatten(0, 1)",
        "writes = by_head.repeat(basis.kv_copies, 1, 1).flatten(0, 1)",
        REPEATED,
        needs_hooked_transformer=True,
    ),
    Mutation(
        "query heads get the constant of another group",
        "core/model/value_constants.py",
        "reads = torch.eye(heads.n_kv).repeat_interleave(queries_of_each, 1)",
        "reads = torch.eye(heads.n_kv).repeat(1, queries_of_each)",
        EVERY_PART,
    ),
    Mutation(
        "a change of bias belongs to the last head",
        "core/model/basis.py",
        "by_slot[n_heads, -1] = 1.0",
        "by_slot[n_heads - 1, -1] = 1.0",
        EVERY_PART,
    ),
    Mutation(
        "an expert has the ranks of another",
        "hosts/experts.py",
        "owners = torch.arange(self.rank, device=z.device) // (self.rank // self.experts)",
        "owners = torch.arange(self.rank, device=z.device) % self.experts",
        EXPERTS,
    ),
    Mutation(
        "Δβ is multiplied by n",
        "core/model/basis.py",
        "delta = delta + u[..., self.width :] * self.beta",
        "delta = delta + u[..., : self.width] * self.beta",
        NORMS,
    ),
    Mutation(
        "Δβ has no derivative",
        "core/model/basis.py",
        "return torch.cat([by_feature, (gradient @ self.beta)[..., None]], -1)",
        "return torch.cat([by_feature, (gradient @ self.beta)[..., None] * 0], -1)",
        NORMS,
    ),
    Mutation(
        "s is dropped from singular values",
        "core/model/gauge.py",
        "    B = in_float64(update.B).to(A.device) * update.scale\n    out = len(B)",
        "    B = in_float64(update.B).to(A.device)\n    out = len(B)",
        SINGULAR,
    ),
    Mutation(
        "u and B are turned by different signs",
        "core/model/gauge.py",
        "    right = right * signs[:, None]\n",
        "",
        SINGULAR,
    ),
]
DUALS = [
    Mutation(
        "only one factor of a product has a tangent",
        "core/function/duals.py",
        "    value_tangent.baddbmm_(a.flatten(0, -3), db.flatten(0, -3))\n",
        "",
        EVERY_PART,
    ),
    Mutation(
        "the derivative of the softmax without its mean",
        "core/function/duals.py",
        "    value_tangent.addcmul_(P_of_rows, value_tangent.sum(dim, keepdim=True), value=-1)\n",
        "",
        EVERY_PART,
    ),
    Mutation(
        "a tangent is not multiplied by a constant factor",
        "core/function/duals.py",
        "value_tangent = tangent.clone() if func in _SUMS else tangent * _detached(constant)",
        "value_tangent = tangent.clone()",
        EVERY_PART,
    ),
    Mutation(
        "a bias is added to a tangent",
        "core/function/duals.py",
        "        value = value + bias\n",
        "        value = value + bias\n        value_tangent = value_tangent + bias\n",
        EVERY_PART,
    ),
]
FUNCTION = [
    Mutation(
        "b_U is forgotten where few logits are read",
        "core/function/forward.py",
        "few_logits = few_logits + bias[ids.to(bias.device)].to(final)",
        "pass",
        BOTH_ENDS,
    ),
    Mutation(
        "points that share blocks come back in another order",
        "core/function/many_gates.py",
        "return in_order[:, order.argsort()]",
        "return in_order[:, order]",
        INTERVENTIONS,
    ),
    Mutation(
        "rows of a tree continue the wrong parents",
        "core/function/tree.py",
        "parents.append(history[first])",
        "parents.append(history[first.flip(0)])",
        INTERVENTIONS,
    ),
    Mutation(
        "each token's covector without the weight of the readout",
        "core/function/forward.py",
        "weighted = weights[chunk.to(weights.device), None] * slopes.to(covectors)",
        "weighted = slopes.to(covectors) / 2",
        TOKENS,
    ),
]
HOOKS = [
    Mutation(
        "a direction is put in place of what is left",
        "directions/removal.py",
        "return (h - along @ basis.T).to(tensor.dtype).reshape(tensor.shape)",
        "return (along @ basis.T).to(tensor.dtype).reshape(tensor.shape)",
        "tests/directions/test_removal.py",
    ),
    Mutation(
        "what writes runs after a user's hooks",
        "core/model/hooks.py",
        "forward.move_to_end(key, last=False)",
        "forward.move_to_end(key, last=True)",
        "tests/core/model/test_user_hooks.py",
    ),
    Mutation(
        "what is unembedded is another position",
        "core/model/unembedding.py",
        "return (select(unrounded(args[0])), *args[1:])",
        "return (select(unrounded(args[0]).roll(1, 1)), *args[1:])",
        EVERY_PART,
    ),
]
PATH = [
    Mutation(
        "the weights of the nodes are another rule's",
        "integrals/nested_rules.py",
        "weights=weights / (2 * n))",
        "weights=weights**2 / (2 * n))",
        INTEGRAL,
    ),
]
UPDATES = [
    Mutation(
        "the strength of factors is dropped",
        "core/model/updates.py",
        "scale = factors.scale * factors.strength",
        "scale = factors.scale",
        STRENGTHS,
    ),
    Mutation(
        "the strength of a trained weight is dropped",
        "core/model/updates.py",
        "return _dense(trained.strength * _difference(weight, W))",
        "return _dense(_difference(weight, W))",
        STRENGTHS,
    ),
    Mutation(
        "the strength of trained rows is dropped",
        "core/model/updates.py",
        "change = strength * _difference(rows, before)",
        "change = _difference(rows, before)",
        STRENGTHS,
    ),
    Mutation(
        "the strength of a change of bias is dropped",
        "core/model/updates.py",
        "return sum(present[1:], present[0]) * factors.strength",
        "return sum(present[1:], present[0])",
        STRENGTHS,
    ),
    Mutation(
        "the strength of a change of γ is dropped",
        "core/model/updates.py",
        "return NormUpdate(d_gamma * trained.strength, d_beta)",
        "return NormUpdate(d_gamma, d_beta)",
        STRENGTHS,
    ),
    Mutation(
        "the strength of a change of β is dropped",
        "core/model/updates.py",
        "d_beta = d_beta * trained.strength",
        "pass",
        STRENGTHS,
    ),
    Mutation(
        "the strength of DoRA's update is dropped",
        "core/adapter/factors.py",
        "return self.strength * (self.magnitude[:, None] / size * turned - weight.to(plain))",
        "return self.magnitude[:, None] / size * turned - weight.to(plain)",
        STRENGTHS,
    ),
]
MUTATIONS = [
    *BANK,
    *REVERSE,
    *DERIVATIVES,
    *GATES,
    *BASIS,
    *DUALS,
    *FUNCTION,
    *HOOKS,
    *PATH,
    *UPDATES,
]


# --- Running them


@dataclasses.dataclass
class Outcome:
    """What the tests said of one mutation.

    Attributes:
        failed: the tests that failed; none where the error survived.
        trouble: why the tests did not run at all, if they did not.
    """

    failed: list[str] = dataclasses.field(default_factory=list)
    trouble: str = ""


def outcome_of(mutation: Mutation, *, every: bool = False) -> Outcome:
    """Run the mutation's tests on a copy of the package in which it is planted.

    Args:
        mutation: the error.
        every: go on after the first test that fails.
    """
    with tempfile.TemporaryDirectory(prefix="mutated_") as folder:
        package = Path(folder) / "lens_lora"
        shutil.copytree(
            REPOSITORY / "lens_lora", package, ignore=shutil.ignore_patterns("__pycache__")
        )
        mutation.plant(package)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*_LIBRARIES])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_test, args=(theirs, folder, mutation.tests, every))
        process.start()
        theirs.close()
        try:
            return ours.recv()
        except EOFError:
            return Outcome(trouble="the process that ran the tests ended without an answer")
        finally:
            process.join()


def _test(answer: Any, folder: str, tests: str, every: bool) -> None:
    """In a process of its own: run the tests on the package in this folder."""
    import pytest

    # Imported before pytest puts the repository first in the path, and without the check of shapes.
    os.environ.pop("LENS_LORA_SHAPES", None)
    sys.path.insert(0, folder)
    lens_lora = importlib.import_module("lens_lora")
    os.chdir(REPOSITORY)
    outcome = Outcome()

    class Listener:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                outcome.failed.append(report.nodeid)

    # Without --each-class a line with one class leaves tests to the other line's.
    options = ["-q", "-p", "no:cacheprovider", "--each-class", "-m", _QUICK]
    if not every:
        options.append("-x")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = pytest.main([*options, tests], plugins=[Listener()])
    is_copy = str(lens_lora.__file__).startswith(folder)
    if not is_copy or sys.modules["lens_lora"] is not lens_lora:
        outcome.trouble = f"{lens_lora} was tested and not the copy in {folder}"
    elif code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        outcome.trouble = f"pytest ended with {code!r}: {said.getvalue()[-2000:]}"
    answer.send(outcome)
    answer.close()


def main(words: list[str]) -> int:
    """Print what became of each mutation; 1 where one survived."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "lib"))
    from models import has_hooked_transformer

    survived = 0
    for mutation in MUTATIONS:
        if not all(word in str(mutation) for word in words):
            continue
        if mutation.needs_hooked_transformer and not has_hooked_transformer():
            print(f"{mutation}: left out, as this transformer-lens has no HookedTransformer")
            continue
        outcome = outcome_of(mutation)
        survived += not outcome.failed
        said = outcome.failed[0] if outcome.failed else outcome.trouble or "SURVIVED"
        print(f"{mutation}: {said}", flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
