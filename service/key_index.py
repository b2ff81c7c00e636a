"""Finding an API key by what a client sent, without its time telling how close it was."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Digested(Protocol):
    """Something that is known by the SHA-256 of a secret."""

    @property
    def sha256(self) -> str:
        """In hexadecimal digits."""


K = TypeVar("K", bound=Digested)


class KeyIndex(Generic[K]):
    """Keys by their digests, for any number of keys.

    Digests are looked up under an HMAC with a key that only this process knows, so that how a look-up goes
    says nothing about the digests stored; what is found is compared in constant time.
    """

    def __init__(self, keys: Iterable[K]) -> None:
        self._blind = secrets.token_bytes(32)
        self._keys = {self._blinded(key.sha256): key for key in keys}

    def find(self, secret: str) -> K | None:
        """The key with this secret."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        found = self._keys.get(self._blinded(digest))
        return found if found is not None and hmac.compare_digest(found.sha256, digest) else None

    def _blinded(self, digest: str) -> bytes:
        return hmac.digest(self._blind, digest.encode(), "sha256")
