"""Whatever the bytes of an adapter's two files, it is refused by name or read as it was saved.

The law: `load_adapter` raises a `LensLoraError`, or returns every module that was saved, with
finite factors and scales that are not zero; where no byte of the weights was changed, with the
factors that were saved. No other exception, nothing dropped, nothing zero.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import warnings
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from shapes import share

import lens_lora as ll

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SCALE_FIELDS = {"lora_alpha", "alpha_pattern", "use_rslora"}

pytestmark = pytest.mark.bad_input

fuzz = functools.partial(settings, deadline=None, database=None)


class Victim:
    """A valid adapter on disk, its two files, and what it holds."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = models.hf_model("llama")
            models.peft_model("llama", base, targets=["q_proj", "v_proj"]).save_pretrained(folder)
        self.folder = folder
        self.config = (folder / CONFIG).read_bytes()
        self.weights = (folder / WEIGHTS).read_bytes()
        self.fields = json.loads(self.config)
        self.header_size = struct.unpack("<Q", self.weights[:8])[0]
        self.header = json.loads(self.weights[8 : 8 + self.header_size])
        self.body = self.weights[8 + self.header_size :]
        self.original = ll.load_adapter(folder)

    def load(self, config: bytes | None = None, weights: bytes | None = None) -> ll.Adapter | None:
        """The adapter under the law, or None where it was refused."""
        (self.folder / CONFIG).write_bytes(self.config if config is None else config)
        (self.folder / WEIGHTS).write_bytes(self.weights if weights is None else weights)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapter = ll.load_adapter(self.folder)
        except ll.errors.LensLoraError as error:
            assert str(self.folder) in str(error)
            return None
        assert len(adapter) == len(self.original)
        assert adapter.base_model is None or isinstance(adapter.base_model, str)
        for factors in adapter.modules.values():
            assert torch.isfinite(factors.A).all()
            assert torch.isfinite(factors.B).all()
            assert factors.A.numel()
            assert factors.B.numel()
            assert factors.scale != 0
            assert math.isfinite(factors.scale)
        assert weights is not None or self.is_original(adapter)
        return adapter

    def is_original(self, adapter: ll.Adapter) -> bool:
        pairs = zip(self.original.modules.items(), adapter.modules.items(), strict=True)
        return all(
            p == q and torch.equal(f.A, g.A) and torch.equal(f.B, g.B) for (p, f), (q, g) in pairs
        )

    def with_header(self, header: str) -> bytes:
        raw = header.encode(errors="surrogatepass")
        return struct.pack("<Q", len(raw)) + raw + self.body


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim"))


def test_the_law_can_fail(victim):
    """The unspoiled adapter is read, and the checks tell a changed factor."""
    assert victim.load() is not None
    flipped = bytearray(victim.weights)
    flipped[-1] ^= 0x80
    changed = victim.load(weights=bytes(flipped))
    assert changed is not None
    assert not victim.is_original(changed)


# --- the weights


@pytest.mark.slow
@fuzz(max_examples=share(40))
@given(st.data())
def test_truncated(victim, data):
    """A file cut short anywhere, or with bytes after its end, is refused."""
    end = data.draw(st.integers(0, len(victim.weights) - 1))
    assert victim.load(weights=victim.weights[:end]) is None
    assert victim.load(weights=victim.weights + b"\0" * data.draw(st.integers(1, 9))) is None


@fuzz(max_examples=share(100))
@given(st.data())
def test_flipped_bytes(victim, data):
    """Up to four bytes of the header or the body changed."""
    header_end = 8 + victim.header_size
    parts = [(0, header_end), (header_end, len(victim.weights))]
    start, end = data.draw(st.sampled_from(parts))
    spoiled = bytearray(victim.weights)
    for at in data.draw(st.lists(st.integers(start, end - 1), min_size=1, max_size=4)):
        spoiled[at] ^= data.draw(st.integers(1, 255))
    victim.load(weights=bytes(spoiled))


@fuzz(max_examples=share(15))
@given(st.one_of(st.integers(0, 4096), st.integers(0, 2**64 - 1), st.just(2**64 - 1)))
def test_header_length(victim, length):
    """A length that is not the header's is refused, however large, and nothing is allocated."""
    read = victim.load(weights=struct.pack("<Q", length) + victim.weights[8:])
    assert (read is not None) == (length == victim.header_size)


numbers = st.one_of(
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 1.5, None, "3"]),
    st.integers(-4, 64),
)
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U64", "I8", "BOOL", "C64", "F8_E4M3", "F4", "X", 3]


@fuzz(max_examples=share(60))
@given(st.data())
def test_header_entries(victim, data):
    """Huge or negative shapes, other dtypes, offsets that overlap, leave holes or run out."""
    header = json.loads(json.dumps(victim.header))
    entry = header[data.draw(st.sampled_from(sorted(k for k in header if k != "__metadata__")))]
    field = data.draw(st.sampled_from(["shape", "data_offsets", "dtype", "nothing"]))
    if field == "nothing":
        del entry[data.draw(st.sampled_from(sorted(entry)))]
    elif field == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(DTYPES))
    else:
        entry[field] = data.draw(st.lists(numbers, max_size=4))
    victim.load(weights=victim.with_header(json.dumps(header)))


