"""One row of a data file: from the bytes of a line to a labelled request, or to what is wrong with it."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Label = Literal["harmful", "benign"]
_TURNS = ("system", "user", "assistant")
_SHOWN = 40
"""Most characters of a wrong value that a message repeats: it might be the prompt."""


class DataError(ValueError):
    """A data file is missing, malformed, or does not hold what its role needs."""


class Problem(NamedTuple):
    """Something wrong with a data file. Never quotes a prompt."""

    kind: str
    """A few words that problems of one sort share, to count them by."""
    path: Path
    line: int | None
    """Counted from 1; None where the whole file is meant."""
    text: str
    """What was wrong and what was expected."""

    def __str__(self) -> str:
        return f"{place(self.path, self.line)}: {self.text}"


class RowError(Exception):
    """A row cannot be used. Becomes a Problem where file and line are known."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Prompt:
    """One labelled request."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) pairs; the last one is the user's."""
    label: Label
    source: str
    attack: str | None = None
    """The family of the attack that the request is wrapped in, if it is."""
    pair: str | None = None
    """What rows that go back to one underlying request share; they stand or fall together."""
    language: str | None = None
    split: str | None = None
    """The part of its data set that the row belongs to, as the data set names it."""
    path: Path | None = field(default=None, compare=False)
    line: int | None = field(default=None, compare=False)
    """Where the row was read."""

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

    def problem(self, kind: str, text: str) -> Problem:
        """Something wrong with this row."""
        return Problem(kind, self.path or Path("?"), self.line, text)


def place(path: Path, line: int | None) -> str:
    """A file and a line as messages name them."""
    return f"{path}" if line is None else f"{path}, line {line}"


def _normal(text: str) -> str:
    folded = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in folded if c.isalnum())


def parse(line: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises RowError."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"byte {error.start} is not UTF-8; expected UTF-8 text") from error
    try:
        row = json.loads(text)
    # A number of thousands of digits or a thousand brackets are errors of other classes.
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise RowError("not JSON", f"not JSON ({said}); expected one object a line") from error
    if not isinstance(row, dict):
        raise RowError("not an object", f"expected an object, found {type(row).__name__}")
    return row


def prompt_of(
    row: dict[str, Any], source: str, path: Path | None = None, line: int | None = None
) -> Prompt | None:
    """The request of a row, None when its label is null. ``source`` is used where the row names none.

    Raises RowError.
    """
    if "label" not in row:
        raise RowError("label missing", "no 'label'; expected harmful, benign or null")
    label = row["label"]
    if label is None:
        return None
    if label not in ("harmful", "benign"):
        found = repr(label)[:_SHOWN]
        raise RowError("unknown label", f"'label' is {found}; expected harmful, benign or null")
    return Prompt(
        turns(row),
        label,
        _named(row, "source") or source,
        attack=_named(row, "attack"),
        # Data sets call it by several names; what counts is that the rows share it.
        pair=_named(row, "pair") or _named(row, "group") or _named(row, "goal"),
        language=_named(row, "language") or _named(row, "lang"),
        split=_named(row, "split"),
        path=path,
        line=line,
    )


def turns(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The conversation of a row: ``messages`` if there are any, else ``prompt``. Raises RowError."""
    messages = row.get("messages")
    if messages is None:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError("no prompt", "no 'prompt'; expected a text that is not empty")
        return (("user", whole(prompt, "prompt")),)
    try:
        found = tuple((message["role"], message["content"]) for message in messages)
    except (TypeError, KeyError) as error:
        raise RowError(
            "bad messages", "'messages' must be a list of objects with role and content"
        ) from error
    if any(role not in _TURNS or not isinstance(content, str) for role, content in found):
        raise RowError(
            "bad messages", f"each of 'messages' needs a role out of {', '.join(_TURNS)} and a text"
        )
    if not found or found[-1][0] != "user":
        raise RowError("bad messages", "'messages' must end with a user turn")
    if not found[-1][1].strip():
        raise RowError("no prompt", "the last of 'messages' is empty; expected a text")
    return tuple((role, whole(content, "messages")) for role, content in found)


def whole(text: str, name: str) -> str:
    """The text itself. Raises RowError when it holds half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "not UTF-8", f"{name!r} holds half of a surrogate pair; expected whole text"
        ) from error
    return text


def _named(row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is None or value == "":
        return None
    if key != "source" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError("bad field", f"{key!r} must be text, found {type(value).__name__}")
    return whole(value, key)
