from .analyses.own_analyses import Analysis as Analysis
from .analyses.own_analyses import analysis as analysis
from .function.cache import Evaluations as Evaluations
from .function.cache import evaluations as evaluations
from .function.function import Function as Function
from .function.function import Gates as Gates
from .function.noise import Noise as Noise
from .model.with_function import LoraLens as LoraLens
