"""Writes the badges of README and the gallery's notebooks, once the repository is public.

    python docs/make_badge.py https://github.com/ORGANISATION/REPOSITORY

They stand below a mark (`MARK`). Binder's opens that notebook, README's the first, in a server of
its own, which .binder/ describes. README also has the outcome of the tests, where the repository is
on GitHub, the licence, and the versions of Python. Until then there is no badge, and no link that
leads nowhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import quote, urlparse

import nbformat
from site_notebooks import DEMOS, GALLERY

README = Path(__file__).parents[1] / "README.md"
MARK = "<!-- Binder badge: works once the repository is public (docs/make_badge.py) -->"
BINDER = "https://mybinder.org"
SHIELDS = "https://img.shields.io/badge"
PROVIDERS = {"github.com": "gh", "gitlab.com": "gl"}


def badge(address: str, notebook: str) -> str:
    """The badge as Markdown, for a repository at GitHub, GitLab or any other host."""
    url = urlparse(address.removesuffix("/").removesuffix(".git"))
    if url.scheme != "https" or url.path.count("/") < 2:
        raise SystemExit(f"{address!r}: expected https://HOST/ORGANISATION/REPOSITORY.")
    path = url.path.strip("/")
    provider = PROVIDERS.get(url.netloc, "git")
    where = {"gh": path, "gl": quote(path, safe="")}.get(provider, quote(address, safe=""))
    target = f"{BINDER}/v2/{provider}/{where}/HEAD?labpath={quote(f'demos/{notebook}', safe='')}"
    return f"[![Open this in a browser, on Binder]({BINDER}/badge_logo.svg)]({target})"


def with_badge(text: str, address: str, notebook: str = f"{GALLERY[0]}.ipynb") -> str:
    """The text with the badge below its mark, in place of an older one."""
    return _below_mark(text, badge(address, notebook))


def of_readme(text: str, address: str) -> str:
    """README with all of its badges below the mark, in place of older ones."""
    address = address.removesuffix("/").removesuffix(".git")
    workflow = f"{address}/actions/workflows/ci.yml"
    tests = f"[![Tests]({workflow}/badge.svg)]({workflow})"
    badges = [
        *([tests] if urlparse(address).netloc == "github.com" else []),
        f"[![MIT licence]({SHIELDS}/licence-MIT-blue)](LICENSE)",
        f"[![Python 3.10 or later]({SHIELDS}/python-3.10%2B-blue)](pyproject.toml)",
        badge(address, f"{GALLERY[0]}.ipynb"),
    ]
    return _below_mark(text, " ".join(badges))


def _below_mark(text: str, badges: str) -> str:
    pattern = rf"{re.escape(MARK)}(\n\[!\[.*)?"
    return re.sub(pattern, lambda _: f"{MARK}\n{badges}", text)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    address = sys.argv[1]
    README.write_text(of_readme(README.read_text(encoding="utf-8"), address), encoding="utf-8")
    for stem in GALLERY:
        path = DEMOS / f"{stem}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        first = notebook.cells[0]
        first.source = with_badge(first.source, address, path.name)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
