"""Every result comes back from its file as it was; no bytes whatever are read as other numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_origin, get_type_hints

import by_folder
import pandas as pd
import pytest
import torch
from every_result import every_result
from hypothesis import given, settings
from hypothesis import strategies as st
from results_by_hand import two_prompts
from safetensors import safe_open
from safetensors.torch import save, save_file
from shapes import share

import lens_lora as ll
from lens_lora.core.results import axes, storage
from lens_lora.core.results.base import Drawn, Measured, Paged, Ranked, Read, Result
from lens_lora.core.results.labelled import Labelled

RESULTS = every_result()
SMALL = two_prompts()


def same(a: object, b: object, path: str = "") -> None:
    """Equal in type, shape and every number, NaN included."""
    assert type(a) is type(b) or isinstance(a, Mapping), path
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()), path
        assert a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()), path
    elif dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            same(getattr(a, field.name), getattr(b, field.name), f"{path}.{field.name}")
    elif isinstance(a, Mapping):
        assert list(a) == list(b), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), path
        for i, (one, other) in enumerate(zip(a, b, strict=True)):
            same(one, other, f"{path}.{i}")
    else:
        assert a == b or (a != a and b != b), path


@pytest.mark.sample(19)
@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_every_result_comes_back(result: Result, tmp_path: Path):
    loaded = type(result).load(result.save(tmp_path / "r.safetensors"))
    same(result, loaded)
    pd.testing.assert_frame_equal(result.to_frame(), loaded.to_frame())
    assert repr(loaded) == repr(result)


def test_every_final_class_is_among_them():
    """A class is abstract or final: nothing that can be made has a subclass."""
    classes = {kind for kind in descendants(Result) if kind.__module__.startswith("lens_lora.")}
    classes -= {Labelled}  # for classes of one's own; whole but for its values
    abstract = {kind for kind in classes if kind.__abstractmethods__}
    assert {Drawn, Paged, Read, Measured, Ranked} <= abstract
    assert Result.__abstractmethods__
    by_hand = {type(result) for result in RESULTS}
    named_by_hand = [kind.__name__ for kind in by_hand]
    by_folder.require_in_list("RESULTS", [c.__name__ for c in classes - abstract], named_by_hand)
    assert classes - abstract == by_hand
    for kind in classes - abstract:
        assert not kind.__subclasses__(), kind


def descendants(kind: type) -> set[type]:
    return {k for below in kind.__subclasses__() for k in ({below} | descendants(below))}


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_any_result_is_loaded_as_its_own_class(result: Result, tmp_path: Path):
    loaded = ll.load_result(result.save(tmp_path / "r.safetensors"))
    assert type(loaded) is type(result)
    same(result, loaded)


def test_a_class_that_nothing_has_imported_is_found(monkeypatch: pytest.MonkeyPatch):
    """`lens_lora.results` imports a class when it is asked for, and that makes it known."""

    class Results:
        def __dir__(self) -> list[str]:
            return ["Edges"]

        def __getattr__(self, name: str) -> type:
            storage._KINDS[name] = ll.results.Edges
            return ll.results.Edges

    monkeypatch.setitem(sys.modules, "lens_lora.results", Results())
    monkeypatch.delitem(storage._KINDS, "Edges")
    assert storage._kind("Edges") is ll.results.Edges


LOADED = """
import json, os, sys
import pandas, torch
import lens_lora as ll
for order in json.loads(sys.argv[1]):
    if not os.fork():
        print(json.dumps([type(ll.load_result(path)).__name__ for path in order]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_loading_imports_the_class_that_the_file_names(tmp_path: Path):
    """In a new process nothing has imported any class of results: each file names its own."""
    paths = {type(r).__name__: str(r.save(tmp_path / f"{i}")) for i, r in enumerate(RESULTS)}
    orders = [list(paths), list(paths)[::-1]]
    listed = json.dumps([[paths[name] for name in order] for order in orders])
    command = [sys.executable, "-c", LOADED, listed]
    done = subprocess.run(command, capture_output=True, text=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == orders, done.stderr


def test_two_processes_that_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One writes the whole file while the other is writing: both end, and the file is whole."""
    result = two_prompts()
    file = tmp_path / "result"
    write = Path.write_bytes
    written: list[Path] = []

    def interrupted(path: Path, content: bytes) -> int:
        size = write(path, content)
        written.append(path)
        if len(written) == 1:
            result.save(file)
        return size

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    result.save(file)
    assert len(set(written)) == 2
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(type(result).load(file).values, result.values)


def test_a_class_that_is_unknown_or_no_result_is_named(tmp_path: Path):
    """Public names of `lens_lora.results` that no file holds are unknown as well."""
    for name in ("Nothing", "Site", "SweepResult", "storage", "Noise"):
        path = written({"of": name, "fields": {}}, {}, tmp_path / name)
        with pytest.raises(ll.errors.LensLoraError, match=rf"{name}: .*{name}.*again"):
            ll.load_result(path)
    site = dataclasses.asdict(SMALL.sites[0])
    path = written({"of": "Site", "fields": site}, {}, tmp_path / "part")
    with pytest.raises(ll.errors.LensLoraError, match="holds Site, which is a part of a result"):
        ll.load_result(path)


def test_another_result_is_named(tmp_path: Path):
    path = two_prompts().save(tmp_path / "a.safetensors")
    with pytest.raises(
        ll.errors.LensLoraError, match="holds Attribution, expected Effects.*Attribution."
    ):
        ll.results.Effects.load(path)
    with pytest.raises(ll.errors.LensLoraError, match="no such file"):
        ll.results.Effects.load(tmp_path / "none")


@pytest.mark.parametrize("format", ["lens_lora attribution 1", "lens_lora result 2"])
def test_other_formats_are_named(format: str, tmp_path: Path):
    """An older and a newer file."""
    path = tmp_path / "a.safetensors"
    save_file({"values": torch.zeros(1)}, str(path), metadata={"format": format, "labels": "{}"})
    with pytest.raises(ll.errors.LensLoraError, match=f"its format is '{format}', expected.*again"):
        ll.results.Attribution.load(path)


def written(labels: object, tensors: dict[str, torch.Tensor], path: Path) -> Path:
    """A file whose digest is right, of any labels."""
    text = json.dumps(labels)
    digest = storage._digest(text, tensors)  # pyright: ignore[reportPrivateUsage]
    metadata = {"format": storage.FORMAT, "labels": text, "sha256": digest}
    path.write_bytes(save(tensors, metadata=metadata))
    return path


@pytest.mark.sample(2)
@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_no_change_of_any_result_is_read_as_it(result: Result, tmp_path: Path):
    """A lost, renamed or added field, tensor or class; a number or a list in place of another.

    With a digest that is right, as a newer version of this package would write it.
    """
    labels, tensors = contents(result.save(tmp_path / "r"))
    same(result, type(result).load(written(labels, tensors, tmp_path / "same")))
    for i, (changed, kept) in enumerate(changes(labels, tensors)):
        path = written(changed, kept, tmp_path / str(i))
        with pytest.raises(ll.errors.LensLoraError, match="again|load it with"):
            type(result).load(path)


def changes(
    labels: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[object, dict[str, torch.Tensor]]]:
    fields = labels["fields"]
    for name in fields:
        yield {**labels, "fields": {k: v for k, v in fields.items() if k != name}}, tensors
        renamed = {(f"{k}_of_2" if k == name else k): v for k, v in fields.items()}
        yield {**labels, "fields": renamed}, tensors
    yield {**labels, "fields": {**fields, "curvature": 1.0}}, tensors
    for name in tensors:
        yield labels, {k: v for k, v in tensors.items() if k != name}
    for of in ("Site", "Unknown", "Path", 3, None):
        yield {**labels, "of": of}, tensors
    for other in (fields, [labels], {"map": labels}, "text", 3, None):
        yield other, tensors


# Nothing else in the result says how long these are.
ALONE = re.compile(
    r"Components\.(?!sites)|LogitShift\.values axis 0|FeatureWrites\.values axis 2"
    r"|ConstantPart\.(vectors|steering).* axis 0|Spectrum\.singular_values axis 0"
    r"|LoRAFactors\.(A axis 1|B axis 0)|Repair\.random axis 0"
    r"|AdapterComparison\.(null_effects axis 0|null_function axis 1)"
    r"|(ActivationEffects|BestSubset|Together)\.sites|Reconciled\.(sites|left_out)"
    r"|(Coupling|Edges|Effects|GroupAttribution)\.sites longer"
    r"|Intruders\.(read|written)\[.+\] axis 1"
    r"|Forms\.notes"
    # Of first order by rank: a site may have fewer ranks than the axis, and all may.
    r"|ReadoutExplanation: Attribution\.values axis 2"
)


@pytest.mark.sample(2)
@pytest.mark.bad_input
@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_no_field_that_contradicts_another_is_read(result: Result, tmp_path: Path):
    """A row or label less or more, an axis more, another dtype, with a digest that fits."""
    labels, tensors = contents(result.save(tmp_path / "r"))
    path = tmp_path / "planted"
    missed = []
    for place, planted_labels, planted in contradictions(labels, tensors):
        written(planted_labels, planted, path)
        try:
            ll.load_result(path)
            missed.append(f"{type(result).__name__}: {place}")
        except ll.errors.LensLoraError as error:
            assert str(path) in str(error)
            assert "compute the result again" in str(error)
            assert isinstance(error.__cause__, ll.errors.LensLoraError), place
    assert not [place for place in missed if not ALONE.search(place)]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The labels and tensors of a file."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["labels"]), tensors


def contradictions(
    labels: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[str, dict[str, Any], dict[str, torch.Tensor]]]:
    """Each with its place: 'Attribution.base axis 0', 'Attribution.sites longer'."""
    places = dict(tensor_places(labels))
    for name, tensor in tensors.items():
        for how, planted in bad_tensors(tensor):
            yield f"{places[name]} {how}", labels, {**tensors, name: planted}
    for place, planted in bad_labels(labels):
        yield place, planted, tensors


def tensor_places(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """The class and field of every tensor of a file."""
    if isinstance(value, list):
        for item in value:
            yield from tensor_places(item, place)
    elif isinstance(value, dict):
        if "tensor" in value:
            yield value["tensor"], place
        for name, item in value.get("map", {}).items():
            yield from tensor_places(item, f"{place}[{name}]")
        for name, item in value.get("fields", {}).items():
            yield from tensor_places(item, f"{value['of']}.{name}")


def bad_tensors(tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for axis, size in enumerate(tensor.shape):
        if size:
            yield f"axis {axis}", tensor.narrow(axis, 0, size - 1).contiguous()
            yield f"axis {axis}", torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    yield "one axis more", tensor[None].contiguous()
    yield "dtype", tensor.nan_to_num().long() if tensor.is_floating_point() else tensor.double()


def bad_labels(labels: Any) -> Iterator[tuple[str, Any]]:
    """Labels of an axis with one less, or one more."""
    if isinstance(labels, list):
        for i, item in enumerate(labels):
            for place, planted in bad_labels(item):
                yield place, [*labels[:i], planted, *labels[i + 1 :]]
    elif isinstance(labels, dict) and "map" in labels:
        for name, item in labels["map"].items():
            for place, planted in bad_labels(item):
                yield place, {"map": {**labels["map"], name: planted}}
    elif isinstance(labels, dict) and "fields" in labels:
        kind = labels["of"]
        fields = labels["fields"]
        hints = get_type_hints(storage._KINDS[kind], include_extras=True)  # pyright: ignore[reportPrivateUsage]
        for name, item in fields.items():
            planted = list(bad_labels(item))
            if get_origin(hints[name]) is Annotated:
                planted += [(f"{kind}.{name} {how}", other) for how, other in other_lengths(item)]
            for place, other in planted:
                yield place, {**labels, "fields": {**fields, name: other}}


def other_lengths(labels: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(labels, int):
        yield "longer", labels + 1
    elif isinstance(labels, list) and labels:
        yield "shorter", labels[:-1]
        yield "longer", [*labels, labels[-1]]
    elif isinstance(labels, dict) and labels["map"]:
        names = list(labels["map"])
        yield "shorter", {"map": {name: labels["map"][name] for name in names[:-1]}}
        yield "longer", {"map": {**labels["map"], "more": labels["map"][names[-1]]}}


def split(by: tuple[str, ...], values: torch.Tensor) -> ll.results.Attribution:
    """An attribution of two prompts of four tokens, split."""
    return dataclasses.replace(two_prompts(), values=values, by=by)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("by", "shape", "fact"),
    [
        (
            ("rank", "position"),
            (4, 2),
            r"by is .'rank', 'position'., expected .'position', 'rank'.",
        ),
        (
            ("position", "position"),
            (4, 4),
            "by is .'position', 'position'., expected .'position',.",
        ),
        (("rank",), (4,), "sites has 2 along 'rank', and values 4"),
        (("position",), (5,), "str_tokens has 4 along 'position', and values 5"),
        (
            ("position",),
            (4, 2),
            r"values is float32 \[2, 4, 4, 2\], expected \[batch, site, position",
        ),
        (("token",), (3,), "response has 0 along 'batch', and base 2"),
        (("layer",), (4,), r"by\[0\] is 'layer', expected Literal\['position', "),
    ],
)
def test_axes_are_those_that_are_named(by: tuple[str, ...], shape: tuple[int, ...], fact: str):
    """Also of a result that is made by hand."""
    whole = split(("position", "rank"), torch.zeros(2, 4, 4, 2))
    assert whole.by == ("position", "rank")
    with pytest.raises(ll.errors.LensLoraError, match=f"Attribution: {fact}"):
        split(by, torch.zeros(2, 4, *shape))


@pytest.mark.bad_input
def test_agreement_is_what_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Control: without it one row of `base` is broadcast, and shifts are silently others."""
    labels, tensors = contents(two_prompts().save(tmp_path / "r"))
    path = written(labels, {**tensors, "base": tensors["base"][:1]}, tmp_path / "short")
    with pytest.raises(ll.errors.LensLoraError) as caught:
        ll.load_result(path)
    assert f"{path}: " in str(caught.value)
    assert "(Attribution: adapted has 2 along 'batch', and base 1)" in str(caught.value)
    monkeypatch.setattr(axes.Axes, "_refuse", lambda *_: None)
    assert not torch.equal(ll.results.Attribution.load(path).shift, two_prompts().shift)


@pytest.mark.sample(8)
@pytest.mark.parametrize("result", RESULTS, ids=lambda r: type(r).__name__)
def test_no_damage_of_any_result_is_read(result: Result, tmp_path: Path):
    """A byte changed here and there, or the rest cut off."""
    whole = result.save(tmp_path / "r").read_bytes()
    path = tmp_path / "damaged"
    for at in range(0, len(whole), max(1, len(whole) // 15)):
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :]):
            path.write_bytes(content)
            try:
                loaded = type(result).load(path)
            except ll.errors.LensLoraError:
                continue
            same(result, loaded)


@pytest.mark.bad_input
@pytest.mark.parametrize("path", [3, None, b"a", ["a"]])
def test_what_is_no_path(path: Any):
    for act in (SMALL.save, ll.results.Attribution.load, ll.load_result):
        with pytest.raises(ll.errors.LensLoraError, match="is not a path"):
            act(path)


def test_where_nothing_can_be_written_or_read(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a", tmp_path / "no" / "folder"):
        with pytest.raises(ll.errors.LensLoraError, match=re.escape(str(path))):
            SMALL.save(path)
        for load in (ll.results.Attribution.load, ll.load_result):
            with pytest.raises(ll.errors.LensLoraError, match=re.escape(str(path))):
                load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@settings(max_examples=share(300), deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """A changed byte, or a lost end: an error of ours, or the very same numbers."""
    path = SMALL.save(tmp_path_factory.mktemp("damaged") / "a.safetensors")
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        whole[at] ^= data.draw(st.integers(1, 255))
    else:
        del whole[at:]
    path.write_bytes(whole)
    try:
        loaded = ll.results.Attribution.load(path)
    except ll.errors.LensLoraError:
        return
    same(SMALL, loaded)


@settings(max_examples=share(100), deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("bytes") / "a"
    path.write_bytes(content)
    for load in (ll.results.Attribution.load, ll.load_result):
        with pytest.raises(ll.errors.LensLoraError):
            load(path)


LABELS = [
    "{",
    "[]",
    "null",
    '{"of": "Nothing", "fields": {}}',
    '{"of": "Attribution", "fields": {}}',
    '{"tensor": "missing"}',
    '{"map": 3}',
]


@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_another_version_are_refused(labels: str, tmp_path: Path):
    """With a digest that is right: what cannot be understood is an error of ours."""
    metadata = {"format": storage.FORMAT, "labels": labels}
    metadata["sha256"] = storage._digest(labels, {})  # pyright: ignore[reportPrivateUsage]
    path = tmp_path / "a.safetensors"
    save_file({}, str(path), metadata=metadata)
    with pytest.raises(ll.errors.LensLoraError):
        ll.results.Attribution.load(path)


def test_the_digest_sees_a_changed_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Control: without the digest one changed bit of a value is read as another number."""
    path = two_prompts().save(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ll.errors.LensLoraError, match="damaged"):
        ll.results.Attribution.load(path)
    with safe_open(str(path), framework="pt") as file:
        digest = file.metadata()["sha256"]
    monkeypatch.setattr(storage, "_digest", lambda *args: digest)
    assert not torch.equal(ll.results.Attribution.load(path).values, two_prompts().values)


def test_names_that_look_like_tags_are_names(tmp_path: Path):
    """A group may be called 'tensor', 'map' or 'of'."""
    groups = {"tensor": (0,), "of": (1,), "map": (2, 3), "": ()}
    base = two_prompts()
    known = {f.name: getattr(base, f.name) for f in dataclasses.fields(Measured)}
    effects = ll.results.Effects(values=base.values, groups=groups, how="add_one", **known)
    loaded = ll.results.Effects.load(effects.save(tmp_path / "e"))
    assert loaded.groups == groups
    assert json.dumps(loaded.meta) == json.dumps(base.meta)
