"""What each folder of tests declares for the tests that are of every result or every call.

A folder's `made_public.py` holds, of what its question makes public:

    RESULTS      functions, each of which makes one result by hand: of four sites and two prompts
    CALLS        calls by name, of a lens and tokens: see `every_call.py`
    WITH_BAR     calls by public name, if they take `progress`: see `house/test_progress.py`
    WITHOUT_BAR  calls by public name, if they do not
    READOUTS     functions by name, each of which makes a readout: see `runs/test_fingerprint.py`

Whatever it has no use for is left out. `tests/interaction/made_public.py` is an example, and
`shared_questions.py` has what the calls of all folders ask. Such a file imports neither
`every_call` nor `every_result`, which import it. Its other functions, such as variants of a result,
are for whoever asks `made_public` for the folder.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]
FILE = "made_public.py"


def made_public(folder: str) -> ModuleType:
    """What a folder of tests makes public, as a module: `made_public("audit").what_changed()`."""
    (module,) = [m for m in _modules() if m.__name__ == f"made_public_{folder}"]
    return module


def results() -> list[Any]:
    """The results by hand of all folders."""
    made: list[Any] = []
    for module in _modules():
        made += [make() for make in getattr(module, "RESULTS", ())]
    return made


def result_of(kind: type[Any]) -> Any:
    """The first result by hand that is of this class."""
    return next(result for result in results() if type(result) is kind)


def named(what: str) -> dict[str, Callable[..., Any]]:
    """The calls or readouts of all folders, by name.

    Args:
        what: 'CALLS', 'WITH_BAR', 'WITHOUT_BAR' or 'READOUTS'.
    """
    found: dict[str, Callable[..., Any]] = {}
    for module in _modules():
        of_folder: dict[str, Callable[..., Any]] = getattr(module, what, {})
        twice = found.keys() & of_folder.keys()
        assert not twice, f"{module.__file__}: {what} has {sorted(twice)} of another folder"
        found |= of_folder
    return found


def require_in_list(what: str, public: Iterable[str], listed: Iterable[str]) -> None:
    """Fail if something public is in none of the files' lists, and say where its line belongs.

    Args:
        what: the name of the list, such as 'CALLS'.
        public: the names that have to be in it.
        listed: the names that are in it, in any folder.
    """
    missing = sorted(set(public) - set(listed))
    assert not missing, (
        f"{', '.join(missing)}: needs a line in {what} of tests/FOLDER/{FILE}, in the folder of "
        "its question; CONTRIBUTING.md lists what else is written for something new"
    )


@functools.cache
def _modules() -> list[ModuleType]:
    """The files of all folders, each as a module of a name of its own."""
    modules: list[ModuleType] = []
    for path in sorted(TESTS.glob(f"*/{FILE}")):
        spec = importlib.util.spec_from_file_location(f"made_public_{path.parent.name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        modules.append(module)
    return modules
