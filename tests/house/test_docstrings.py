"""Every parameter of a public function or method stands under `Args:`, by docsig."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable

import pytest

import lens_lora as ll

PUBLIC = {name: getattr(module, name) for module in (ll, ll.results) for name in dir(module)}
DOCUMENTED = {
    name: public for name, public in PUBLIC.items() if callable(public) and name[0] != "_"
}
# Missing, misspelt, misplaced or repeated parameters; the prose of a description is read by people.
TARGETS = ["SIG201", "SIG202", "SIG203", "SIG302", "SIG401", "SIG403", "SIG404"]

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="docsig needs Python 3.11")


def is_documented(source: str) -> bool:
    """Whether docsig finds nothing; it prints what it finds."""
    docsig = pytest.importorskip("docsig")
    return docsig.docsig(string=textwrap.dedent(source), check_class=True, target=TARGETS) == 0


def source_of(public: Callable[..., object]) -> str:
    """Its source; of a class without the methods whose base class documents them."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(public))))
    for function in [node for node in tree.body if isinstance(node, ast.FunctionDef)]:
        for decorator in map(ast.unparse, function.decorator_list):
            if decorator.startswith("analysis"):
                _take_lens_prompts_and_readout(function.args)
            if "takes_max_memory=True" in decorator:
                _take(function.args, "max_memory")
    if isinstance(public, type):
        inherited = {name for base in public.__mro__[1:] for name in vars(base)}
        (body,) = tree.body
        body.body = [node for node in body.body if getattr(node, "name", None) not in inherited]
    return ast.unparse(tree)


def _take_lens_prompts_and_readout(arguments: ast.arguments) -> None:
    """The parameters of the call that `@analysis` makes of a function of g."""
    arguments.args[:1] = [ast.arg(name) for name in ("lens", "prompts", "readout")]
    _take(arguments, "progress")


def _take(arguments: ast.arguments, keyword: str) -> None:
    arguments.kwonlyargs.append(ast.arg(keyword))
    arguments.kw_defaults.append(ast.Constant(None))


@pytest.mark.slow
def test_every_parameter_is_documented():
    undocumented = [
        name for name, public in DOCUMENTED.items() if not is_documented(source_of(public))
    ]
    assert undocumented == []


DOCUMENTED_SUM = '''
def sum_of(a: int, b: int) -> int:
    """The sum.

    Args:
        a: the first number.
        b: the second number.
    """
    return a + b
'''


def test_a_missing_and_a_misspelt_parameter_are_seen():
    assert is_documented(DOCUMENTED_SUM)
    assert not is_documented(DOCUMENTED_SUM.replace("        b: the second number.\n", ""))
    assert not is_documented(DOCUMENTED_SUM.replace("b: the second", "c: the second"))
