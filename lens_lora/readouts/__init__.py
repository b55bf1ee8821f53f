"""What is asked of the logits: the names that other folders use together."""

# pyright: reportUnusedImport=false

from lens_lora.readouts.answers import KL, AnswerLike, continued
from lens_lora.readouts.prompts import Prompts, PromptsLike, PromptTokens, which_prompt
from lens_lora.readouts.reading import LogProbs, Reading
from lens_lora.readouts.readout import Readout, bound