@pytest.mark.slow
@fuzz(max_examples=share(20))
@given(st.data())
def test_duplicate_and_renamed_keys(victim, data):
    """A name that occurs twice cannot hide a tensor; a changed name cannot drop one."""
    names = sorted(k for k in victim.header if k != "__metadata__")
    one, other = data.draw(st.permutations(names))[:2]
    pairs = [(n, json.dumps(entry)) for n, entry in victim.header.items()]
    name = data.draw(
        st.one_of(
            st.just(other),
            st.sampled_from(["", ".", "base_model.model.", "x" * 5000, one.replace("0", "²")]),
            st.sampled_from([one.replace(".weight", ".default.weight"), one.replace("_A", "_B")]),
            st.text(max_size=20),
        )
    )
    renamed = [(name if n == one else n, entry) for n, entry in pairs]
    twice = [*pairs, (name, json.dumps(victim.header[other]))]
    for entries in (renamed, twice):
        text = "{" + ",".join(f"{json.dumps(n)}:{e}" for n, e in entries) + "}"
        adapter = victim.load(weights=victim.with_header(text))
        assert adapter is None or victim.is_original(adapter)


# --- the config

json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=12),
        st.sampled_from(["q_proj", "LORA", "pissa", "all", "none", "(", ".*", "1" * 400, 10**400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["q_proj", ".*v_proj", "(", "r"]), inner, max_size=3),
    ),
    max_leaves=5,
)
FIELDS = sorted({*LoraConfig.__dataclass_fields__, "unknown_field", "__class__", ""})


@fuzz(max_examples=share(120))
@given(st.lists(st.tuples(st.sampled_from(FIELDS), json_values), min_size=1, max_size=2))
def test_random_fields(victim, edits):
    """Any JSON in any field: refused, or the same factors, and s as it was unless s was edited."""
    fields = {**victim.fields, **dict(edits)}
    adapter = victim.load(config=json.dumps(fields).encode())
    modules = {} if adapter is None else adapter.modules
    for path, factors in modules.items():
        if not SCALE_FIELDS & dict(edits).keys():
            assert factors.scale == victim.original.modules[path].scale
        elif not fields["alpha_pattern"]:
            divisor = math.sqrt(3) if fields["use_rslora"] else 3
            assert factors.scale == fields["lora_alpha"] / divisor


@pytest.mark.parametrize("field", sorted(LoraConfig.__dataclass_fields__))
def test_missing_field(victim, field):
    """An older PEFT's config, without one of the fields: PEFT's default, or refused."""
    fields = {k: v for k, v in victim.fields.items() if k != field}
    adapter = victim.load(config=json.dumps(fields).encode())
    assert (adapter is None) == (field in ("r", "peft_type"))


PATHS = ["../../etc/passwd", "/etc/passwd", "~/.ssh", "file:///etc/passwd", "a\0b", "\\\\host\\x"]


@pytest.mark.parametrize("field", ["base_model_name_or_path", "revision", "megatron_core"])
@pytest.mark.parametrize("path", PATHS)
def test_paths_in_the_config_are_only_names(victim, field, path, monkeypatch):
    """No path that a config names is opened: only the adapter's own two files are."""
    opened = []
    real_open = open

    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr("builtins.open", spy)
    adapter = victim.load(config=json.dumps({**victim.fields, field: path}).encode())
    assert adapter is not None
    assert adapter.base_model == (path if field == "base_model_name_or_path" else None)
    assert any(CONFIG in name for name in opened)
    assert all(Path(name).parent == victim.folder for name in opened)


@fuzz(max_examples=share(40))
@given(st.data())
def test_config_bytes(victim, data):
    """Not UTF-8, cut short, nested too deeply, or not an object."""
    spoiled = bytearray(victim.config)
    kind = data.draw(st.sampled_from(["flip", "cut", "nest", "binary"]))
    if kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(spoiled) - 1), min_size=1, max_size=3)):
            spoiled[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        spoiled = spoiled[: data.draw(st.integers(0, len(spoiled) - 1))]
    elif kind == "nest":
        depth = data.draw(st.sampled_from([100, 900, 2000, 100_000]))
        field = data.draw(st.sampled_from(["rank_pattern", "unknown_field", "eva_config"]))
        nested = "[" * depth + "]" * depth
        spoiled = spoiled.replace(b"{", f'{{"{field}": {nested}, '.encode(), 1)
    else:
        spoiled = bytearray(data.draw(st.binary(max_size=64)))
    adapter = victim.load(config=bytes(spoiled))
    assert adapter is None or kind in ("flip", "nest")
