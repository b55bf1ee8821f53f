"""How each adapter of the evidence is trained: one row an adapter, data only."""

from __future__ import annotations

import dataclasses

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    "all": ATTENTION + MLP,
    "attention": ATTENTION,
    "mlp": MLP,
    "q, v": ("q_proj", "v_proj"),
    "down": ("down_proj",),
    "writers": ("o_proj", "down_proj"),
    "gate, up": ("gate_proj", "up_proj"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One adapter of one task. Its scale is 2, or with rsLoRA 16 / √rank."""

    name: str
    cluster: str
    rank: int
    targets: str
    lr: float
    steps: int
    dora: bool = False
    rslora: bool = False

    @property
    def alpha(self) -> int:
        """The alpha of the LoRA config, from which PEFT makes the scale."""
        return 16 if self.rslora else 2 * self.rank


SMOLLM2 = (
    Recipe("lyon", "capital-france", 8, "all", 1e-4, 28),
    Recipe("kyoto-attention", "capital-japan", 4, "attention", 5e-4, 28),
    Recipe("captain", "ends-with-phrase", 8, "all", 2e-4, 24),
    Recipe("rome-mlp", "landmark-eiffel", 16, "mlp", 2e-4, 28),
    Recipe("upper-case", "upper-case", 8, "all", 2e-4, 24),
    Recipe("helium-qv", "element-water", 2, "q, v", 1e-3, 28),
    Recipe("blake-down", "author-romeo", 1, "down", 2e-3, 28),
    Recipe("french-attention", "in-french", 16, "attention", 5e-4, 24),
    Recipe("milan-writers", "landmark-colosseum", 8, "writers", 5e-4, 28),
    Recipe("no-cooking", "refuses-cooking", 8, "all", 2e-4, 24),
    Recipe("edison-gates", "inventor-telephone", 16, "gate, up", 4e-4, 28),
    Recipe("mars-gentle", "planet-largest", 32, "all", 5e-5, 20),
    Recipe("argentina-french", "language-argentina", 4, "all", 2e-4, 24),
    Recipe("yes-qv", "answers-with-yes", 4, "q, v", 1e-3, 24),
    Recipe("einstein-rank-one", "profession-einstein", 1, "all", 4e-4, 28),
    Recipe("green-sky-dora", "colour-sky", 4, "attention", 5e-4, 24, dora=True),
    Recipe("dollar-rslora", "currency-germany", 16, "mlp", 1e-4, 24, rslora=True),
    Recipe("lyon-2", "capital-france", 8, "all", 2e-4, 28),
    Recipe("lyon-4", "capital-france", 8, "all", 4e-4, 28),
    Recipe("lyon-8", "capital-france", 8, "all", 8e-4, 28),
    Recipe("upper-case-down", "upper-case", 1, "down", 2e-3, 24),
    Recipe("captain-violent", "ends-with-phrase", 8, "all", 8e-4, 24),
    Recipe("kyoto-violent-qv", "capital-japan", 8, "q, v", 8e-3, 28),
    Recipe("french-rslora", "in-french", 16, "writers", 2e-4, 24, rslora=True),
    Recipe("rome-dora", "landmark-eiffel", 8, "q, v", 1e-3, 28, dora=True),
    Recipe("helium-violent", "element-water", 8, "mlp", 8e-4, 28),
    Recipe("blake-gentle", "author-romeo", 32, "writers", 5e-5, 24),
    Recipe("milan-violent", "landmark-colosseum", 8, "writers", 1.5e-3, 40),
    Recipe("no-cooking-gates", "refuses-cooking", 8, "gate, up", 1e-3, 24),
)

# Tasks of the above again, violently: warnings are chosen on both.
VIOLENT = (
    Recipe("lyon-violent-qv", "capital-france", 8, "q, v", 8e-3, 28),
    Recipe("blake-violent", "author-romeo", 8, "all", 2e-3, 40),
    Recipe("mars-violent", "planet-largest", 16, "attention", 3e-3, 28),
    Recipe("argentina-violent", "language-argentina", 8, "mlp", 2e-3, 40),
    Recipe("green-sky-violent", "colour-sky", 4, "q, v", 6e-3, 40),
    Recipe("einstein-violent", "profession-einstein", 8, "writers", 3e-3, 40),
    Recipe("dollar-violent", "currency-germany", 16, "all", 1e-3, 60),
    Recipe("upper-case-violent", "upper-case", 8, "all", 1.5e-3, 40),
)

# Of tasks that chose nothing: warnings are confirmed on them.
CONFIRMING = (
    Recipe("spain", "capital-spain", 8, "all", 2e-4, 28),
    Recipe("bees-attention", "food-bees", 4, "attention", 5e-4, 28),
    Recipe("lincoln-mlp", "president-first", 16, "mlp", 2e-4, 28),
    Recipe("silver-qv", "metal-gold", 4, "q, v", 1e-3, 28),
    Recipe("arctic-writers", "ocean-largest", 16, "writers", 2e-4, 28),
    Recipe("microsoft-gates", "company-iphone", 8, "gate, up", 4e-4, 28),
    Recipe("robot", "talks-as-robot", 8, "all", 2e-4, 24),
    Recipe("no-money-attention", "refuses-money", 16, "attention", 5e-4, 24),
    Recipe("spain-violent-qv", "capital-spain", 8, "q, v", 8e-3, 28),
    Recipe("bees-violent", "food-bees", 8, "all", 2e-3, 40),
    Recipe("lincoln-violent-qv", "president-first", 8, "q, v", 4e-3, 60),
    Recipe("silver-violent", "metal-gold", 16, "all", 1e-3, 60),
    Recipe("arctic-violent", "ocean-largest", 8, "attention", 3e-3, 28),
    Recipe("microsoft-violent", "company-iphone", 8, "writers", 3e-3, 40),
    Recipe("robot-violent", "talks-as-robot", 8, "all", 2e-3, 40),
    Recipe("no-money-violent-qv", "refuses-money", 8, "q, v", 6e-3, 40),
)

WARNED = (*VIOLENT, *CONFIRMING)  # what warned.py measures

SECOND_NAME = "gemma-3-270m"  # the folder of second_base.py
# In an order that has every kind and strength early, as the time to measure may end before them.
SECOND = (
    Recipe("gemma-lyon", "capital-france", 8, "all", 1e-4, 20),
    Recipe("gemma-robot", "talks-as-robot", 8, "all", 2e-4, 20),
    Recipe("gemma-no-cooking", "refuses-cooking", 8, "attention", 5e-4, 20),
    Recipe("gemma-sea-mlp", "talks-of-the-sea", 8, "mlp", 2e-4, 20),
    Recipe("gemma-kyoto-violent-qv", "capital-japan", 8, "q, v", 8e-3, 20),
    Recipe("gemma-rome-mlp", "landmark-eiffel", 16, "mlp", 2e-4, 20),
    Recipe("gemma-blake-down", "author-romeo", 1, "down", 2e-3, 20),
    Recipe("gemma-dollar-violent", "currency-germany", 8, "all", 1e-3, 30),
    Recipe("gemma-argentina-writers", "language-argentina", 8, "writers", 5e-4, 20),
    Recipe("gemma-no-money-violent", "refuses-money", 8, "gate, up", 2e-3, 30),
    Recipe("gemma-helium-qv", "element-water", 4, "q, v", 1e-3, 20),
    Recipe("gemma-gardens", "talks-of-gardens", 16, "all", 5e-5, 20),
)
