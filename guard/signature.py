"""Ed25519 signatures of bundles (RFC 8032): who vouches for the bytes in a bundle's directory.

``signature.json`` lies beside what it signs. The signed message is

    b"neuronguard bundle signature 1\\0" + JSON {"bundle": digest, "files": {name: SHA-256, …}}

with sorted keys and no spaces. The first part keeps a signature from meaning anything elsewhere. The digest
is that of verdicts and metrics; the files are all files of the directory, so that no byte can change, and
none be added, without notice. Hidden files are left out: some mounts put theirs beside the content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from guard.bundle import SIGNATURE_FILE, Bundle
from guard.cache import write_whole

_DOMAIN = b"neuronguard bundle signature 1\0"

Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class SignatureError(ValueError):
    """A bundle is not signed as it has to be, or cannot be signed."""


class Signature(BaseModel):
    """Everything in ``signature.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    bundle: Digest
    """The bundle's digest."""
    files: dict[str, Digest]
    """SHA-256 by file name."""
    key: Digest
    """The public key, in hexadecimal digits."""
    signature: Annotated[str, StringConstraints(pattern="^[0-9a-f]{128}$")]

    def written(self) -> bytes:
        """The file's one spelling."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def message(self) -> bytes:
        """What is signed."""
        return _message(self.bundle, self.files)


def _message(bundle: str, files: dict[str, str]) -> bytes:
    content = json.dumps({"bundle": bundle, "files": files}, sort_keys=True, separators=(",", ":"))
    return _DOMAIN + content.encode()


def make_key(path: str | os.PathLike[str]) -> str:
    """Write a new private key, readable by its owner only, and ``PATH.pub``; returns the key's name.

    Raises SignatureError rather than overwrite either.
    """
    private, public = Path(path), Path(f"{os.fspath(path)}.pub")
    for file in (private, public):
        if file.exists():
            raise SignatureError(f"{file} exists; a key is never overwritten. Choose another name")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor = os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(pem)
    with public.open("xb") as stream:
        stream.write(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return _name(key.public_key())


def load_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read a private key. Raises SignatureError when it is missing, open to others, or of another kind."""
    file = Path(path)
    try:
        mode, pem = file.stat().st_mode, file.read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read the private key {file}: {error}") from error
    if mode & 0o077:
        raise SignatureError(f"the private key {file} is accessible to other users; run: chmod 600 {file}")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(
            f"{file} is not a private key without password in PEM form (neuronguard bundle keygen): {error}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{file} holds a key of another kind; expected Ed25519")
    return key


def sign(directory: str | os.PathLike[str], key: Ed25519PrivateKey) -> Signature:
    """Sign a bundle as it lies there; a signature that it has is replaced. Raises BundleError."""
    root = Path(directory)
    digest, files = Bundle.load(root).digest, _digests(root)
    signature = Signature(
        bundle=digest,
        files=files,
        key=_name(key.public_key()),
        signature=key.sign(_message(digest, files)).hex(),
    )
    write_whole(root / SIGNATURE_FILE, lambda file: file.write(signature.written()))
    return signature


def verify(
    directory: str | os.PathLike[str], digest: str, trusted: Collection[str] | None = None
) -> str | None:
    """The key that signed a bundle, or None when it is not signed and need not be.

    ``digest`` is that of the bundle as it was loaded; ``trusted`` are the keys of which one must have signed
    it, by name; None: any may, and a bundle without a signature is accepted. Raises SignatureError.
    """
    root = Path(directory)
    file = root / SIGNATURE_FILE
    if not file.is_file():
        if trusted is None:
            return None
        raise SignatureError(f"the bundle in {root} is not signed (no {SIGNATURE_FILE}); {_SIGN}")
    try:
        content = file.read_bytes()
        signature = Signature.model_validate_json(content)
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key)).verify(
            bytes.fromhex(signature.signature), signature.message()
        )
    except (OSError, ValidationError) as error:
        raise SignatureError(f"{file} is not a readable signature: {error}; {_SIGN}") from error
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(
            f"the signature in {file} is not valid for the key that it names; {_SIGN}"
        ) from error
    if content != signature.written():
        raise SignatureError(f"{file} is not as it was written; {_SIGN}")
    if trusted is not None and signature.key not in trusted:
        raise SignatureError(
            f"the bundle in {root} is signed by {signature.key}, which is not one of the trusted keys: "
            f"{', '.join(sorted(trusted))}"
        )
    if signature.bundle != digest:
        raise SignatureError(
            f"the signature in {file} is for the bundle {signature.bundle}, and this is {digest}; {_SIGN}"
        )
    found = _digests(root)
    for name in sorted(found.keys() | signature.files.keys()):
        if found.get(name) != signature.files.get(name):
            state = "missing" if name not in found else "new" if name not in signature.files else "changed"
            raise SignatureError(f"{root / name} is {state} since the bundle was signed; {_SIGN}")
    return signature.key


_SIGN = "if it is as it should be, sign it: neuronguard bundle sign"


def _digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file. Raises SignatureError for a folder within the bundle."""
    found = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name == SIGNATURE_FILE:
            continue
        if not path.is_file():
            raise SignatureError(f"{path} is not a file; a signed bundle holds files only")
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _name(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
