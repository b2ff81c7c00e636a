"""Prompts from JSON lines: reading, checking, removing duplicates, keeping the roles apart.

One object a line, optionally gzipped: ``prompt`` (text), ``label`` (``harmful`` or ``benign``, about the
prompt), optionally ``source`` (else the file's name) and ``messages`` (a conversation that ends with a user
turn; it is what the model sees). Rows whose label is null are left out and counted.
"""

from __future__ import annotations

import gzip
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from guard.bundle import DataFile
from guard.digest import file_digest

Label = Literal["harmful", "benign"]
Role = Literal["fit", "threshold", "evaluate"]
SUFFIXES = (".jsonl", ".jsonl.gz")
_TURNS = ("system", "user", "assistant")


class DataError(ValueError):
    """A data file is missing, malformed, or does not hold what its role needs."""


@dataclass(frozen=True)
class Prompt:
    """One labelled request."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs; the last one is the user's."""
    label: Label
    source: str

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1][1]

    @property
    def key(self) -> str:
        """What makes two prompts the same: letters and digits of all turns, without case and accents."""
        return "\n".join(f"{role}:{_normal(content) or content}" for role, content in self.messages)

    def chat(self) -> list[dict[str, str]]:
        """The conversation in the form chat templates take."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Dataset:
    """The prompts of one role and the files they came from."""

    role: Role
    prompts: tuple[Prompt, ...]
    files: tuple[DataFile, ...]
    dropped: dict[str, int]
    """Rows left out, by reason."""

    def count(self, label: Label) -> int:
        """Number of prompts with a label."""
        return sum(prompt.label == label for prompt in self.prompts)

    def sources(self, label: Label | None = None) -> list[str]:
        """Names of the sources, sorted; those with a label only, if one is given."""
        return sorted({p.source for p in self.prompts if label is None or p.label == label})


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Files named, and the data files of directories named, each once. Raises DataError."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
            if not inside:
                raise DataError(f"{path} holds no {' or '.join(SUFFIXES)} file")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"there is no data file {path}")
    return list(dict.fromkeys(found))


def read_file(path: Path) -> tuple[list[Prompt], int]:
    """Prompts of one file and the number of rows without a label. Raises DataError with file and line."""
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    prompts: list[Prompt] = []
    unlabelled = 0
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                prompt = _parse(line, stem, f"{path}, line {number}")
                if prompt is None:
                    unlabelled += 1
                else:
                    prompts.append(prompt)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return prompts, unlabelled


def _parse(line: str, stem: str, where: str) -> Prompt | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg}); expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}")
    if "label" not in row:
        raise DataError(f"{where}: no 'label'; expected harmful, benign or null")
    label = row["label"]
    if label is None:
        return None
    if label not in ("harmful", "benign"):
        raise DataError(f"{where}: 'label' is {label!r}; expected harmful, benign or null")
    source = row.get("source") or stem
    if not isinstance(source, str):
        raise DataError(f"{where}: 'source' must be text")
    return Prompt(_turns(row, where), label, source)


def _turns(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = row.get("messages")
    if messages is None:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: no 'prompt'; expected a text that is not empty")
        return (("user", prompt),)
    try:
        turns = tuple((message["role"], message["content"]) for message in messages)
    except (TypeError, KeyError) as error:
        raise DataError(f"{where}: 'messages' must be a list of objects with role and content") from error
    if any(role not in _TURNS or not isinstance(content, str) for role, content in turns):
        raise DataError(f"{where}: each of 'messages' needs a role out of {', '.join(_TURNS)} and a text")
    if not turns or turns[-1][0] != "user":
        raise DataError(f"{where}: 'messages' must end with a user turn")
    return turns


def load(role: Role, paths: Sequence[str | Path], *, barred: Iterable[Dataset] = ()) -> Dataset:
    """Read all files of a role, without duplicates and without any prompt of the ``barred`` sets.

    The first of two equal prompts stays; if they disagree on the label, neither does. Raises DataError.
    """
    reserved = {prompt.key for dataset in barred for prompt in dataset.prompts}
    kept: dict[str, Prompt] = {}
    conflicting: set[str] = set()
    dropped: Counter[str] = Counter()
    files: list[tuple[Path, list[Prompt]]] = []
    for path in expand(paths):
        prompts, unlabelled = read_file(path)
        dropped["no label"] += unlabelled
        files.append((path, prompts))
        for prompt in prompts:
            key = prompt.key
            if key in reserved:
                dropped["used in another role"] += 1
            elif key in kept:
                dropped["duplicate"] += 1
                if kept[key].label != prompt.label:
                    conflicting.add(key)
            else:
                kept[key] = prompt
    for key in conflicting:
        del kept[key]
    dropped["labels disagree"] = len(conflicting)
    cards = tuple(
        DataFile(
            name=path.name,
            sha256=file_digest(path),
            role=role,
            harmful=sum(p.label == "harmful" for p in prompts),
            benign=sum(p.label == "benign" for p in prompts),
        )
        for path, prompts in files
    )
    return Dataset(role, tuple(kept.values()), cards, {k: n for k, n in dropped.items() if n})
