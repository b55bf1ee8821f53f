from .prompts import Prompts as Prompts
from .prompts import PromptsLike as PromptsLike
from .prompts import PromptTokens as PromptTokens
from .reading import LogProbs as LogProbs
from .reading import Reading as Reading
from .readout import Readout as Readout
