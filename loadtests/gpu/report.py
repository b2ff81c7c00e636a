"""The report: Markdown for people, JSON for programs, both written anew after every check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtests.gpu.isolate import Outcome


class Report:
    """All outcomes of a run so far. ``facts`` are the machine's versions."""

    def __init__(self, out: Path, facts: dict[str, Any], device: str, planned: int) -> None:
        self._out = out
        self._facts = facts
        self._device = device
        self._planned = planned
        self._results: list[dict[str, Any]] = []
        self._write()

    @property
    def failed(self) -> int:
        """Number of failed checks."""
        return sum(result["state"] == "failed" for result in self._results)

    def add(self, name: str, title: str, outcome: Outcome) -> None:
        """Enter a check and write both files."""
        self._results.append({"name": name, "title": title, **outcome._asdict()})
        self._write()

    def _write(self) -> None:
        whole = {
            "device": self._device,
            "machine": self._facts,
            "planned": self._planned,
            "checks": self._results,
        }
        _replace(self._out / "report.json", json.dumps(whole, indent=1) + "\n")
        _replace(self._out / "report.md", self._markdown())

    def _markdown(self) -> str:
        states = [result["state"] for result in self._results]
        lines = [
            f"# The guard on {self._device}",
            "",
            f"{states.count('passed')} passed, {states.count('failed')} failed, "
            f"{states.count('could not be done')} could not be done; "
            f"{len(states)} of {self._planned} checks have ended.",
            "",
            *(f"- {name}: {value}" for name, value in self._facts.items()),
            "",
            "| check | outcome | seconds |",
            "|---|---|--:|",
        ]
        for result in self._results:
            why = f": {_cell('; '.join(result['why']))}" if result["why"] else ""
            lines.append(f"| `{result['name']}` | {result['state']}{why} | {result['seconds']:.0f} |")
        for result in self._results:
            lines += ["", f"## `{result['name']}`", "", f"{result['title']}: {result['state']}.", ""]
            lines += [f"- {_cell(sentence)}" for sentence in result["why"]]
            for name, value in result["numbers"].items():
                lines += _number(name, value)
        return "\n".join(lines) + "\n"


def _number(name: str, value: Any) -> list[str]:
    if not (isinstance(value, list) and value and all(isinstance(row, dict) for row in value)):
        return [f"- {name}: {_cell(value)}"]
    columns = list(value[0])
    rows = [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in value]
    return ["", f"{name}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows, ""]


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _replace(path: Path, text: str) -> None:
    """Write a file so that nobody ever finds half of it."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, "utf-8")
    part.replace(path)
