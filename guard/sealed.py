"""Sealed strings: ``kid.payload.mac``, the only form in which gateway and engine believe each other.

The payload is JSON in base64url, the mac is HMAC-SHA-256 over ``purpose NUL kid NUL payload bytes``. The
purpose separates directives from verdicts, so that one can never be replayed as the other. Keys come from a
file with one ``kid:hex`` line per key: the first signs, all are accepted, so that a key can be rotated by
prepending the new one and removing the old one later.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

MIN_KEY_BYTES = 32
MAX_KEYS = 2
MAX_SEALED_CHARS = 8192
SEAL_ERRORS = ("too_long", "malformed", "unknown_key", "bad_mac")
"""What can be wrong with a sealed string: the words of a SealError."""


class SealError(ValueError):
    """A sealed string was not made by a holder of a live key, or is not a sealed string at all."""


class KeyFileError(ValueError):
    """The key file is missing, readable by others, or malformed."""


@dataclass(frozen=True, repr=False)
class Keyring:
    """One or two live keys by key id; the first signs."""

    keys: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= MAX_KEYS:
            raise KeyFileError(f"a keyring holds one or two keys, got {len(self.keys)}")
        if len({kid for kid, _ in self.keys}) != len(self.keys):
            raise KeyFileError("key ids must differ")
        for kid, key in self.keys:
            if not kid or not kid.replace("-", "").replace("_", "").isalnum():
                raise KeyFileError(f"key id {kid!r} must consist of letters, digits, '-' and '_'")
            if len(key) < MIN_KEY_BYTES:
                raise KeyFileError(f"key {kid!r} has {len(key)} bytes, expected at least {MIN_KEY_BYTES}")

    def __repr__(self) -> str:
        return f"Keyring({', '.join(kid for kid, _ in self.keys)})"

    @classmethod
    def generate(cls, kid: str = "k1") -> Keyring:
        """A keyring with one fresh random key."""
        return cls(((kid, secrets.token_bytes(MIN_KEY_BYTES)),))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Keyring:
        """Read a key file. Raises KeyFileError when it is missing, open to others, or malformed."""
        file = Path(path)
        try:
            mode = file.stat().st_mode
            lines = file.read_text("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KeyFileError(f"cannot read the key file {file}: {error}") from error
        if mode & 0o007:
            raise KeyFileError(f"the key file {file} is accessible to every user; run: chmod 600 {file}")
        keys = []
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            kid, _, text = line.strip().partition(":")
            try:
                keys.append((kid, bytes.fromhex(text)))
            except ValueError as error:
                raise KeyFileError(f"{file}, line {number}: expected 'kid:hex'") from error
        return cls(tuple(keys))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key file, readable by its owner only. Refuses to overwrite."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.writelines(f"{kid}:{key.hex()}\n" for kid, key in self.keys)

    def seal(self, purpose: str, payload: bytes) -> str:
        """Sign ``payload`` for ``purpose`` with the first key."""
        kid, key = self.keys[0]
        return f"{kid}.{_encode(payload)}.{_encode(_mac(key, purpose, kid, payload))}"

    def name(self, purpose: str, payload: bytes) -> str:
        """64 hexadecimal digits that stand for ``payload`` and that nobody can make without the first key."""
        kid, key = self.keys[0]
        return _mac(key, purpose, kid, payload).hex()

    def open(self, purpose: str, text: str) -> bytes:
        """Return the payload of a sealed string. Raises SealError; the reason is safe to count and to log."""
        if len(text) > MAX_SEALED_CHARS:
            raise SealError("too_long")
        parts = text.split(".")
        if len(parts) != 3:
            raise SealError("malformed")
        kid, payload_text, mac_text = parts
        try:
            payload, mac = _decode(payload_text), _decode(mac_text)
        except (binascii.Error, ValueError) as error:
            raise SealError("malformed") from error
        key = dict(self.keys).get(kid)
        if key is None:
            raise SealError("unknown_key")
        if not hmac.compare_digest(mac, _mac(key, purpose, kid, payload)):
            raise SealError("bad_mac")
        return payload


def _mac(key: bytes, purpose: str, kid: str, payload: bytes) -> bytes:
    return hmac.new(key, b"\0".join((purpose.encode(), kid.encode(), payload)), hashlib.sha256).digest()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    # One payload, one spelling: base64 decoders ignore spare bits and accept both alphabets.
    if _encode(data) != text:
        raise ValueError("not canonical base64url")
    return data
