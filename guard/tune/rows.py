"""What a model is tuned on: requests with answers, read from JSON lines.

The rows are those of every data file of the project (``guard.data``), with the answer as ``response``, as
``neuronguard answer`` writes it, and for DPO ``rejected``. A row that cannot be used is an error; rows whose
label is null are left out and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.bundle import DataFile
from guard.data import DataError, Label, Problem, Prompt, expand, listed, rows
from guard.data_rows import RowError, prompt_of, whole
from guard.digest import file_digest
from guard.tune.errors import TuneError
from guard.tune.options import TuneOptions


@dataclass(frozen=True)
class Row:
    """One request, and what is to be said to it as far as that is known."""

    prompt: Prompt
    answer: str | None
    """None: the model's own answer is taken."""
    rejected: str | None
    """DPO's other answer. None: the model's own answer is taken."""


@dataclass(frozen=True)
class Rows:
    """All rows, and the files they came from."""

    rows: tuple[Row, ...]
    files: tuple[DataFile, ...]
    unlabelled: int = 0
    """Rows that were left out because their label is null."""

    def count(self, label: Label) -> int:
        """Number of rows whose request has this label."""
        return sum(row.prompt.label == label for row in self.rows)


def read(paths: Sequence[Path], options: TuneOptions, *, needs: Sequence[Label] = ()) -> Rows:
    """Read all files; every label of ``needs`` must occur. Raises TuneError, listing what is wrong."""
    problems: list[Problem] = []
    found: list[Row] = []
    files = []
    unlabelled = 0
    try:
        for path in expand(paths):
            every = _file(path, problems, options)
            here = [row for row in every if row is not None]
            unlabelled += len(every) - len(here)
            found += here
            count = {label: sum(row.prompt.label == label for row in here) for label in ("harmful", "benign")}
            files.append(DataFile(name=path.name, sha256=file_digest(path), role="fit", **count))
    except DataError as error:
        raise TuneError(f"the data cannot be read: {error}") from error
    if problems:
        raise TuneError(listed(problems, "tuning"))
    if not found:
        raise TuneError("the data hold no row; expected requests with answers")
    made = Rows(tuple(found), tuple(files), unlabelled)
    if missing := [label for label in needs if not made.count(label)]:
        raise TuneError(
            f"the data hold no {' and no '.join(missing)} prompt, and this method needs "
            f"{' and '.join(needs)} ones: a model that is trained on one kind alone answers all alike"
        )
    return made


def _file(path: Path, problems: list[Problem], options: TuneOptions) -> list[Row | None]:
    stem = path.name.removesuffix(".gz").removesuffix(".jsonl")
    made = []
    for number, row in rows(path, problems):
        try:
            made.append(_row(row, stem, path, number, options))
        except RowError as error:
            problems.append(Problem(error.kind, path, number, str(error)))
    return made


def _row(row: dict[str, Any], stem: str, path: Path, number: int, options: TuneOptions) -> Row | None:
    prompt = prompt_of(row, stem, path, number)
    if prompt is None:
        return None
    answer = _text(row, "response")
    rejected = _text(row, "rejected")
    if answer is None and prompt.label == "harmful":
        if options.refusal is None:
            raise RowError(
                "no response", "a harmful prompt without 'response'; add one, or give a sentence as 'refusal'"
            )
        answer = options.refusal
    elif answer is None and options.own_answers is None:
        raise RowError("no response", "no 'response'; add one, or let the model give it with 'own_answers'")
    if options.objective == "dpo" and rejected is None:
        if prompt.label == "benign":
            rejected = options.refusal
        if rejected is None and (options.own_answers is None or answer is None):
            raise RowError(
                "no rejected answer",
                "no 'rejected' answer, which DPO needs; add one, or give 'refusal' and 'own_answers'",
            )
    return Row(prompt, answer, rejected if options.objective == "dpo" else None)


def _text(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RowError("bad field", f"{key!r} must be text, found {type(value).__name__}")
    return whole(value, key).strip() or None
