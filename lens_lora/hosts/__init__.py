"""Hooked models that are not plain ones, and how a base is built, placed and checked.

build, placement, quirks        a Hugging Face model becomes a hooked model
attention                       by torch's fused kernels, or with hook points of its patterns
bridged, probe                  architectures that no table lists, read from the bridge
experts, single_experts,        stacks of experts and routers, and the tokens that change experts
  rerouted
quantised                       linear modules in 4 and 8 bit
processed                       folded norms, centred weights, folded value biases
given_base                      whether the base is the one that the adapter was trained on
unusable                        models over which no lens can be laid
over_ranks                      a model whose weights several processes share out
null_adapters                   random directions in place of an adapter's, part by part of a model
unloaded, planned_analyses      a configuration alone: its sizes, and what analyses would take
"""
