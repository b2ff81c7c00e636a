from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.sealed import MAX_SEALED_CHARS, KeyFileError, Keyring, SealError

OLD = ("old", b"o" * 32)
NEW = ("new", b"n" * 32)
RING = Keyring((NEW,))


def reason(ring: Keyring, purpose: str, text: str) -> str:
    with pytest.raises(SealError) as caught:
        ring.open(purpose, text)
    return str(caught.value)


@given(st.binary(max_size=2000), st.sampled_from(["directive", "verdict"]))
def test_what_is_sealed_opens(payload: bytes, purpose: str) -> None:
    assert RING.open(purpose, RING.seal(purpose, payload)) == payload


@given(st.binary(max_size=60), st.data())
def test_any_changed_character_is_noticed(payload: bytes, data: st.DataObject) -> None:
    sealed = RING.seal("verdict", payload)
    place = data.draw(st.integers(0, len(sealed) - 1))
    other = data.draw(st.sampled_from("AZaz09-_.").filter(lambda c: c != sealed[place]))
    forged = sealed[:place] + other + sealed[place + 1 :]
    with pytest.raises(SealError):
        RING.open("verdict", forged)


@given(st.text(max_size=200))
def test_nonsense_is_refused_and_never_crashes(text: str) -> None:
    with pytest.raises(SealError):
        RING.open("verdict", text)


@given(st.binary(max_size=60), st.integers(1, 40))
def test_a_truncated_string_is_refused(payload: bytes, missing: int) -> None:
    with pytest.raises(SealError):
        RING.open("verdict", RING.seal("verdict", payload)[:-missing])


def test_a_directive_is_not_a_verdict() -> None:
    assert reason(RING, "verdict", RING.seal("directive", b"{}")) == "bad_mac"


def test_another_key_under_the_same_id_is_refused() -> None:
    forger = Keyring((("new", b"x" * 32),))
    assert reason(RING, "verdict", forger.seal("verdict", b"{}")) == "bad_mac"


def test_a_key_id_is_part_of_what_is_signed() -> None:
    same_key = Keyring((("a", b"k" * 32), ("b", b"k" * 32)))
    kid, rest = same_key.seal("verdict", b"{}").split(".", 1)
    assert kid == "a"
    assert reason(same_key, "verdict", f"b.{rest}") == "bad_mac"


def test_rotation_accepts_both_keys_and_then_the_new_one_only() -> None:
    before, during, after = Keyring((OLD,)), Keyring((NEW, OLD)), Keyring((NEW,))
    assert during.open("verdict", before.seal("verdict", b"x")) == b"x"
    assert after.open("verdict", during.seal("verdict", b"x")) == b"x"
    assert reason(after, "verdict", before.seal("verdict", b"x")) == "unknown_key"


def test_a_very_long_string_is_refused_before_it_is_decoded() -> None:
    assert reason(RING, "verdict", "a" * (MAX_SEALED_CHARS + 1)) == "too_long"


def test_two_spellings_of_one_payload_do_not_both_open() -> None:
    # The last character of base64 can hold unused bits; flipping them must not give a second valid string.
    sealed = RING.seal("verdict", b"x")
    kid, payload, mac = sealed.split(".")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twins = [payload[:-1] + c for c in alphabet if c != payload[-1]]
    same = [t for t in twins if base64.urlsafe_b64decode(t + "=" * (-len(t) % 4)) == b"x"]
    assert same
    for twin in same:
        assert reason(RING, "verdict", f"{kid}.{twin}.{mac}") == "malformed"


def test_the_key_file_round_trips_and_belongs_to_its_owner(tmp_path: Path) -> None:
    ring, file = Keyring((NEW, OLD)), tmp_path / "keys"
    ring.save(file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert Keyring.load(file) == ring
    with pytest.raises(FileExistsError):
        ring.save(file)


def test_a_key_file_open_to_everybody_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    RING.save(file)
    os.chmod(file, 0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Keyring.load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one or two keys, got 0"),
        ("a:" + "00" * 32 + "\nb:" + "11" * 32 + "\nc:" + "22" * 32, "one or two keys, got 3"),
        ("a:" + "00" * 32 + "\na:" + "11" * 32, "must differ"),
        ("a:zz", "line 1: expected 'kid:hex'"),
        ("a:0011", "has 2 bytes, expected at least 32"),
        ("a.b:" + "00" * 32, "must consist of letters"),
    ],
)
def test_a_malformed_key_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(KeyFileError, match=message):
        Keyring.load(file)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="cannot read the key file"):
        Keyring.load(tmp_path / "gone")


def test_keys_never_show_in_text() -> None:
    ring = Keyring.generate("k7")
    assert repr(ring) == "Keyring(k7)"
    assert ring.keys[0][1].hex() not in f"{ring!r} {ring}"
