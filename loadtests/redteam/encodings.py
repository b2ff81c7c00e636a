"""Ways to write a request so that a reader who knows the key has it back, letter by letter."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Callable, Mapping
from typing import NamedTuple

_LEET = str.maketrans({"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7"})
# Cyrillic and Greek letters that look like Latin ones.
_TWINS = {
    **dict(zip("aceopxyijs", "асеорхуіјѕ", strict=True)),
    **dict(zip("ABEHIKMNOPTXYZ", "ΑΒΕΗΙΚΜΝΟΡΤΧΥΖ", strict=True)),
}
_TO_TWINS = {ord(letter): twin for letter, twin in _TWINS.items()}
_FROM_TWINS = {ord(twin): letter for letter, twin in _TWINS.items()}
ZERO_WIDTH = "\u200b"


class Encoding(NamedTuple):
    """Two functions that undo each other, for texts of printable ASCII."""

    name: str
    write: Callable[[str], str]
    read: Callable[[str], str] | None
    """None: a reader can guess the request, and no key gives it back exactly."""


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _unbase64(text: str) -> str:
    return base64.b64decode(text, validate=True).decode()


def _spelled(text: str) -> str:
    return "-".join(text)


def _unspelled(text: str) -> str:
    return text[::2]


ENCODINGS: Mapping[str, Encoding] = {
    each.name: each
    for each in (
        Encoding("base64", _base64, _unbase64),
        Encoding("rot13", lambda text: codecs.encode(text, "rot13"), lambda t: codecs.decode(t, "rot13")),
        Encoding("hexadecimal", lambda text: text.encode().hex(), lambda text: bytes.fromhex(text).decode()),
        Encoding("leetspeak", lambda text: text.lower().translate(_LEET), None),
        Encoding(
            "homoglyphs",
            lambda text: text.translate(_TO_TWINS),
            lambda text: text.translate(_FROM_TWINS),
        ),
        Encoding("zero-width characters", ZERO_WIDTH.join, lambda text: text.replace(ZERO_WIDTH, "")),
        Encoding("letter by letter", _spelled, _unspelled),
    )
}
