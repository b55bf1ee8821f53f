"""Writes the README's Binder badge, once it is known where the repository is public.

    python docs/make_badge.py https://github.com/ORGANISATION/REPOSITORY

The badge stands below `<!-- badge -->` and opens the first notebook in a server of its own, which
.binder/ describes. Without an address there is no badge, and no link that leads nowhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import quote, urlparse

README = Path(__file__).parents[1] / "README.md"
MARK = "<!-- badge -->"
BINDER, NOTEBOOK = "https://mybinder.org", "demos/first_look.ipynb"
PROVIDERS = {"github.com": "gh", "gitlab.com": "gl"}


def badge(address: str) -> str:
    """The badge as Markdown, for a repository at GitHub, GitLab or any other host."""
    url = urlparse(address.removesuffix("/").removesuffix(".git"))
    if url.scheme != "https" or url.path.count("/") < 2:
        raise SystemExit(f"{address!r}: expected https://HOST/ORGANISATION/REPOSITORY.")
    path = url.path.strip("/")
    provider = PROVIDERS.get(url.netloc, "git")
    where = {"gh": path, "gl": quote(path, safe="")}.get(provider, quote(address, safe=""))
    target = f"{BINDER}/v2/{provider}/{where}/HEAD?labpath={quote(NOTEBOOK, safe='')}"
    return f"[![Open the notebooks in a browser]({BINDER}/badge_logo.svg)]({target})"


def with_badge(readme: str, address: str) -> str:
    """The README with the badge, in place of an older one."""
    return re.sub(rf"{MARK}\n(\[!\[.*\n)?", f"{MARK}\n{badge(address)}\n", readme)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    text = README.read_text(encoding="utf-8")
    README.write_text(with_badge(text, sys.argv[1]), encoding="utf-8")


if __name__ == "__main__":
    main()
