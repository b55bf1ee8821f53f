from .analysis import Analysis as Analysis
from .analysis import analysis as analysis
from .evaluations import Evaluations as Evaluations
from .evaluations import evaluations as evaluations
from .function import Function as Function
from .function import Gates as Gates
from .lens import LoraLens as LoraLens
