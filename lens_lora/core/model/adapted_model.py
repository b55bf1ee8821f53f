"""A hooked model with an adapter over it, at any gates ε.

The gates have one entry for each site; at 0 it is the base model, and at 1 the adapted one.

1. A `Plan` says where each site reads and writes, and its map z → δ(z).
2. `applied`, `fwd_hooks` and `injected` put the sites' hooks on the model (`injections`).
3. Before they do, the model must be in the state in which the plan was made.

`LoraLens` (`lens.py`) is such a model, and what is asked of it with prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora import guesses
from lens_lora.compat import home_of
from lens_lora.core.model import extensions, precision
from lens_lora.core.model.basis import SiteMap
from lens_lora.core.model.gates import Scale, gates_of, gates_of_rows
from lens_lora.core.model.hooks import HookFn, attached, is_hooked
from lens_lora.core.model.host import Host
from lens_lora.core.model.injections import Inject, ScaleInject, listed_hooks, site_hooks
from lens_lora.core.model.lengths import Rotary
from lens_lora.core.model.locks import hold, lock_of
from lens_lora.core.model.plan import Injection, Plan, require_sum
from lens_lora.core.model.points import HookPoints, head_points, known_point
from lens_lora.core.model.sites import Heads, Names, Site, Sites
from lens_lora.core.model.unembedding import unembedded_only
from lens_lora.core.model.updates import SiteUpdate
from lens_lora.spans import Temporary, open_spans

if TYPE_CHECKING:
    from transformer_lens import FactoredMatrix


class AdaptedModel(metaclass=guesses.OfLensClass):
    """A hooked model with an adapter over it: its sites, their gates, and the hooks at them."""

    model: Any
    _plan: Plan
    _eps: float | None

    # --- The model and its sites

    @property
    def tokenizer(self) -> Any:
        """The hooked model's tokenizer; None of a model without one."""
        return getattr(self.model, "tokenizer", None)

    @property
    def cfg(self) -> Any:
        """The hooked model's configuration, as TransformerLens has it."""
        return self.model.cfg

    @property
    def sites(self) -> Sites:
        """The adapted linear maps, in the order in which a forward pass meets them."""
        return self._plan.sites

    @property
    def maps(self) -> tuple[SiteMap, ...]:
        """Each site's δ(z) = sB(Az + a₀), in the model's basis."""
        return self._plan.maps

    @property
    def updates(self) -> tuple[SiteUpdate, ...]:
        """Each site's own update in the Hugging Face basis, in the order of `sites`."""
        return self._plan.updates

    @property
    def injections(self) -> tuple[Injection, ...]:
        """The places at which hooks add something: first one for each site, as in `sites`."""
        return self._plan.injections

    @property
    def plan(self) -> Plan:
        """Everything that the hooks need: for injections of your own (`injected`)."""
        return self._plan

    @property
    def host(self) -> Host:
        """The hooked model: its hook points, weights and norms."""
        return self._plan.host

    @property
    def rotary(self) -> Rotary:
        """The rotary tables that depend on how many positions a pass has."""
        return self._plan.host.rotary

    @property
    def heads(self) -> Heads:
        """How many attention heads there are, and how wide, at their hook points."""
        return self._plan.host.heads_at_hooks

    @property
    def class_name(self) -> str:
        """'HookedTransformer' or 'TransformerBridge'."""
        return self._plan.host.class_name

    @property
    def embedding_output(self) -> str:
        """The hook point after the token embedding."""
        return self._plan.host.embedding_output

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter; where that is offloaded, where it runs."""
        return home_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def gate_dtype(self) -> torch.dtype:
        """The dtype of gates and updates: the model's, never below float32."""
        return self.maps[0].dtype

    @property
    def unit_roundoff(self) -> float:
        """The relative size of one rounding: of the dtype, or of a kernel's 8-bit activations."""
        return max(self.eps / 2, self._plan.activation_rounding)

    def head_points(self, kinds: Iterable[str] = "qkvo") -> dict[str, str]:
        """The hook points of q, k, v and z, each with the kind of module that it belongs to.

        Args:
            kinds: 'q', 'k', 'v', and 'o', which reads z.
        """
        return head_points(self.host, kinds)

    def site_index(self, name: str) -> int:
        """The index of a site in `sites`.

        Args:
            name: its name.

        Raises:
            SiteError: no such site, or a glob that matches several.
        """
        return self.sites.one(name)

    def delta_w(self, site: str | Site) -> FactoredMatrix:
        """ΔW_l = s·B·A of one site, [d_out, d_in], so that δz = ΔW z. No forward pass.

        In the model's own basis: merged weights, processed as the model's were, minus the model's.
        TransformerLens orients weights the other way (z @ W): take `.T`. The heads of q, k and v
        follow one another in d_out, those of o in d_in. Of an embedding d_in is the vocabulary, and
        ΔW has the factor by which a TransformerBridge scales it (Gemma: √d_model). What is added
        whatever the input is not in it. Experts: [ΔW_1 … ΔW_E], [d_out, expert · d_in].

        Args:
            site: one of `sites`, or its name.

        Raises:
            SiteError: no such site, or a glob that matches several.
        """
        from transformer_lens.FactoredMatrix import FactoredMatrix

        name = site if isinstance(site, str) else site.name
        B, A = self.maps[self.site_index(name)].of_weight()
        return FactoredMatrix(B.clone(), A.clone())

    # --- Gates, and hooks that put the adapter on the model

    def gates(self, scale: Scale = 1.0) -> Float[Tensor, "*batch site"]:
        """The gates ε on the model's device; derivatives pass through them to a tensor `scale`.

        Args:
            scale: one number for all sites, a tensor, or {site name or glob: number}, others 0.

        Raises:
            SiteError: a name that matches no site, or a tensor without one gate per site.
            ArgumentError: what is no number, tensor or mapping.
        """
        return gates_of(scale, self.sites, self.gate_dtype).to(self.device)

    def gates_of_rows(self, scale: Scale, rows: int) -> Float[Tensor, "*row site"]:
        """The gates of all rows, [site], or of each of so many rows, [row, site].

        Args:
            scale: as for `gates`.
            rows: how many rows there are.

        Raises:
            SiteError: gates of another number of rows.
        """
        return gates_of_rows(self.gates(scale), rows)

    @staticmethod
    def scale_in_words(scale: Scale) -> str:
        """Gates as results state them: 'ε = 0.5', or that they are the caller's own.

        Args:
            scale: as for `gates`.
        """
        return f"ε = {scale:g}" if isinstance(scale, int | float) else "gates of the caller"

    def fwd_hooks(self, scale: Scale = 1.0) -> list[tuple[str, HookFn]]:
        """[(hook name, function)] for `model.run_with_hooks(tokens, fwd_hooks=…)`.

        Your own hooks in the same list see and change the adapted model, whatever the order:
        δ is computed from the input that they return, and added before they see the output. While
        these hooks are on the model, calls of a lens are refused, as within `applied`.

        Args:
            scale: as for `gates`.

        Raises:
            ModelStateError: a site without a hook point at its output (on HookedTransformer
                embeddings, heads, norms, and what Gemma 2 and 3 normalise); use `applied` there.
        """
        self._check_blocks()
        inject = ScaleInject(self._plan, self.gates(scale), scale)
        return listed_hooks(self._plan, inject)

    # --- Hook points

    def known_point(self, name: str) -> str:
        """The name, if the model has such a hook point.

        Args:
            name: the name in full.

        Raises:
            SiteError: it has none, with the nearest names.
        """
        return known_point(self.model, name)

    def points(self, names: Names | None) -> HookPoints:
        """The hook points that these names mean, in the order of layers. No forward pass.

        Args:
            names: a hook point, several, globs, or a predicate; None for every one.

        Raises:
            SiteError: a hook point that the model lacks, a glob or a predicate without a match.
        """
        return HookPoints.of(self._plan, names)

    def hooked(self, hooks: Sequence[tuple[str, HookFn]]) -> AbstractContextManager[None]:
        """Within the block these hooks are on the model, beside those that others put there.

        Args:
            hooks: [(hook point or module, function)], as `model.run_with_hooks` takes them.
        """
        return attached(self.model, hooks)

    def is_hooked(self, *modules: nn.Module) -> bool:
        """Whether a hook that no library hung there by itself is on the model.

        Args:
            modules: where one is looked for; by default at every hook point.
        """
        return is_hooked(modules or self.model.hook_dict.values())

    def require_update(self, points: Iterable[str]) -> None:
        """Refuse hook points that never hold the adapted model's value.

        Args:
            points: the names of hook points.

        Raises:
            ModelStateError: one lies between a site's input and the point at which δ is added.
        """
        self._plan.require_update(points)

    # --- The state of the model

    def check_state(self, *, entries: bool = True) -> None:
        """Check that the model and the adapter are as they were when the lens was made. No pass.

        Args:
            entries: whether entries of the weights are compared, too; they show edits through
                `.data`, which nothing else does.

        Raises:
            ModelStateError: naming what changed.
        """
        self._plan.check_state(entries=entries)

    def check_backward(self, *, once: bool = True) -> None:
        """Check that the graph of a pass is that of one run of each block. No pass.

        Args:
            once: whether it is walked back once, for a first derivative, with hooks still on.

        Raises:
            ModelStateError: gradient checkpointing would run blocks again.
        """
        self._plan.check_backward(once=once)

    def _check_blocks(self) -> None:
        """Check the state, and that the open blocks of `applied` add up with another one."""
        self._plan.check_state()
        plans = [span.about for span in open_spans() if isinstance(span.about, Plan)]
        require_sum(self._plan, [plan for plan in plans if plan.host.model is self.model])

    # --- Blocks within which the model is another one

    def applied(self, scale: Scale = 1.0) -> AbstractContextManager[Any]:
        """Within the block, every tool of TransformerLens sees the adapted model.

        After the block, also after an exception or an interrupt, the model has its own hooks and
        weights again. Other threads that use a lens on this model wait until then. A tensor `scale`
        may be differentiated, in either mode and within torch.func transforms, and one that needs
        a gradient, in the gates' dtype, edited between passes, as an optimiser does.

        Blocks within one another add up, those of one lens too: two at scale 1 apply it twice.
        Analyses, `logits` and `generate` of any lens on this model are refused within a block, as
        they would take the adapted model for their base; they apply the adapter by themselves.
        Weights stay the base's. Reading one that the adapter changes is refused within the block,
        so that no tool takes it for the adapted model's.

        Args:
            scale: as for `gates`.

        Raises:
            ModelStateError: the model's state changed; or blocks that do not add up, where one
                changes a norm, or v and o where value biases are folded. Make one lens of the sum.
        """

        def apply(span: Temporary) -> Any:
            span.enter_context(self.adapted(scale))
            for site, parameters in self._plan.changed_parameters():
                self._plan.host.refuse_reading(span, site, parameters)
            return self.model

        return Temporary(apply)

    def adapted(self, scale: Scale) -> AbstractContextManager[Any]:
        """Within the block the model is the adapted one, for code that reads none of its weights.

        Args:
            scale: as for `gates`.
        """

        def apply(span: Temporary) -> Any:
            self._check_blocks()
            span.about = self._plan
            inject = ScaleInject(self._plan, self.gates(scale), scale)
            self._put_on(span, inject)
            return self.model

        return Temporary(apply)

    def injected(
        self, inject: Inject, before: Sequence[tuple[str, HookFn]] = ()
    ) -> AbstractContextManager[None]:
        """The sites' hooks with any injection, for the length of the block.

        Args:
            inject: what is written at each site.
            before: hooks that are added before those of the sites.

        Raises:
            ModelStateError: the model changed since the lens was made; or gradients are computed,
                and reentrant gradient checkpointing would cut them off.
        """

        def put_on(span: Temporary) -> None:
            if torch.is_grad_enabled():
                self._plan.check_backward()
            self._put_on(span, inject, before)

        return Temporary(put_on)

    def _put_on(
        self, span: Temporary, inject: Inject, before: Sequence[tuple[str, HookFn]] = ()
    ) -> None:
        """Until the span ends, the sites' hooks are on the model."""
        self.hold(span)
        self._plan.check_state(entries=False)
        span.enter_context(extensions.differentiable_products(self._plan.quantised))
        # A TransformerBridge puts its hook points together anew whenever they are asked for.
        points = self.model.hook_dict
        hooks = site_hooks(self._plan, inject, points, before)
        span.enter_context(attached(self.model, hooks, points))

    def hold(self, span: Temporary) -> None:
        """Until the span ends, other threads that use a lens on this model wait.

        Args:
            span: how long.
        """
        hold(span, lock_of(self.model))

    def unembedding_only(self, select: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Within the block, only a part of the final residual stream is unembedded.

        Args:
            select: takes the part of it, [row, pos, d_model], that the head is to read.
        """
        return unembedded_only(self.model, select)

    # --- The precision of the model

    @property
    def eps(self) -> float:
        """The relative precision in which the model computes; by one short pass where measured."""
        if self._eps is None:
            self._eps = self._measured_eps()
        return self._eps

    def _measured_eps(self) -> float:
        with extensions.differentiable_products(self._plan.quantised):
            return precision.eps_of(self.model, self.embedding_output)
