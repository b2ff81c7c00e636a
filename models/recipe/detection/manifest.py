"""The data that the detection study is made from: name, origin, licence and digest of every file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from guard.digest import file_digest

FILE = Path(__file__).parent / "sources.json"


class ManifestError(ValueError):
    """The data folder is not what the manifest lists."""


class Listed(NamedTuple):
    """One file: gzipped JSON lines with ``prompt`` (or ``messages``), ``label`` and ``source``."""

    file: str
    origin: str
    """Where the text is from, with the commit of the repository that it was taken from."""
    licence: str
    sha256: str


def read(path: Path = FILE) -> list[Listed]:
    """The files of a manifest, by name."""
    return [Listed(**entry) for entry in json.loads(path.read_text("utf-8"))]


def check(listed: Sequence[Listed], folder: Path) -> None:
    """Raises ManifestError that names every file that is missing from ``folder`` or has other content."""
    if not folder.is_dir():
        raise ManifestError(f"there is no data folder {folder}; name the folder of the files in {FILE.name}")
    missing = [each.file for each in listed if not (folder / each.file).is_file()]
    changed = [
        each.file
        for each in listed
        if each.file not in missing and file_digest(folder / each.file) != each.sha256
    ]
    problems = [
        f"{what}: {', '.join(files)}"
        for what, files in (("missing", missing), ("with another SHA-256", changed))
        if files
    ]
    if problems:
        raise ManifestError(
            f"the data folder differs from {FILE.name}; {'; '.join(problems)}. Figures of other data are "
            "another study: write a manifest of your own (--manifest)"
        )
