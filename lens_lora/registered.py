"""The list of all modules that register something with the core; reading it imports none of them.

Each module is named as a string, and imported when what it registers is first looked for. A new
module of figures or of words is added to the entry of its folder.
"""

from __future__ import annotations

# For the results of each folder: the modules that draw them and put them into words. An instance is
# drawn by the modules of its own class and of all its base classes, so the core's are always among
# them.
DRAWERS: dict[str, tuple[str, ...]] = {
    "lens_lora.core": (
        "lens_lora.views.reprs",
        "lens_lora.views.labelled",
        "lens_lora.views.maps",
        "lens_lora.views.curves",
        "lens_lora.views.tables",
        "lens_lora.views.words",
        "lens_lora.views.reports",
    ),
    "lens_lora.audit": (
        "lens_lora.audit.figures",
        "lens_lora.audit.words",
        "lens_lora.audit.page",
        "lens_lora.audit.speech_words",
        "lens_lora.audit.speech_page",
    ),
    "lens_lora.curvature": ("lens_lora.curvature.figures", "lens_lora.curvature.words"),
    "lens_lora.directions": ("lens_lora.directions.figures", "lens_lora.directions.words"),
    "lens_lora.edge_attribution": (
        "lens_lora.edge_attribution.figures",
        "lens_lora.edge_attribution.graph_figure",
        "lens_lora.edge_attribution.page",
    ),
    "lens_lora.explanations": (
        "lens_lora.explanations.figures",
        "lens_lora.explanations.words",
        "lens_lora.explanations.response_words",
        "lens_lora.explanations.response_page",
        "lens_lora.explanations.readout_words",
        "lens_lora.explanations.readout_page",
        "lens_lora.explanations.page",
    ),
    "lens_lora.hidden": ("lens_lora.hidden.figures", "lens_lora.hidden.words"),
    "lens_lora.interaction": ("lens_lora.interaction.figures", "lens_lora.interaction.words"),
    "lens_lora.judging": ("lens_lora.judging.figures", "lens_lora.judging.words"),
    "lens_lora.shifts": ("lens_lora.shifts.figures", "lens_lora.shifts.words"),
    "lens_lora.ship": (
        "lens_lora.ship.page",
        "lens_lora.ship.figures",
        "lens_lora.ship.words",
    ),
    "lens_lora.sweeps": ("lens_lora.sweeps.figures",),
    "lens_lora.two_adapters": (
        "lens_lora.two_adapters.figures",
        "lens_lora.two_adapters.words",
        "lens_lora.two_adapters.page",
    ),
}

# What joins the shards of each kind of run (`lens_lora/runs/shards.py`).
GATHERED = {
    "sweep": "lens_lora.sweeps.shards:gathered",
    "scan": "lens_lora.banks.scan:gathered",
}

# The modules in which the reader of a result's file looks for the class that the file names.
RESULTS = ["lens_lora.results"]

# Modules of formats/ that read adapters of another format than PEFT's, by `@adapter_format`.
FORMATS: list[str] = []

# For each function that the core declares and does not have itself (`lens_lora/core/provided.py`):
# the module that provides it.
PROVIDERS: dict[str, str] = {
    "lens_lora.core.adapter.extensions.folder_of": "lens_lora.formats.folders",
    "lens_lora.core.adapter.extensions.live_updates": "lens_lora.formats.live",
    "lens_lora.core.adapter.extensions.updates_over_base": "lens_lora.formats.live",
    "lens_lora.core.adapter.extensions.change_between": "lens_lora.formats.between",
    "lens_lora.core.adapter.extensions.side_by_side": "lens_lora.formats.arithmetic",
    "lens_lora.core.adapter.extensions.stacked": "lens_lora.formats.arithmetic",
    "lens_lora.core.adapter.extensions.null_updates": "lens_lora.formats.arithmetic",
    "lens_lora.core.adapter.extensions.without_direction": "lens_lora.formats.projected",
    "lens_lora.core.adapter.extensions.truncated": "lens_lora.formats.projected",
    "lens_lora.core.adapter.extensions.save_adapter": "lens_lora.formats.peft_write",
    "lens_lora.core.adapter.extensions.save_gguf": "lens_lora.formats.gguf_write",
    "lens_lora.core.readout.extensions.margin_between": "lens_lora.responses.answers",
    "lens_lora.core.readout.extensions.answer_ids": "lens_lora.responses.answers",
    "lens_lora.core.readout.responses.save_generated": "lens_lora.core.results.storage",
    "lens_lora.core.model.extensions.family_of_bridge": "lens_lora.hosts.bridged",
    "lens_lora.core.model.extensions.named_as_model": "lens_lora.hosts.single_experts",
    "lens_lora.core.model.extensions.require_own_parameters": "lens_lora.hosts.bridged",
    "lens_lora.core.model.extensions.check_modules": "lens_lora.hosts.probe",
    "lens_lora.core.model.extensions.note_on_base": "lens_lora.hosts.given_base",
    "lens_lora.core.model.extensions.note_on_names": "lens_lora.hosts.given_base",
    "lens_lora.core.model.site_basis.processing_of": "lens_lora.hosts.processed",
    "lens_lora.core.model.site_basis.folded_value_bias": "lens_lora.hosts.processed",
    "lens_lora.core.model.extensions.refuse_unusable_weights": "lens_lora.hosts.unusable",
    "lens_lora.core.model.extensions.refuse_unusable_bridge": "lens_lora.hosts.unusable",
    "lens_lora.core.model.extensions.refuse_without_float64": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.quantised_linears": "lens_lora.hosts.quantised",
    "lens_lora.core.model.extensions.quantised_name": "lens_lora.hosts.quantised",
    "lens_lora.core.model.extensions.dequantised": "lens_lora.hosts.quantised",
    "lens_lora.core.model.extensions.differentiable_products": "lens_lora.hosts.quantised",
    "lens_lora.core.model.extensions.experts_by_layer": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.as_one_map": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.expert_shape": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.expert_map": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.write_at": "lens_lora.hosts.experts",
    "lens_lora.core.model.extensions.tokenizer_differences": "lens_lora.formats.tokenizers",
    "lens_lora.core.model.extensions.continued": "lens_lora.responses.answers",
    "lens_lora.core.model.extensions.generated": "lens_lora.responses.generate",
    "lens_lora.core.model.extensions.ablate": "lens_lora.directions.removal",
    "lens_lora.core.model.extensions.function_of": "lens_lora.core.function.binding",
    "lens_lora.core.model.extensions.rerouted_tokens": "lens_lora.hosts.rerouted",
    "lens_lora.core.model.extensions.null_adapters": "lens_lora.hosts.null_adapters",
    "lens_lora.core.model.extensions.slopes_of_adapters": "lens_lora.banks.base_half",
}
