"""In which dtype a base is loaded, where none is asked for."""

from __future__ import annotations

from lens_lora.hosts.placement import Placement


def test_weights_keep_their_own_dtype_but_on_the_cpu():
    assert Placement(device="cuda").weights == "auto"
    assert Placement(load_in_8bit=True).weights == "auto"
    assert Placement(device="cpu").weights == "float32"


def test_a_dtype_that_is_asked_for_is_taken():
    assert Placement(device="cuda", dtype="float32").weights == "float32"
    assert Placement(device="cpu", dtype="bfloat16").weights == "bfloat16"
