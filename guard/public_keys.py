"""Ed25519 public keys in PEM files (RFC 8410), read without a cryptographic library: the gateway has none.

A key is named by its 32 bytes in hexadecimal digits. ``openssl pkey -pubin -text`` shows the same digits.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----(.*?)-----END \1-----", re.S)
# SubjectPublicKeyInfo of Ed25519 up to the key itself; for this algorithm there is no other spelling (DER).
_HEAD = bytes.fromhex("302a300506032b6570032100")


class PublicKeyError(ValueError):
    """A file does not hold Ed25519 public keys."""


def read_public_keys(path: str | Path) -> tuple[str, ...]:
    """The keys of a PEM file of one block or more; other text is ignored. Raises PublicKeyError."""
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PublicKeyError(f"cannot read the public keys in {path}: {error}") from error
    keys = tuple(_key(kind, body, path) for kind, body in _BLOCK.findall(text))
    if not keys:
        raise PublicKeyError(
            f"{path} holds no public key; expected PEM blocks 'BEGIN PUBLIC KEY' as neuronguard bundle "
            "keygen writes them to KEY.pub"
        )
    return keys


def _key(kind: str, body: str, path: str | Path) -> str:
    if kind != "PUBLIC KEY":
        raise PublicKeyError(f"{path} holds a {kind}; expected public keys only")
    try:
        der = base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise PublicKeyError(f"{path} holds a block that is not base64: {error}") from error
    if len(der) != len(_HEAD) + 32 or not der.startswith(_HEAD):
        raise PublicKeyError(f"{path} holds a public key of another kind; expected Ed25519")
    return der[len(_HEAD) :].hex()
