"""`LoraLens` lays an adapter over a hooked model, and is asked about prompts.

What needs no prompt is in its base class, `AdaptedModel` (`adapted_model.py`): sites, gates ε, and
the hooks that let each site write W z + ε ΔW z. This file adds the rest, in this order:

    __init__, and its checks            the model runs, computes what its base does, and is exact
    with_adapter, within, in_gauge      the same model with another adapter, bound or gauge
    prompts, function                   prompts as tokens, and g(ε), which every analysis asks
    logits, generate, run               f(ε): passes over prompts, all of which `run` makes
    ablate_directions                   directions that are taken out of the model for a while
    str_tokens, describe, repr          names for people and files
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_lora import errors, guesses
from lens_lora._version import versions
from lens_lora.arguments import number, word
from lens_lora.compat import uncompiled
from lens_lora.core.adapter.adapter import Adapter
from lens_lora.core.model import description, extensions, running
from lens_lora.core.model.adapted_model import AdaptedModel
from lens_lora.core.model.check import require_check, require_kinds
from lens_lora.core.model.gates import Scale
from lens_lora.core.model.gauge import Gauge, require_ranks
from lens_lora.core.model.plan import make_plan
from lens_lora.core.model.prompt_pass import logits_of_prompts
from lens_lora.core.model.public_call import alone
from lens_lora.core.model.sites import Names
from lens_lora.core.model.tokenizers import note_other_tokenizer, tokenizer_origin
from lens_lora.core.readout.positions import Positions
from lens_lora.core.readout.prompts import (
    Prompts,
    PromptsLike,
    PromptTokens,
)
from lens_lora.core.readout.readout import Readout
from lens_lora.core.readout.responses import AnswerLike, Generated
from lens_lora.core.readout.texts import reading_of_texts, reads_with_bos
from lens_lora.core.readout.tokenising import tokenise
from lens_lora.spans import Temporary

if TYPE_CHECKING:
    from lens_lora.core import Function

# The public attributes that `__init__` sets; all others are properties.
_SET_WHEN_MADE = ("model", "adapter", "prepend_bos", "base_note")


class LoraLens(AdaptedModel):
    """A LoRA adapter over a hooked model, exact up to the model's own rounding.

    The model is not changed: hooks are added at the start of a call and removed at its end.

    Args:
        model: a HookedTransformer or a TransformerBridge of the adapter's base model. If
            `torch.compile` has wrapped it, the model inside is taken.
        adapter: from `load_adapter`, `Adapter.from_peft` or `Adapter.from_factors`.
        hf_model: the unprocessed Hugging Face base. It is needed where norms or value biases were
            folded, and for trained biases on a HookedTransformer. The model's weights are compared
            with its weights and, in float32, the logits of 8 tokens as well.
        check: what is verified of the adapter on this model, beyond its shapes. True makes three
            checks. (1) If the table of `docs/exactness_data.md` has no entry for the family, random
            updates at the adapter's modules are compared with the Hugging Face model under forward
            hooks, in two passes over eight tokens. (2) A module that was trained whole must compute
            what its weight says. (3) A base that holds the adapter already is refused. False makes
            none of them, and only warns about (3). None is for an adapter that stands in for those
            of `with_adapter`: it makes (2) alone, and leaves (1) to them.
        prepend_bos: whether a string that does not begin with a BOS gets one, in every analysis.
            None does what the model itself does (`model.to_tokens`), and warns once if the
            tokenizer would do otherwise. `ll.load` reads strings as the tokenizer does.
        probe: random updates and the logits that they give, computed before the base was wrapped,
            as `ll.load` does. None computes them with hf_model, or with the base inside the model.

    Attributes:
        prepend_bos: see above.
        eps: the relative precision in which the model computes. It is that of the dtype, unless a
            float64 model rounds to float32 on the way, or a device rounds the factors of a float32
            model's products to TF32 or bfloat16. It is measured by one short pass, unless the model
            is in half precision, or in float32 on a CPU that was not told to round.
        max_memory: bytes that an analysis may take beside the model and its result; None for no
            bound.
        base_note: the warning about the base, which every page of the lens's results repeats; ''
            if there was none.

    Warns:
        LensLoraWarning: the base is not the one that the adapter names, by its name, or by its
            weights where the named base lies on this machine.

    Raises:
        SiteError, AdapterError: the model lacks a module, or shapes do not fit.
        ModelStateError: the model is in a state in which the adapter cannot be applied exactly.
        OutOfMemoryError: dense updates (DoRA, modules trained whole) do not fit into memory.
    """

    max_memory: float | None = None

    @alone
    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        hf_model: nn.Module | None = None,
        *,
        check: bool | None = True,
        prepend_bos: bool | None = None,
        probe: extensions.Probe | None = None,
    ) -> None:
        model = uncompiled(model)
        hf_model = uncompiled(hf_model)
        require_kinds(adapter, hf_model)
        require_check(check)
        is_checked = check is not False
        is_stand_in = check is None
        adapter = extensions.named_as_model(adapter, model)
        super().__init__(model, make_plan(model, adapter, hf_model))
        self.adapter = adapter
        self.prepend_bos: bool | None = prepend_bos
        self._hf_model = hf_model
        if is_checked:
            extensions.require_own_parameters(model, adapter)
        self._require_running()
        if hf_model is not None:
            self._require_same_logits(hf_model)
        # The modules that were probed; None if the model's family needs no probe.
        self._probed: frozenset[str] | None = None
        if is_checked and self.host.family.is_probed:
            self._probed = frozenset()
            if not is_stand_in:
                self._probed = self._probed_with(adapter, self._probed, probe)
        self.base_note: str = ""
        if not is_stand_in:
            self.base_note = extensions.note_on_base(self, is_refused=is_checked)
            self._warn_of_base()

    # --- What is checked when a lens is made

    def _require_running(self) -> None:
        """Check that the model runs, unless it has run in its present state before."""
        if self._eps is not None and running.has_run(self.model, self._plan.host.modules):
            return
        running.require_running(
            self._run_once,
            f"this {self.class_name} of {running.kind_of(self.model)}",
            "Let ll.load make the hooked model, which mends what it knows of; or use another "
            "version of TransformerLens.",
        )

    def _require_same_logits(self, hf_model: nn.Module) -> None:
        """Check that without the adapter the model computes the logits of its unprocessed base."""
        running.require_same_logits(
            running.base_logits(hf_model, self.dtype),
            lambda tokens: self.logits(tokens.to(self.device), 0.0),
            f"without the adapter this {self.class_name} computes other logits than hf_model",
            running.OF_A_GIVEN_BASE,
            lambda: self.eps,
        )

    def _probed_with(
        self, adapter: Adapter, done: frozenset[str], probe: extensions.Probe | None = None
    ) -> frozenset[str]:
        """Check that this adapter's modules are exact on the model; return all modules so checked.

        Args:
            adapter: the adapter.
            done: the modules that were checked before.
            probe: random updates with their logits, if they are computed already.
        """
        return extensions.check_modules(
            self.model, self._hf_model, adapter, done, eps=lambda: self.eps, probe=probe
        )

    def _warn_of_base(self) -> None:
        if self.base_note:
            errors.warn(self.base_note)

    def _run_once(self) -> None:
        """Run the model on eight tokens, and measure its precision if it is not known.

        Inside another lens's block the model cannot be run; its precision is then measured later.
        """
        with contextlib.suppress(errors.ModelStateError):
            if self._eps is None:
                self._eps = self._measured_eps()
            else:
                with extensions.differentiable_products(self._plan.quantised):
                    running.run_once(self.model)
            running.note_that_it_ran(self.model, self._plan.host.modules)

    # --- Another adapter, bound or gauge over the same model

    @alone
    def with_adapter(self, adapter: Adapter, *, check: bool | None = True) -> LoraLens:
        """A lens over the same model with another adapter.

        No forward pass: the weights of the adapted modules are compared with hf_model, but no
        logits.

        Args:
            adapter: the other adapter.
            check: what is verified about modules that were not checked yet, as for a new lens.
                False and None leave such modules to the next adapter that has them, as does an
                adapter whose update is zero.

        Warns:
            LensLoraWarning: the adapter names another base than this lens's adapter, and than the
                model.

        Raises:
            SiteError, AdapterError, ModelStateError: as for a new LoraLens; or the model's state
                has changed since this lens was made.
        """
        require_kinds(adapter, None)
        require_check(check)
        self._plan.check_state()
        if self._plan.base is not None:
            self._plan.base.require_same(entries=True)
        adapter = extensions.named_as_model(adapter, self.model)
        other = copy.copy(self)
        # An assignment is refused, as a caller's would leave the plan of the other adapter.
        vars(other)["adapter"] = adapter
        other._plan = make_plan(self.model, adapter, self._hf_model, self._plan)
        if check is not False:
            extensions.require_own_parameters(self.model, adapter)
        if adapter.base_model not in (None, self.adapter.base_model):
            other.base_note = extensions.note_on_names(adapter.base_model, self.base_names)
            other._warn_of_base()
        if check and self._probed is not None:
            other._probed = self._probed_with(adapter, self._probed)
            self._probed = other._probed
        return other

    def null_adapters(self, seed: int, draws: int) -> Iterator[Adapter]:
        """Draw null adapters: random directions with the adapter's own singular values.

        A fused module, such as one that holds q, k and v, keeps the singular values of each part.

        Args:
            seed: the seed of the draws; the same seed gives the same adapters.
            draws: how many.

        Raises:
            UnsupportedAdapterError: a module whose size is not that of its factors.
            ModelStateError: the model or the adapter has changed since the lens was made.
        """
        self.check_state()
        return extensions.null_adapters(self, seed, draws)

    def within(self, max_memory: float | None) -> LoraLens:
        """The same lens, with a bound on the memory that its analyses take.

        Fewer prompts, interventions, tangents and covectors then go into one pass. Where even one
        backward pass is too large, blocks keep only their inputs and run once more on the way back,
        so hooks of your own fire twice there. The numbers stay the same up to rounding. The memory
        of a pass is estimated before it is run. `logits` and `generate` do not divide what they are
        given.

        Args:
            max_memory: bytes beside the model and the result, such as 8e9; None for no bound.

        Raises:
            ArgumentError: anything but a positive number.
        """
        if max_memory is not None and number("max_memory", max_memory) <= 0:
            raise errors.ArgumentError(
                f"{errors.setting('max_memory', max_memory)}; expected bytes, such as 8e9, or None."
            )
        other = copy.copy(self)
        other.max_memory = max_memory
        return other

    def in_gauge(self, gauge: Gauge, by: tuple[str, ...] | None = None) -> LoraLens:
        """The same function f(ε), with each site's rank space in other coordinates.

        Args:
            gauge: 'trained' for the factors' own ranks, or 'svd' for the singular directions of ΔW.
            by: what values will be split by; then 'svd' is refused unless 'rank' is among them.

        Raises:
            ArgumentError: another gauge, or 'svd' where nothing is split by rank.
        """
        if word("gauge", gauge, get_args(Gauge)) == "trained":
            return self
        if by is not None:
            require_ranks(gauge, by)
        other = copy.copy(self)
        other._plan = self._plan.in_svd_gauge
        return other

    def __copy__(self) -> LoraLens:
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __reduce_ex__(self, protocol: object) -> Any:
        """Refuse pickle and `copy.deepcopy`, whose copy would hold the updates of another model."""
        raise errors.ArgumentError(
            "a lens cannot be pickled or deep-copied: its updates belong to the tensors of this "
            "one model. Make a lens where it is needed: LoraLens(copy.deepcopy(lens.model), "
            "lens.adapter), or in another process ll.load(base, adapter); lens.adapter.save(…) and "
            "a result's save(…) write files."
        )

    # --- The base

    @property
    def hf_model(self) -> nn.Module | None:
        """The unprocessed Hugging Face base; None if the lens was made without it."""
        return self._hf_model

    @property
    def base_names(self) -> list[str]:
        """The names by which the base is known, such as that of the Hugging Face model, if any."""
        return description.names_of(self.model, self._hf_model)

    # --- Prompts, and the function g of them

    def prompts(
        self,
        prompts: PromptsLike,
        response: AnswerLike | None = None,
        *,
        prepend_bos: bool | None = None,
    ) -> Prompts:
        """Turn strings, conversations or ids into `Prompts`, which every analysis takes unchanged.

        Whether a string gets a BOS is decided by the lens's own `prepend_bos`; a conversation has
        the ids of its chat template. The repr says what was done. No forward pass.

            >>> lens.prompts("The capital of France is", prepend_bos=False)  # doctest: +SKIP
            Prompts(1 of 5 tokens; text without BOS)

        Args:
            prompts: strings, conversations, ids [batch, pos], ids with their mask, or `Prompts`.
            response: what is said after each prompt: a string, ids, or one of these per prompt. The
                prompt and its response are then one row, and `KL()` and activations read each token
                of the response. What is about the next token (a margin, an answer, the logit shift)
                refuses such prompts.
            prepend_bos: for strings only: whether each that does not begin with a BOS gets one;
                None for the lens's own `prepend_bos`.

        Raises:
            PromptError: prompts that are empty, too long, outside the vocabulary, padded without
                lengths or mask, or refused by the chat template; `prepend_bos` for anything but
                strings, or True where the tokenizer has no BOS.
            TokenError: a response that does not fit the model.
        """
        ready = tokenise(self.model, prompts, prepend_bos, rule=self.prepend_bos)
        if not isinstance(prompts, Prompts) and any(source.text for source in ready.sources):
            note_other_tokenizer(self.model, self.adapter)
        if response is None:
            return ready
        return extensions.continued(self.model, ready, response)

    @alone
    def function(
        self,
        prompts: PromptsLike,
        readout: Readout | None = None,
        response: AnswerLike | None = None,
        *,
        progress: bool = True,
    ) -> Function:
        """The function g(ε) of these prompts, which every analysis asks.

            >>> g = lens.function("The capital of France is", margin)  # doctest: +SKIP
            >>> g(0.5), g.shift, g.slopes(at=1.0), g.corners("leave_one_out")  # doctest: +SKIP

        `docs/write_your_own.md` shows how an analysis is written with it. No forward pass, unless
        the readout is a `KL`: it takes one, for the base's distribution, which the function keeps.

        Args:
            prompts: the prompts, as for the method `prompts`.
            readout: what is read from the logits. Without one there is only f: logits and tangents.
            response: what is said after each prompt. Without a readout, `logits` are then those
                from which each token of the response is drawn; with one, see `prompts`.
            progress: whether long calls show a bar.

        Raises:
            ArgumentError: something that is not a readout.
            TokenError, PromptError: a readout, prompt or response that does not fit the model.
            ModelStateError: the model has changed since the lens was made.
        """
        return extensions.function_of(self, prompts, readout, response, progress=progress)

    # --- Passes over prompts

    @alone
    def logits(
        self, prompts: PromptsLike, scale: Scale = 1.0
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the model at the given gates. One forward pass.

        Args:
            prompts: the prompts, as for the method `prompts`.
            scale: the strength of the adapter, as for `gates`: 0 for the base, 1 for the adapted
                model.

        Raises:
            NumericsError: non-finite logits.
        """
        ready = self.prompts(prompts)
        with torch.no_grad(), self.adapted(scale):
            logits = self.run(ready)
            if not torch.isfinite(ready.at_read(logits)).all():
                raise self.not_finite(lambda: self.run(ready))
        return logits

    @guesses.fitting
    def __call__(
        self, prompts: PromptsLike, scale: Scale = 1.0
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits of the adapted model, or of the model at other gates; the same as `logits`.

        Args:
            prompts: the prompts, as for the method `prompts`.
            scale: the strength of the adapter, as for `gates`: 0 for the base, 1 for the adapted
                model.

        Raises:
            NumericsError: non-finite logits.
        """
        return self.logits(prompts, scale)

    def not_finite(self, run: Callable[[], object]) -> errors.NumericsError:
        """The error for a pass whose logits are not finite. One forward pass.

        It names the first hook point that holds NaN or infinity.

        Args:
            run: runs the same pass once more.
        """
        return errors.NumericsError(running.first_non_finite(self.model, run))

    @alone
    def generate(
        self,
        prompts: PromptsLike,
        max_new_tokens: int = 64,
        scale: Scale = 1.0,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        progress: bool = True,
    ) -> Generated:
        """Let the model say something after each prompt, at the given gates.

        By default each token is the likeliest one, as in Hugging Face's greedy search with the
        adapter active. Other settings of a generation_config, such as a repetition penalty, are
        ignored.

        Pass the result on as a response: `ll.token_shifts(lens, said.prompts, said)`. Its `.text`
        is a string for a single prompt, and a tuple of strings for a list of prompts.

        Cost: one pass over the prompt, one over a single token for each new token, and one over the
        whole text, which confirms every token; prompts are batched. If the model's key-value cache
        turns out to be wrong, one pass over the whole text for each token.

        Args:
            prompts: strings, conversations, ids or `Prompts`.
            max_new_tokens: the largest number of tokens that are said after each prompt.
            scale: the strength of the adapter, as for `gates`: 0 for the base, 1 for the adapted
                model.
            temperature: 0 takes the likeliest token; above 0 tokens are drawn.
            top_p: draw from the fewest tokens whose probabilities sum to this.
            seed: the seed of the draws; the same prompts and seed give the same tokens.
            eos_token_id: one id or several that end a response, or () for none; by default those of
                the base's generation_config, of its config, or of the tokenizer.
            progress: show a bar.

        Raises:
            PromptError: a prompt that leaves no room for so many tokens in the context.
            ArgumentError: max_new_tokens below 1; temperature below 0, or top_p outside (0, 1]; a
                seed or eos_token_id that is not a whole number; gates that `gates` refuses.
            SiteError: as for `gates`; or gates for another number of prompts.
            NumericsError: non-finite logits.
        """
        return extensions.generated(
            self,
            prompts,
            max_new_tokens,
            scale,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=eos_token_id,
            progress=progress,
        )

    def run(self, prompts: Prompts) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model's own forward pass, under the hooks that are on it at the moment.

        Every pass of this package over prompts is made here. A row's numbers do not depend on the
        other rows, not even where a rotary table depends on the length of the longest row.

        Args:
            prompts: the tokens.

        Raises:
            ArgumentError: something else than `Prompts`.
        """
        if not isinstance(prompts, Prompts):
            raise errors.ArgumentError(
                f"lens.run: expected Prompts, not {type(prompts).__name__}; it runs them under the "
                "hooks that are on the model now. lens.logits(text) are the logits with the "
                "adapter, and lens.logits(text, 0.0) those of the base."
            )
        return logits_of_prompts(self.model, self.rotary, prompts)

    # --- Directions that are taken out of the model for a while

    def ablate_directions(
        self,
        directions: Any,
        names: Names | None = None,
        positions: Positions = None,
        *,
        sinks: bool = False,
    ) -> AbstractContextManager[Any]:
        """Within the block, directions are ablated: h becomes h − v vᵀh at hook points.

        This holds for the base and for the adapted model, in every call, in `generate` and in tools
        of TransformerLens, and derivatives pass through it. `ll.removal_cost(lens)` within the
        block says what the same removal costs the base. After the block, even after an exception or
        an interrupt, the model is as before. Entering the block runs one token.

        Directions are in the model's basis: where processing centred the residual stream, its
        directions are centred first. On a TransformerBridge, hook_resid_mid is what the MLP's norm
        reads, not the stream itself.

        Each text's first token stays as it is. It is a sink: its ‖h‖ is up to hundreds of times
        that of other tokens, and every later token attends to it. So removing a direction there
        changes the model everywhere, whatever the direction means.

        Args:
            directions: [d], [direction, d], {label: either}, a Contrast (which has directions of
                its own at each of its points), or a sparse autoencoder, alone or as (autoencoder,
                indices). Their length does not matter.
            names: hook points, globs or a predicate. By default the whole residual stream; for a
                Contrast of several points, and for directions of another space, the points to which
                they belong.
            positions: the tokens at which directions are removed: None or 'each' for all of them,
                'prompt', 'response', an index, a slice or indices, which count within each prompt;
                negative ones count from its end. A row without such a token stays as it is. A pass
                of your own has to begin at the row's first token or continue a cache, and cannot
                say where prompts end.
            sinks: whether to remove the directions at each text's first token too.

        Raises:
            SiteError: a hook point that the model lacks, with the nearest names.
            ModelStateError: a point named in full that never fires, that holds no activations by
                position, or that lies between a site's input and output; within the block, a pass
                that does not tell which token is which.
            ArgumentError: directions of another width or space, a direction of zeros or NaN; no
                positions, or each text's first token without `sinks`.
        """

        def remove(span: Temporary) -> Any:
            return extensions.ablate(span, self, directions, names, positions, sinks)

        return Temporary(remove)

    # --- Names for people and files

    def str_tokens(self, prompts: Prompts) -> tuple[PromptTokens, ...]:
        """Each prompt's tokens as strings, without padding; ids if there is no tokenizer.

        Args:
            prompts: the tokens.
        """
        return description.tokens_of_prompts(self.tokenizer, prompts)

    def decode(self, ids: Sequence[int]) -> list[str]:
        """Token ids as strings, one by one.

        Args:
            ids: the ids of any tokens.
        """
        return description.decoded(self.tokenizer, ids)

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token of the model's output as a string."""
        every_token = range(int(self.model.cfg.d_vocab_out))
        return tuple(self.decode(every_token))

    @property
    def reads_strings(self) -> str:
        """How a string becomes ids, as 'text without BOS'; '' if the model has no tokenizer."""
        return reading_of_texts(self.model, self.prepend_bos)

    @property
    def reads_with_bos(self) -> bool:
        """Whether a string that has no BOS of its own gets one."""
        return reads_with_bos(self.model, self.prepend_bos)

    @property
    def tokenizer_origin(self) -> str:
        """Where the tokenizer is from, and how it differs from the base's; '' if it is that."""
        return tokenizer_origin(self.model)

    def describe(self, *prompts: Prompts) -> dict[str, str]:
        """The names of the model and the adapter, and versions, as saved with every result.

        Args:
            prompts: the result's prompts; then it also says how they were read, and whether
                responses follow them.
        """
        always = {
            "model": description.shown_name(self.model, self._hf_model),
            "model_class": self.class_name,
            "dtype": str(self.dtype).removeprefix("torch.") + self._plan.quantisation,
            "adapter": self.adapter.name,
            "base_of_adapter": self.adapter.base_model or "",
        }
        read = description.how_read(self.model, prompts)
        where_there = {
            "prompts": read["prompts"],
            "responses": read["responses"],
            "tokenizer": self.tokenizer_origin,
            "without": read["without"],
            "warning": self.base_note,
        }
        given = {name: text for name, text in where_there.items() if text}
        return {**always, **given, **versions()}

    if not TYPE_CHECKING:  # A type checker would take every name for one of the lens.

        def __getattr__(self, name: str) -> Any:
            """Answer a former name by the present one, or refuse and say what may be meant."""
            if name in guesses.FORMER_OF_LENS:
                return getattr(self, guesses.present_name("lens", name, guesses.FORMER_OF_LENS))
            parts = {"lens.model": type(vars(self).get("model"))}
            return guesses.missing_attribute(self, name, guesses.OF_LENS, parts)

        def __getitem__(self, key: object) -> Any:
            """Refuse to be indexed or iterated, and say what has a site's numbers."""
            raise errors.CallError(
                f"a lens is not indexed, by {key!r} or otherwise",
                remedy='lens.sites["blocks.3.attn.q"] is one of its sites, lens.delta_w(name) is '
                "what was added there, and ll.patch_sites(lens, prompts, readout) says what each "
                "does.",
            )

        def __mul__(self, factor: object) -> Any:
            """Refuse a product, and say how an adapter is scaled."""
            raise errors.CallError(
                f"a lens is not multiplied, by {factor!r} or otherwise",
                remedy=f"{guesses.TIMES_OF_LENS}.",
            )

        __rmul__ = __truediv__ = __mul__

        def __setattr__(self, name: str, value: Any) -> None:
            """Refuse an assignment that would change nothing, as of another adapter or model.

            The plan of hooks was made from the model and the adapter that the lens was given.
            """
            is_fixed = name in guesses.FIXED_IN_LENS and name in vars(self)
            is_known = name.startswith("_") or name in _SET_WHEN_MADE or hasattr(type(self), name)
            if is_fixed or not is_known:
                raise guesses.not_set(self, name, guesses.FIXED_IN_LENS)
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        layers = errors.many(len({site.layer for site in self.sites}), "layer")
        sites = f"{errors.many(len(self.sites), 'site')} in {layers}"
        parts = [sites]
        if self.reads_strings:
            parts.append(f"strings: {self.reads_strings}")
        if self.tokenizer_origin:
            parts.append(f"tokenizer: {self.tokenizer_origin}")
        return f"LoraLens({self.adapter!r} over {self.class_name}: {'; '.join(parts)})"
