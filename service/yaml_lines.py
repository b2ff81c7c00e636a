"""YAML with the lines that things stand on, and without keys that are given twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class FileError(ValueError):
    """A file that cannot be read as YAML; the message is one sentence that names it."""


class Lines:
    """Where the values of one YAML document stand."""

    def __init__(self, root: yaml.Node | None) -> None:
        self._root = root

    def of(self, path: Sequence[int | str]) -> int:
        """The line of the value at ``path``, counted from 1; of its nearest parent when it is not there."""
        node, line = self._root, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
                if found is None:
                    continue
                line, node = found[0].start_mark.line + 1, found[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
        return line


def read_file(path: Path, kind: str) -> tuple[Any, Lines]:
    """Parse a file, called a ``kind`` when something is wrong with it. Raises FileError."""
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"The {kind} {path} is not a regular file.")  # reading a pipe may never end
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the {kind} {path}: {error}.") from error
    try:
        return read(text)
    except RecursionError:
        raise FileError(f"The {kind} {path} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none
        raise FileError(f"The {kind} {path} is not valid YAML: {' '.join(str(error).split())}.") from error


def read(text: str) -> tuple[Any, Lines]:
    """Parse one document. Raises yaml.YAMLError, also for a key given twice, ValueError, RecursionError."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), Lines(node)
    finally:
        loader.dispose()


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML itself would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)
