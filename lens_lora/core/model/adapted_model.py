"""A hooked model with an adapter over it: each site l writes W_l z_l + ε_l ΔW_l z_l.

With all gates ε_l at 0 it is the base model, and with all of them at 1 the adapted one. In order:

    sites, maps, host, dtype            what there is: the sites, their maps z → δ(z), the model
    gates, fwd_hooks                    a strength as one gate for each site, and hooks as a list
    points, hooked                      hook points by name, and hooks of a caller
    check_state, check_backward         refuse a model that has changed since the plan was made
    applied, adapted, injected          blocks within which the sites' hooks are on the model

A `Plan` (`plan.py`) knows where each site reads and writes; `injections.py` makes the hooks of it.
No prompt is known here: `LoraLens` (`lens.py`) is such a model, asked with prompts.
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
    """A hooked model with an adapter over it: its sites, their gates, and the hooks at them.

    Attributes:
        model: the hooked model; only within the blocks does it have hooks of an adapter.
    """

    def __init__(self, model: Any, plan: Plan) -> None:
        """Take the model as it is now; a later change of it is refused.

        Args:
            model: the hooked model.
            plan: where each site reads and writes in it, and what.
        """
        self.model: Any = model
        self._plan = plan
        # The precision, if it is known without a pass; `eps` measures it otherwise.
        self._eps: float | None = precision.known_eps(plan.host.modules)

    # --- The model and its sites

    @property
    def tokenizer(self) -> Any:
        """The hooked model's tokenizer; None if it has none."""
        return getattr(self.model, "tokenizer", None)

    @property
    def cfg(self) -> Any:
        """The hooked model's TransformerLens configuration."""
        return self.model.cfg

    @property
    def sites(self) -> Sites:
        """The adapted modules, in the order in which a forward pass meets them."""
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
        """The places where hooks add something: one for each site, as in `sites`, then the others.

        A norm that runs twice, or a value bias that was folded, adds in a second place.
        """
        return self._plan.injections

    @property
    def plan(self) -> Plan:
        """Everything that the hooks need, for injections of your own (`injected`)."""
        return self._plan

    @property
    def host(self) -> Host:
        """The hooked model: its hook points, weights and norms."""
        return self._plan.host

    @property
    def rotary(self) -> Rotary:
        """The model's rotary tables, which may depend on how many positions a pass has."""
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
        """The device of the model's first parameter; if that is offloaded, the one it runs on."""
        return home_of(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def gate_dtype(self) -> torch.dtype:
        """The dtype of gates and updates: that of the model, but float32 at least."""
        return self.maps[0].dtype

    @property
    def unit_roundoff(self) -> float:
        """The relative size of one rounding, of the dtype or of a kernel's 8-bit activations."""
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

        It is in the model's own basis: merged weights, processed as the model's were, minus the
        model's. TransformerLens orients weights the other way (z @ W): take `.T`. The heads of q, k
        and v follow one another in d_out, those of o in d_in. For an embedding d_in is the
        vocabulary, and ΔW includes the factor by which a TransformerBridge scales embeddings
        (Gemma: √d_model). A part of δ that does not depend on the input, such as a change of bias,
        is left out. Experts stand side by side, [ΔW_1 … ΔW_E], [d_out, expert · d_in].

        Args:
            site: one of `sites`, or its name.

        Raises:
            SiteError: no such site, or a glob that matches several.
            ModelStateError: the model or the adapter has changed since the lens was made.
        """
        from transformer_lens.FactoredMatrix import FactoredMatrix

        self.check_state()
        name = site if isinstance(site, str) else site.name
        B, A = self.maps[self.site_index(name)].of_weight()
        return FactoredMatrix(B.clone(), A.clone())

    # --- Gates, and the hooks of the sites as a list

    def gates(self, scale: Scale = 1.0) -> Float[Tensor, "*batch site"]:
        """The gates ε on the model's device. A tensor keeps its graph.

        Args:
            scale: one number for all sites; a tensor with one gate for each; or {site name or glob:
                number}, with all other sites at 0.

        Raises:
            SiteError: a name that matches no site, or a tensor without one gate per site.
            ArgumentError: anything but a number, a tensor or a mapping.
        """
        return gates_of(scale, self.sites, self.gate_dtype).to(self.device)

    def gates_of_rows(self, scale: Scale, rows: int) -> Float[Tensor, "*row site"]:
        """One set of gates for all rows, [site], or one for each row, [row, site].

        Args:
            scale: the strength of the adapter, as for `gates`.
            rows: how many rows there are.

        Raises:
            SiteError: gates for another number of rows.
        """
        return gates_of_rows(self.gates(scale), rows)

    @staticmethod
    def scale_in_words(scale: Scale) -> str:
        """Gates as results state them: 'ε = 0.5', or 'gates of the caller'.

        Args:
            scale: the strength of the adapter, as for `gates`.
        """
        return f"ε = {scale:g}" if isinstance(scale, int | float) else "gates of the caller"

    def fwd_hooks(self, scale: Scale = 1.0) -> list[tuple[str, HookFn]]:
        """The sites' hooks as a list, for `model.run_with_hooks(tokens, fwd_hooks=…)`.

        Your own hooks in the same list see and change the adapted model, wherever they stand in it:
        δ is computed from the input that they return, and added before they see the output. While
        these hooks are on the model, calls of a lens are refused, as within `applied`.

        Args:
            scale: the strength of the adapter, as for `gates`.

        Raises:
            ModelStateError: a site has no hook point at its output (on HookedTransformer:
                embeddings, heads, norms, and what Gemma 2 and 3 normalise); use `applied` instead.
        """
        self._check_blocks()
        inject = ScaleInject(self._plan, self.gates(scale), scale)
        return listed_hooks(self._plan, inject)

    # --- Hook points

    def known_point(self, name: str) -> str:
        """Check that the model has a hook point of this name, and return the name.

        Args:
            name: the name in full.

        Raises:
            SiteError: there is none; the nearest names are given.
        """
        return known_point(self.model, name)

    def points(self, names: Names | None) -> HookPoints:
        """The hook points that some names stand for, in the order of layers. No forward pass.

        Args:
            names: a hook point, several, globs, or a predicate; None for all of them.

        Raises:
            SiteError: a hook point that the model lacks, or a glob or predicate without a match.
        """
        return HookPoints.of(self._plan, names)

    def hooked(self, hooks: Sequence[tuple[str, HookFn]]) -> AbstractContextManager[None]:
        """Within the block these hooks are on the model, together with those that others put there.

        Args:
            hooks: [(hook point or module, function)], as `model.run_with_hooks` takes them.
        """
        return attached(self.model, hooks)

    def is_hooked(self, *modules: nn.Module) -> bool:
        """Whether a hook is on the model, other than those that libraries put there themselves.

        Args:
            modules: where to look; by default at every hook point.
        """
        return is_hooked(modules or self.model.hook_dict.values())

    def require_update(self, points: Iterable[str]) -> None:
        """Refuse hook points that never hold the adapted model's value.

        Args:
            points: the names of hook points.

        Raises:
            ModelStateError: a point lies between a site's input and the place where δ is added.
        """
        self._plan.require_update(points)

    # --- The state of the model

    def check_state(self, *, entries: bool = True) -> None:
        """Check that the model and the adapter are as they were when the lens was made. No pass.

        Args:
            entries: whether some entries of the weights are compared as well, which is the only way
                to see an edit through `.data`.

        Raises:
            ModelStateError: naming what changed.
        """
        self._plan.check_state(entries=entries)

    def check_backward(self, *, once: bool = True) -> None:
        """Check that each block runs once in the graph of a pass. No pass.

        Args:
            once: whether there is a single backward pass, with the hooks still on.

        Raises:
            ModelStateError: gradient checkpointing would run blocks again.
        """
        self._plan.check_backward(once=once)

    def _check_blocks(self) -> None:
        """Check the state, and that a further block may add to those of `applied` that are open."""
        self._plan.check_state()
        plans = [span.about for span in open_spans() if isinstance(span.about, Plan)]
        require_sum(self._plan, [plan for plan in plans if plan.host.model is self.model])

    # --- Blocks within which the sites' hooks are on the model

    def applied(self, scale: Scale = 1.0) -> AbstractContextManager[Any]:
        """Within the block, every tool of TransformerLens sees the adapted model.

        After the block, even after an exception or an interrupt, the model has its own hooks and
        weights again. Other threads that use a lens on this model wait until then. A tensor `scale`
        may be differentiated, in either mode and within torch.func transforms. If it needs a
        gradient and has the gates' dtype, it may be edited between passes, as an optimiser does.

        Nested blocks add up, even those of one lens: two at scale 1 apply its adapter twice.
        Analyses, `logits` and `generate` of any lens on this model are refused within a block: they
        apply the adapter by themselves, and would take the adapted model for their base. The
        weights stay those of the base. Reading a weight that the adapter changes is refused within
        the block, so that no tool takes it for the adapted model's.

        Args:
            scale: the strength of the adapter, as for `gates`.

        Raises:
            ModelStateError: the model's state has changed; or the block does not add up with an
                open one, because one of them changes a norm, or v and o where value biases are
                folded. Make one lens of the sum.
        """

        def apply(span: Temporary) -> Any:
            span.enter_context(self.adapted(scale))
            for site, parameters in self._plan.changed_parameters():
                self._plan.host.refuse_reading(span, site, parameters)
            return self.model

        return Temporary(apply)

    def adapted(self, scale: Scale) -> AbstractContextManager[Any]:
        """Within the block the model is the adapted one, and its weights may be read: the base's.

        Args:
            scale: the strength of the adapter, as for `gates`.
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
        """Within the block, each site writes what an injection of the caller's says.

        Args:
            inject: what is written at each site.
            before: hooks that come before those of the sites.

        Raises:
            ModelStateError: the model has changed since the lens was made; or gradients are
                computed, and reentrant gradient checkpointing would cut them off.
        """

        def put_on(span: Temporary) -> None:
            if torch.is_grad_enabled():
                self._plan.check_backward()
            self._put_on(span, inject, before)

        return Temporary(put_on)

    def _put_on(
        self, span: Temporary, inject: Inject, before: Sequence[tuple[str, HookFn]] = ()
    ) -> None:
        """Put the sites' hooks on the model, until the span ends."""
        self.hold(span)
        self._plan.check_state(entries=False)
        span.enter_context(extensions.differentiable_products(self._plan.quantised))
        # A TransformerBridge collects its hook points anew each time, so they are read once.
        points = self.model.hook_dict
        hooks = site_hooks(self._plan, inject, points, before)
        span.enter_context(attached(self.model, hooks, points))

    def hold(self, span: Temporary) -> None:
        """Let other threads that use a lens on this model wait until the span ends.

        Args:
            span: the span for which they wait.
        """
        hold(span, lock_of(self.model))

    def unembedding_only(self, select: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Within the block, only a part of the final residual stream is unembedded.

        Args:
            select: takes the part to be unembedded from the final residual stream, [row, pos, d].
        """
        return unembedded_only(self.model, select)

    # --- The precision of the model

    @property
    def eps(self) -> float:
        """The relative precision in which the model computes; one short pass if it is measured."""
        if self._eps is None:
            self._eps = self._measured_eps()
        return self._eps

    def _measured_eps(self) -> float:
        with extensions.differentiable_products(self._plan.quantised):
            return precision.eps_of(self.model, self.embedding_output)
