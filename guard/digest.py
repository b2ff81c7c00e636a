"""Digests that bind a bundle to a model: what is hashed, and in which order."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
_CHUNK = 1 << 22


def weights_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over every tensor of a safetensors checkpoint: name, dtype, shape and bytes, sorted by name.

    The same tensors give the same digest however they are split over files and whatever metadata the files
    carry. Reads the files once, tensor by tensor. Raises FileNotFoundError when there is no safetensors file.
    """
    entries: dict[str, tuple[str, list[int], Path, int, int]] = {}
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no .safetensors file; the guard needs one to verify the weights"
        )
    for file in files:
        with file.open("rb") as stream:
            # Layout of the format: u64 header length, JSON header, then the tensors' bytes.
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                entries[name] = (entry["dtype"], entry["shape"], file, 8 + length + begin, end - begin)
    digest = hashlib.sha256()
    for name in sorted(entries):
        dtype, shape, file, offset, size = entries[name]
        digest.update(json.dumps([name, dtype, shape]).encode())
        with file.open("rb") as stream:
            stream.seek(offset)
            while size:
                chunk = stream.read(min(size, _CHUNK))
                digest.update(chunk)
                size -= len(chunk)
    return digest.hexdigest()


def tokenizer_digest(directory: str | os.PathLike[str]) -> str:
    """SHA-256 over the tokenizer's files and the chat template, wherever the template is kept.

    Raises FileNotFoundError when the directory holds no tokenizer.
    """
    root, digest, found = Path(directory), hashlib.sha256(), False
    for name in TOKENIZER_FILES:
        file = root / name
        if file.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
            found = True
    if not found:
        raise FileNotFoundError(f"{directory} holds no tokenizer file ({', '.join(TOKENIZER_FILES)})")
    config = root / "tokenizer_config.json"
    if config.is_file():
        document = json.loads(config.read_text("utf-8"))
        # Only what changes token ids: libraries rewrite the rest of this file from version to version.
        kept = {key: document.get(key) for key in ("chat_template", "add_bos_token", "add_eos_token")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
