"""`LoraLens.generate`: what the model says at given gates."""

from __future__ import annotations

from collections.abc import Sequence

from lens_lora import arguments
from lens_lora.errors import PromptError
from lens_lora.hooked.alone import alone
from lens_lora.hooked.generation import GatedModel, Row, Speaker, end_tokens
from lens_lora.hooked.scales import Scale
from lens_lora.readouts.generated import Generated
from lens_lora.readouts.prompts import Prompts, PromptsLike, which_prompt
from lens_lora.readouts.sampling import Sampling

__all__ = ["Generates", "require_room"]


class Generates:
    """The part of a lens that makes its model speak."""

    @alone
    def generate(
        self: GatedModel,
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
        """What the model says after each prompt, at the given gates.

        The likeliest token each time, as Hugging Face's greedy search with the adapter active takes
        it; what else a generation_config asks for (a repetition penalty, say) is left out. Pass the
        result on as a response: `ll.token_shifts(lens, said.prompts, said)`.

        Cost: a pass over the prompt, one over a single token for each new one, and one over the
        whole, which confirms every token; prompts go together. Where the model's key-value cache
        is wrong, a pass over the whole for each token.

        Args:
            prompts: strings, conversations, ids or `Prompts`.
            max_new_tokens: the most that are said after each.
            scale: as for `gates`; 0 for the base, 1 for the adapted model.
            temperature: 0 for the likeliest token; above, tokens are drawn.
            top_p: draw from the fewest tokens whose probabilities sum to this.
            seed: of the draws: the same prompts and seed give the same tokens.
            eos_token_id: an id or several that end a response, () for none; by default those of
                the base's generation_config, its config, or the tokenizer's.
            progress: show a bar.

        Raises:
            PromptError: a prompt that leaves no room for so many tokens in the context.
            ArgumentError: max_new_tokens below 1, or what `Sampling` and `gates` refuse.
            SiteError: as for `gates`; gates of another number of prompts.
            NumericsError: non-finite logits.
        """
        most = arguments.whole("max_new_tokens", max_new_tokens, 1)
        sampling = Sampling(temperature, top_p, seed)
        ends = end_tokens(self.model, self._hf_model, eos_token_id)
        ready, gates = self.prompts(prompts), self.gates(scale).detach()
        require_room(self, ready, most)
        noise = sampling.noise(ready.batch, most)
        rows = Speaker(self, gates, sampling, noise, ends).say(ready, progress=progress)
        ids = tuple(ready.tokens.new_tensor(row.tokens[-row.said :]) for row in rows)
        text = tuple(_text(self, row) for row in rows)
        return Generated(ids, text, ready, tuple(row.ended for row in rows))


def _text(lens: GatedModel, row: Row) -> str:
    ids, tokenizer = row.tokens[-row.said :], getattr(lens.model, "tokenizer", None)
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids, skip_special_tokens=True)


def require_room(lens: GatedModel, prompts: Prompts, most: int) -> None:
    """Check that so many tokens more fit into the context; the last one is not run.

    Args:
        lens: the adapter over the model.
        prompts: that are gone on with.
        most: the most tokens that are said after each.

    Raises:
        PromptError: they do not fit.
    """
    context = getattr(lens.model.cfg, "n_ctx", None)
    longest = int(prompts.lengths.max())
    if context and longest + most - 1 > context:
        which = which_prompt(int(prompts.lengths.argmax()), prompts.batch)
        raise PromptError(
            f"{which} has {longest} tokens, and max_new_tokens={most} more do not fit into the "
            f"context of this {type(lens.model).__name__}, {context} (cfg.n_ctx); at most "
            f"{context - longest + 1} do."
        )
