"""What the threat model and the page on faults claim is shown by tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
FAULTS = (ROOT / "docs" / "faults.md").read_text("utf-8")
NAMED = sorted(
    {
        *re.findall(r"`(tests/[\w/]+\.py(?:::\w+)+)`", TEXT),
        *(
            f"tests/{name.removeprefix('tests/')}"
            for name in re.findall(r"`(\w+/[\w/]+\.py(?:::\w+)*)`", FAULTS)
        ),
    }
)


@pytest.mark.parametrize("name", NAMED)
def test_every_test_that_is_named_is_there(name: str) -> None:
    file, *path = name.split("::")
    body = ast.parse((ROOT / file).read_text("utf-8")).body
    for part in path:
        found = [
            node
            for node in body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == part
        ]
        assert found, f"{file} has no {part}"
        body = found[0].body


def test_every_way_around_has_a_behaviour_and_a_test() -> None:
    table = TEXT[TEXT.index("\n## Ways around") : TEXT.index("### The shape")]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) > 35
    for row in rows:
        _, path, behaviour, test, _ = re.split(r"(?<!\\)\|", row)
        assert path.strip()
        assert behaviour.strip()
        assert "`tests/" in test or "the same" in test, row
