"""`lens_lora/registered.py` names all that registers, and what it names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import lens_lora
from lens_lora import registered

PACKAGE = Path(lens_lora.__file__).parent
REGISTERS = re.compile(r"^@drawing\.\w+\.register\(", re.MULTILINE)


def test_all_that_draws_is_listed():
    """A module that registers a drawing, and is not listed, would be imported by chance only."""
    drawing = {
        ".".join(["lens_lora", *path.relative_to(PACKAGE).with_suffix("").parts])
        for path in PACKAGE.rglob("*.py")
        if REGISTERS.search(path.read_text(encoding="utf-8"))
    }
    listed = {module for modules in registered.DRAWERS.values() for module in modules}
    assert drawing
    assert drawing <= listed


def test_what_is_listed_is_there_and_in_its_folder():
    """The results of the core are drawn in views, those of a question in its own folder."""
    for folder, modules in registered.DRAWERS.items():
        assert (PACKAGE.parent / folder.replace(".", "/")).is_dir(), folder
        home = "lens_lora.views" if folder == "lens_lora.core" else folder
        for module in modules:
            importlib.import_module(module)
            assert module.startswith(f"{home}."), (folder, module)


def test_a_declared_function_says_where_it_is_provided():
    """The reader of a declaration, whose body raises, finds the file that has the body."""
    assert registered.PROVIDERS
    for name, provider in registered.PROVIDERS.items():
        folder, _, function = name.rpartition(".")
        declaration = getattr(importlib.import_module(folder), function)
        file = f"{provider.removeprefix('lens_lora.').replace('.', '/')}.py"
        assert f"Provided by `{file}`." in declaration.__doc__, name
