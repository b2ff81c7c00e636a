"""A folder of reports that appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from guard.replace import replace_directory


class ReportError(ValueError):
    """A report cannot be written where it was to be."""


def refuse_folder(target: Path, names: Collection[str]) -> None:
    """Raises ReportError when ``target`` holds anything but the files ``names`` of an earlier report."""
    if not target.exists():
        return
    inside = {path.name for path in target.iterdir()} if target.is_dir() else {"no directory"}
    if not inside <= set(names):
        others = ", ".join(sorted(inside - set(names))[:5])
        raise ReportError(f"{target} exists and is not a report (found: {others}); choose another directory")


def write_folder(target: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` by name, in place of the report of the same kind that was there. Raises ReportError."""
    refuse_folder(target, files)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        # mkdtemp is private to its owner; results are as readable as any other file.
        staging.chmod(0o755)
        replace_directory(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
