from .cache import Evaluations as Evaluations
from .cache import evaluations as evaluations
from .function import Function as Function
from .function import Gates as Gates
from .lens import LoraLens as LoraLens
from .noise import Noise as Noise
from .own_analyses import Analysis as Analysis
from .own_analyses import analysis as analysis
