"""Where the adapter meets the hooked model: the names that other folders use together."""

# pyright: reportUnusedImport=false

from lens_lora.model.basis import Gauge, NormUpdate, Update
from lens_lora.model.gates import Inject, Injection, ScaleInject
from lens_lora.model.generate import SideBySide
from lens_lora.model.hooks import HookFn, alone, attached
from lens_lora.model.lens import LoraLens, Scale, name_of_scale, null_lenses
from lens_lora.model.sites import (
    Group,
    Groups,
    Names,
    Site,
    by_axes,
    chosen_sites,
    group_sites,
    indicator,
)
from lens_lora.model.updates import SiteUpdate
