import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import ApiError
from service.strict_json import dump, parse_object


def parse(text: str | bytes, depth: int = 8) -> dict[str, Any]:
    return parse_object(text.encode() if isinstance(text, str) else text, max_depth=depth)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[]", "must be a JSON object"),
        ("null", "must be a JSON object"),
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "out of range"),
        ('{"a": ' + "9" * 5000 + "}", "too long"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        ('{"a": 1} {"a": 2}', "Extra data"),
        ('{"a":' * 100_000, "nested"),
        ('{"a":' + "[" * 500_000, "nested"),
    ],
)
def test_what_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(text)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert says in caught.value.message


def test_depth_counts_containers() -> None:
    assert parse('{"a": [[1]]}', depth=3) == {"a": [[1]]}
    with pytest.raises(ApiError, match="deeper than 2 levels"):
        parse('{"a": [[1]]}', depth=2)


def test_lone_surrogates_do_not_get_through() -> None:
    with pytest.raises(ApiError, match="surrogate"):
        dump(parse(r'{"a": "\ud800"}'))
    assert parse(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}


def test_a_duplicate_key_with_a_surrogate_is_still_an_error_that_can_be_sent() -> None:
    with pytest.raises(ApiError) as caught:
        parse(r'{"\ud800": 1, "\ud800": 2}')
    assert caught.value.response().status_code == 400


leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=6)


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.text(), values, max_size=4))
def test_what_is_parsed_is_what_is_forwarded(value: dict[str, Any]) -> None:
    parsed = parse(json.dumps(value), depth=64)
    assert parsed == value
    assert json.loads(dump(parsed)) == value


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\untfNa1e-.').map(str.encode))
def test_any_bytes_are_parsed_or_refused_as_a_400(data: bytes) -> None:
    with suppress(ApiError):  # anything else fails the test
        parse(data)
