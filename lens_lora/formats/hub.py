"""Adapters on the Hugging Face hub: only an adapter's own files are fetched from a repository."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lens_lora.core.adapter import CONFIG
from lens_lora.errors import AdapterError, is_of_the_system

CHECKPOINT = re.compile(r"checkpoint-(?P<step>\d+)")
# 'owner/name' as the hub has it, and perhaps a folder within the repository.
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<inside>.+))?")
# The beginnings of a path that cannot be a hub id.
_PATH_BEGINS = (".", "~", "/")


class Place(NamedTuple):
    """Where an adapter, or a folder of several, is on disk or on the hub.

    Attributes:
        path: a folder, 'owner/repo', or 'owner/repo/sub/folder'.
        revision: branch, tag or commit of the hub repository.
        subfolder: the adapter's folder within the folder or the repository.
    """

    path: str | Path
    revision: str | None = None
    subfolder: str | None = None


def fetched(place: Place, files: Iterable[str]) -> Path:
    """The folder of a place on the hub, with those of its files that match these globs.

    Args:
        place: a place that is not on disk.
        files: globs within the folder.

    Raises:
        AdapterError: the place is no hub id, its repository cannot be reached, or it lacks the
            revision.
    """
    repository, inside = _repository_and_folder(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    before = f"{glob.escape(inside)}/" if inside else ""
    wanted = [before + name for name in files]
    try:
        root = snapshot_download(repository, revision=place.revision, allow_patterns=wanted)
    except RevisionNotFoundError as error:
        fact = f"the hub repository has no revision {place.revision!r}"
        raise AdapterError(f"{repository}: {fact}.") from error
    except Exception as error:
        if is_of_the_system(error):
            raise
        named = f" {repository}" if inside else ""
        fact = f"neither a local folder nor a hub repository{named} that can be reached ({error})"
        raise AdapterError(f"{place.path}: {fact}.") from error
    return Path(root) / inside


def refuse_other_folder(place: Place) -> None:
    """Refuse a hub repository whose adapters are in other folders than this one, naming those.

    If the hub does not list the repository's files, nothing is refused here: the missing config is
    then all that can be reported.

    Args:
        place: a hub repository that has no adapter's config in this folder.

    Raises:
        AdapterError: the repository has an adapter elsewhere.
    """
    import huggingface_hub

    repository, inside = _repository_and_folder(place)
    try:
        files = huggingface_hub.list_repo_files(repository, revision=place.revision)
    except Exception:
        return
    paths = [PurePosixPath(file) for file in files]
    folders = [str(path.parent) for path in paths if path.name == CONFIG]
    if not folders:
        return
    lacks = f"no {CONFIG} in {inside}" if inside else f"no {CONFIG}"
    nearest, others = likeliest(folders)
    other = repository if nearest == "." else f"{repository}/{nearest}"
    raise AdapterError(f"{repository}: {lacks}; give the folder of one: {other}{others}.")


def likeliest(folders: Iterable[str]) -> tuple[str, str]:
    """Choose the folder that is probably meant among adapters' folders, and list the others.

    Args:
        folders: at least one.

    Returns:
        A run's last checkpoint, or else the first by name; and ' (also a, b, c)', or nothing.
    """

    def last_step_first(folder: str) -> tuple[int, str]:
        name = PurePosixPath(folder).name
        match = CHECKPOINT.fullmatch(name)
        step = -1 if match is None else int(match["step"])
        return -step, folder

    first, *others = sorted(folders, key=last_step_first)
    if not others:
        return first, ""
    return first, f" (also {', '.join(others[:3])})"


def is_on_hub(path: str) -> bool:
    """Whether a path that is not on disk is the id of a hub repository, or a folder in one."""
    if Path(path).exists():
        return False
    hub_id = _hub_id(path)
    return hub_id is not None and not Path(hub_id["repository"]).exists()


def _hub_id(text: str) -> re.Match[str] | None:
    """Read a text as a hub id; None if it cannot be one."""
    if text.startswith(_PATH_BEGINS):
        return None
    return _HUB_ID.fullmatch(text.rstrip("/"))


def _repository_and_folder(place: Place) -> tuple[str, str]:
    """The hub repository of a place that is not on disk, and the folder within it."""
    text = str(place.path)
    hub_id = _hub_id(text)
    if hub_id is None:
        is_one_word = not text.startswith(_PATH_BEGINS) and "/" not in text
        nor_hub_id = ", nor a hub id ('owner/name')" if is_one_word else ""
        raise AdapterError(f"{text}: no such folder{nor_hub_id}.")
    if Path(hub_id["repository"]).exists():
        raise AdapterError(f"{text}: no such folder.")
    parts = [hub_id["inside"], place.subfolder]
    return hub_id["repository"], "/".join(part.strip("/") for part in parts if part)
