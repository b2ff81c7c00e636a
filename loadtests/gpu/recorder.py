"""What a check says while it runs: numbers, failures, or that it cannot be done here.

Every statement is one JSON line, written at once, so that a check that dies leaves what it had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn


class CannotError(Exception):
    """The check cannot be done here; the message says why."""


class Recorder:
    """A check's own record, and what it may use.

    ``device`` is ``cuda`` or ``cpu``; ``folder`` is shared by all checks of a run, for models and bundles.
    """

    def __init__(self, path: Path, *, device: str, folder: Path) -> None:
        self._path = path
        self.device = device
        self.folder = folder

    @property
    def on_cuda(self) -> bool:
        """Whether the check runs on the GPU."""
        return self.device == "cuda"

    def number(self, name: str, value: Any) -> None:
        """Keep a number, a sentence, or a table (a list of rows, each a dict with the same keys)."""
        self._write({"number": name, "value": value})

    def expect(self, true: bool, sentence: str) -> None:
        """Fail the check with ``sentence`` unless ``true``; the check goes on."""
        if not true:
            self._write({"failure": sentence})

    def cannot(self, sentence: str) -> NoReturn:
        """End the check: it cannot be done here."""
        raise CannotError(sentence)

    def end(self) -> None:
        """The last line: without it, the check died."""
        self._write({"end": True})

    def give_up(self, sentence: str) -> None:
        """Say that the check could not be done."""
        self._write({"cannot": sentence})

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The statements of a record; a line that was cut off is left out."""
    entries = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries
