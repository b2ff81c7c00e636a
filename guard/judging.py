"""The whole of ``neuronguard judge``: several judges on the same answers, and how far they agree."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from guard.agreement import agreements
from guard.data import Problem
from guard.digest import file_digest
from guard.judgements import answer_digest
from guard.judges import Answered, Judge, JudgeError, Judgement
from guard.report import table

FILES = ("agreement.json", "judgements.jsonl.gz")


def ask(judges: Sequence[Judge], answers: Sequence[Answered]) -> dict[str, list[Judgement]]:
    """Judgements by the name of the judge. Raises JudgeError when two judges have one name."""
    views: dict[str, list[Judgement]] = {}
    for judge in judges:
        if judge.name in views:
            raise JudgeError(f"two judges are called {judge.name!r}; give each once")
        views[judge.name] = judge.judge(answers)
    return views


def requests_of(answers: Sequence[Answered]) -> NDArray[np.int64]:
    """The number of the request that each answer is to: equal conversations, or rows of one pair."""
    numbers: dict[object, int] = {}
    keys = [(a.source, a.pair) if a.pair is not None else a.messages for a in answers]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def document(
    answers: Sequence[Answered], views: Mapping[str, Sequence[Judgement]], problems: Sequence[Problem]
) -> dict[str, Any]:
    """What the judges said, how often they could not say and why, and how far they agree."""
    requests = requests_of(answers)
    files = {each.path: file_digest(each.path) for each in answers}
    return {
        "schema_version": 1,
        "n_answers": len(answers),
        "n_requests": len(np.unique(requests)),
        "judges": {
            name: {
                "unsafe": sum(j.view == "unsafe" for j in said),
                "safe": sum(j.view == "safe" for j in said),
                "not_judged": sum(j.view is None for j in said),
                "reasons": dict(Counter(j.reason for j in said if j.view is None)),
            }
            for name, said in views.items()
        },
        "agreement": agreements(views, requests),
        "left_out": dict(Counter(problem.kind for problem in problems)),
        "data": [{"name": path.name, "sha256": digest} for path, digest in files.items()],
    }


def lines(answers: Sequence[Answered], views: Mapping[str, Sequence[Judgement]]) -> bytes:
    """The judgements, gzipped JSON lines: each answer by file, line and digest, never by its text."""
    found = []
    for index, each in enumerate(answers):
        found.append(
            json.dumps(
                {
                    "file": each.path.name,
                    "line": each.line,
                    "source": each.source,
                    "sha256": answer_digest(each.messages, each.answer),
                    "judgements": {name: said[index].view for name, said in views.items()},
                }
            )
            + "\n"
        )
    # Without the time of day: the same judgements give the same file.
    return gzip.compress("".join(found).encode(), mtime=0)


def markdown(found: Mapping[str, Any]) -> str:
    """The tables for the screen."""
    judges = [
        (name, each["unsafe"], each["safe"], each["not_judged"], ", ".join(each["reasons"]) or "–")
        for name, each in found["judges"].items()
    ]
    parts = table(("judge", "unsafe", "safe", "not judged", "why"), judges)
    if found["agreement"]:
        heads = ("judges", "n", "both unsafe", "only the first", "only the second", "both safe", "kappa")
        rows = []
        for each in found["agreement"]:
            cells = each["confusion"]
            counts = list(cells.values()) if cells else ["–"] * 4
            rows.append([f"{each['first']}, {each['second']}", each["n"], *counts, _kappa(each)])
        parts += ["", *table(heads, rows)]
    return "\n".join(parts) + "\n"


def _kappa(each: Mapping[str, Any]) -> str:
    if each["kappa"] is None:
        return "–"
    low, high = each["kappa_interval"]
    return f"{each['kappa']:.2f} [{low:.2f}–{high:.2f}]"
