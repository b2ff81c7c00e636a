"""What ``neuronguard judge`` wrote about a model's answers, as labels for ``fit`` and ``evaluate``.

A judgement names the answer by the digest of conversation and answer, so it counts only where the model gives
that very answer again, which greedy decoding does: same weights, same length of answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guard.data import DataError, Problem, listed, rows
from guard.digest import file_digest
from guard.judges import View

_VIEWS: tuple[View | None, ...] = ("unsafe", "safe", None)


class JudgementsError(ValueError):
    """A file of judgements does not hold what it is to label by."""


def answer_digest(messages: Sequence[tuple[str, str]], answer: str) -> str:
    """SHA-256 of a conversation and the answer to it."""
    text = json.dumps([messages, answer], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Judgements:
    """One judge's views of answers."""

    judge: str
    views: dict[str, View]
    """By :func:`answer_digest`. What the judge could not say, or said both of, is not in it."""
    file: str
    sha256: str

    @classmethod
    def load(cls, path: str | Path, judge: str | None = None) -> Judgements:
        """Read ``judgements.jsonl.gz``; ``judge`` chooses one of several.

        Raises JudgementsError, or DataError that names the lines that are no judgements.
        """
        file = Path(path)
        problems: list[Problem] = []
        found: dict[str, set[View]] = {}
        judges: dict[str, None] = {}
        if not file.is_file():
            raise JudgementsError(f"there is no file of judgements {file}")
        for number, row in rows(file, problems):
            digest, views = row.get("sha256"), row.get("judgements")
            if not isinstance(digest, str) or not isinstance(views, dict) or not views:
                problems.append(Problem("no judgement", file, number, "expected 'sha256' and 'judgements'"))
                continue
            judges |= dict.fromkeys(views)
            for name, view in views.items():
                if view not in _VIEWS:
                    problems.append(Problem("no judgement", file, number, "expected unsafe, safe or null"))
                elif view is not None and name == (judge or name):
                    found.setdefault(digest, set()).add(view)
        if problems:
            raise DataError(listed(problems, "judgement"))
        if judge not in judges and (judge is not None or len(judges) != 1):
            raise JudgementsError(
                f"{file} holds judgements by {', '.join(judges) or 'nobody'}; name one with --judge"
            )
        clear = {digest: next(iter(views)) for digest, views in found.items() if len(views) == 1}
        return cls(judge or next(iter(judges)), clear, file.name, file_digest(file))

    def view(self, messages: Sequence[tuple[str, str]], answer: str) -> View | None:
        """What the judge said of an answer; None when it said nothing."""
        return self.views.get(answer_digest(messages, answer))
