"""Prompts from JSON lines: reading, checking, removing duplicates, keeping the roles apart.

One object a line, optionally gzipped: ``prompt`` (text) or ``messages`` (a conversation that ends with a user
turn; it is what the model sees), ``label`` (``harmful`` or ``benign``, about the prompt), ``source`` (else
the file's name), and optionally ``attack``, ``pair``, ``language`` and ``split``. Rows whose label is null
are left out and counted. What cannot be used is left out too, counted, and named by file and line; strict
reading makes any of it an error.
"""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from guard.bundle import DataFile
from guard.data_rows import DataError, Label, Problem, Prompt, RowError, parse, place, prompt_of
from guard.digest import file_digest

__all__ = ["DataError", "Dataset", "Label", "Problem", "Prompt", "Role", "expand", "listed", "load", "rows"]

Role = Literal["fit", "threshold", "evaluate"]
SUFFIXES = (".jsonl", ".jsonl.gz")
_GZIP = b"\x1f\x8b"
_LISTED = 20
"""Most problems that a message lists; the others are counted."""
_BROKEN = (OSError, EOFError, zlib.error)


@dataclass(frozen=True)
class Dataset:
    """The prompts of one role and the files they came from."""

    role: Role
    prompts: tuple[Prompt, ...]
    files: tuple[DataFile, ...]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    problems: tuple[Problem, ...] = ()
    """What was wrong, by file and line, in the order it was met."""

    def count(self, label: Label) -> int:
        """Number of prompts with a label."""
        return sum(prompt.label == label for prompt in self.prompts)

    def sources(self, label: Label | None = None) -> list[str]:
        """Names of the sources, sorted; those with a label only, if one is given."""
        return sorted({p.source for p in self.prompts if label is None or p.label == label})


def listed(problems: Sequence[Problem], role: str) -> str:
    """All problems as one message: how many of each kind, then file and line of the first ones."""
    kinds = ", ".join(f"{n} × {kind}" for kind, n in Counter(p.kind for p in problems).items())
    lines = [f"the {role} data have {len(problems)} problem{'s'[: len(problems) > 1]} ({kinds})"]
    lines += [f"  {problem}" for problem in problems[:_LISTED]]
    if len(problems) > _LISTED:
        lines.append(f"  and {len(problems) - _LISTED} more")
    return "\n".join(lines)


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


def rows(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of one file; what cannot be read is added to ``problems``.

    A file that breaks off, as a damaged gzip file does, raises DataError at the line where it broke.
    """
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not text.strip():
                    continue
                try:
                    row = parse(text)
                except RowError as error:
                    problems.append(Problem(error.kind, path, number, str(error)))
                    continue
                yield number, row
    except _BROKEN as error:
        # Whole lines before it may be damaged as well: the checksum comes last.
        raise DataError(f"cannot be read beyond line {number} ({error or type(error).__name__})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Iterable[bytes]]:
    with path.open("rb") as file:
        packed = file.read(len(_GZIP)) == _GZIP
        file.seek(0)
        if packed or path.suffix == ".gz":
            with gzip.open(file, "rb") as unpacked:
                yield unpacked
        else:
            yield file


def _read(path: Path, problems: list[Problem], dropped: Counter[str]) -> list[Prompt]:
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    found: list[Prompt] = []
    here: list[Problem] = []
    unlabelled = 0
    try:
        for number, row in rows(path, here):
            try:
                prompt = prompt_of(row, stem, path, number)
            except RowError as error:
                here.append(Problem(error.kind, path, number, str(error)))
                continue
            if prompt is None:
                unlabelled += 1
            else:
                found.append(prompt)
    except DataError as error:
        problems.append(Problem("unreadable file", path, None, f"{error}; the whole file is left out"))
        dropped["in an unreadable file"] += len(found)
        return []
    if not found and not here and not unlabelled:
        here.append(Problem("empty file", path, None, "holds no row"))
    problems += here
    dropped["no label"] += unlabelled
    dropped.update(problem.kind for problem in here if problem.line is not None)
    return found


def load(
    role: Role, paths: Sequence[str | Path], *, barred: Iterable[Dataset] = (), strict: bool = False
) -> Dataset:
    """Read all files of a role, without duplicates and without any prompt of the ``barred`` sets.

    The first of two equal prompts stays; if they disagree on the label, neither does. Raises DataError when
    a file is missing or no row can be used, and with ``strict`` at any problem, listing all of them.
    """
    reserved = {prompt.key: prompt for dataset in barred for prompt in dataset.prompts}
    kept: dict[str, Prompt] = {}
    conflicting: set[str] = set()
    dropped: Counter[str] = Counter()
    problems: list[Problem] = []
    files: list[tuple[Path, list[Prompt]]] = []
    for path in expand(paths):
        prompts = _read(path, problems, dropped)
        files.append((path, prompts))
        for prompt in prompts:
            key = prompt.key
            if key in reserved:
                dropped["used in another role"] += 1
                where = _place(reserved[key])
                problems.append(prompt.problem("used in another role", f"the same prompt is in {where}"))
            elif key in kept:
                dropped["duplicate"] += 1
                first = kept[key]
                if first.label != prompt.label:
                    conflicting.add(key)
                    problems.append(
                        prompt.problem(
                            "labels disagree", f"the same prompt is {first.label} in {_place(first)}"
                        )
                    )
                elif first.split != prompt.split:
                    problems.append(
                        prompt.problem(
                            "duplicate across splits",
                            f"in split {prompt.split!r}, the same prompt in {first.split!r}: {_place(first)}",
                        )
                    )
            else:
                kept[key] = prompt
    for key in conflicting:
        del kept[key]
    dropped["labels disagree"] = len(conflicting)
    problems += _one_class(role, kept.values(), files)
    if problems and (strict or not any(prompts for _, prompts in files)):
        raise DataError(listed(problems, role))
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
    left_out = {reason: n for reason, n in dropped.items() if n}
    return Dataset(role, tuple(kept.values()), cards, left_out, tuple(problems))


def _place(prompt: Prompt) -> str:
    return place(prompt.path, prompt.line) if prompt.path else f"source {prompt.source}"


def _one_class(role: Role, kept: Iterable[Prompt], files: Sequence[tuple[Path, object]]) -> list[Problem]:
    labels = {prompt.label for prompt in kept}
    # Thresholds are set on benign prompts alone.
    if role == "threshold" or len(labels) != 1:
        return []
    (only,) = labels
    return [Problem("one class", files[0][0], None, f"all prompts of the {role} data are {only}")]
