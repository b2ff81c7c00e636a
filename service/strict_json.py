"""JSON as a gateway must read it: one meaning only, whoever reads it next."""

from __future__ import annotations

import json
import math
from typing import Any

from service.errors import ApiError, bad_request


class _NotAllowedError(ValueError):
    """Well-formed for Python's parser, but not for us; the message goes to the client."""


def parse_object(body: bytes, *, max_depth: int) -> dict[str, Any]:
    """Parse a request body.

    Refused, apart from malformed JSON: a key given twice (parsers differ in which one they keep), NaN and
    infinities, lone surrogates (not text in any encoding), nesting beyond ``max_depth``, and anything but an
    object at the top. Raises ApiError 400.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except _NotAllowedError as error:
        raise _malformed(str(error)) from None
    except RecursionError:
        raise _malformed(f"it is nested deeper than {max_depth} levels") from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise _malformed(f"byte {error.start} is not UTF-8") from None
    except ValueError:  # an integer of more digits than Python converts
        raise _malformed("a number in it is too long") from None
    if not isinstance(value, dict):
        raise _malformed("it must be a JSON object")
    if _deeper_than(value, max_depth):
        raise _malformed(f"it is nested deeper than {max_depth} levels")
    return value


def dump(value: dict[str, Any]) -> bytes:
    """The one serialisation of a forwarded body. Raises ApiError 400 for text that is not Unicode."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise _malformed("a string in it has a lone surrogate, which is not text") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _NotAllowedError(f"the key '{key[:100]}' is given twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise _NotAllowedError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _NotAllowedError("a number in it is out of range")
    return value


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers nest more than ``limit`` deep; level by level, so that it needs no recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def _malformed(reason: str) -> ApiError:
    return bad_request(f"The request body is not acceptable JSON: {reason}.", code="invalid_json")
