"""The docstring of `lens_lora.core` says in which order the core is read, and names its files."""

from __future__ import annotations

import ast
import re

from own_package import LENS_LORA

# A file by which its folder registers, or is given, something: the page's last sentence says how.
_REGISTERING = {"__init__.py", "extensions.py", "provided.py", "registry.py"}


def on_the_page(page: str) -> list[str]:
    """The files that the core's page names in its indented lines, as `folder/file.py`.

    A name without a folder belongs to the folder that was named last.
    """
    names: list[str] = []
    folder = ""
    for line in page.splitlines():
        if not line.startswith("    "):
            continue
        for own_folder, name in re.findall(r"(?:(\w+)/)?(\w+\.py)\b", line):
            folder = own_folder or folder
            names.append(f"{folder}/{name}")
    return names


def test_the_cores_page_names_each_file_of_the_core_once():
    """It says in which order the core is read, so it leaves out no file and invents none."""
    core = LENS_LORA.folder / "core"
    page = ast.get_docstring(ast.parse((core / "__init__.py").read_text(encoding="utf-8")))
    assert page is not None
    files = [path for path in core.rglob("*.py") if path.name not in _REGISTERING]
    there = sorted(path.relative_to(core).as_posix() for path in files)
    assert sorted(on_the_page(page)) == there


def test_a_planted_file_of_the_page_is_seen():
    """Negative control: a file in its own folder, one in the folder before it, and prose."""
    page = "See a/x.py.\n\n    b/one.py, two.py\n    c/three.py  which may wait"
    assert on_the_page(page) == ["b/one.py", "b/two.py", "c/three.py"]
