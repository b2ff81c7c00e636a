from __future__ import annotations

import pytest

from guard.sealed import Keyring
from guard.serve.keys import fresh_key_file


def test_only_the_owner_can_read_the_key() -> None:
    with fresh_key_file() as file:
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        Keyring.load(file)


def test_every_start_has_its_own_key() -> None:
    with fresh_key_file() as first, fresh_key_file() as second:
        assert first.read_text() != second.read_text()


def test_the_key_is_removed_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="boom"), fresh_key_file() as file:
        raise RuntimeError("boom")
    assert not file.parent.exists()
