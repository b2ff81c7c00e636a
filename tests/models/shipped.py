"""What holds for every study whose results are shipped: figures, the report of them, pictures; no prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def document(name: str) -> Any:
    """The figures of a study."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def report(name: str) -> str:
    """The report of a study."""
    return (RESULTS / f"{name}.md").read_text("utf-8")


def assert_pictures_are_shown(
    name: str, draw: Callable[[Any, Path], object], folder: Path, expected: set[str]
) -> None:
    """The study draws the ``expected`` pictures; its report shows them, and they are shipped."""
    draw(document(name), folder)
    assert {path.name for path in folder.iterdir()} == expected
    assert all(f"(../images/{picture})" in report(name) for picture in expected)
    assert all((RESULTS.parent / "images" / picture).is_file() for picture in expected)


def longest_text(value: Any) -> int:
    """Characters of the longest text in the values of a JSON document: a prompt would show."""
    return max(map(len, _texts(value)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
