"""Run a model over whole prompts: activations at every token, and what probes make of them.

Activations of every token are large: a prompt of 30 tokens takes thirty times what its last token does. They
are kept on disk and mapped where a fit goes over them again and again (``token_activations``); where a probe
is only applied, its outputs alone are kept (``outputs``).
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from guard.cache import Cache
from guard.capture import Float32Array, batches, read_every_token
from guard.observe import Subject, chunks
from guard.pooling import pool
from guard.prompts import Tokens
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.units import Units


class SequenceError(ValueError):
    """Every token of a prompt cannot be read here."""


class TokenActivations:
    """Activations at every token of ``n`` prompts, on disk, in the order of the prompts."""

    def __init__(self, parts: Sequence[Float32Array], lengths: Sequence[int]) -> None:
        """``parts`` hold whole prompts, one after the other."""
        self.lengths: NDArray[np.int64] = np.array(lengths, dtype=np.int64)
        """Tokens of each prompt, ``[n]``."""
        self._parts = parts
        self._where: list[tuple[int, int]] = []
        part, start = 0, 0
        for length in lengths:
            if start == len(parts[part]):
                part, start = part + 1, 0
            self._where.append((part, start))
            start += length

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def features(self) -> int:
        """Activations of a token."""
        return int(self._parts[0].shape[1])

    def prompt(self, index: int) -> Float32Array:
        """float32 ``[tokens, features]`` of one prompt."""
        part, start = self._where[index]
        return self._parts[part][start : start + self.lengths[index]]

    def blocks(self) -> Iterator[Float32Array]:
        """All tokens, float32 ``[tokens, features]`` a block."""
        yield from self._parts


def token_activations(
    subject: Subject, prompts: Sequence[Tokens], units: Units, name: str = "prompts"
) -> TokenActivations:
    """Activations of ``units`` at every token. Raises SequenceError, also when the disk is too small."""
    refuse_reader(subject)
    if subject.cache.root is not None:
        return _on_disk(subject, subject.cache, prompts, units, name)
    folder = tempfile.mkdtemp(prefix="neuronguard-")
    try:
        found = _on_disk(subject, Cache(Path(folder)), prompts, units, name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def _on_disk(
    subject: Subject, cache: Cache, prompts: Sequence[Tokens], units: Units, name: str
) -> TokenActivations:
    width = subject.width(units)
    parts: list[Float32Array] = []
    for chunk in tqdm(chunks(prompts), f"every token ({name})", disable=not subject.progress):
        shape = (sum(map(len, chunk)), width)
        key = _key(subject, chunk, units)
        found = cache.array("token-activations", key, mapped=True)
        if found is None or found.shape != shape:
            _need_disk(cache, 4 * shape[0] * shape[1])
            read = np.empty(shape, dtype=np.float32)
            starts = np.cumsum([0, *map(len, chunk)])
            for index, rows in _read(subject, chunk, units):
                read[starts[index] : starts[index + 1]] = rows
            cache.keep_array("token-activations", key, read)
            found = cache.array("token-activations", key, mapped=True)
            if found is None:  # pragma: no cover  (it was just written)
                raise SequenceError(f"{cache.root} does not keep what is written to it")
        parts.append(found)
    return TokenActivations(parts, [len(prompt) for prompt in prompts])


def outputs(
    subject: Subject,
    weight: Float32Array,
    bias: Float32Array,
    units: Units,
    prompts: Sequence[Tokens],
    name: str = "prompts",
) -> list[Float32Array]:
    """What rows of a linear probe give at every token of each prompt: float32 ``[tokens, channels]``.

    ``weight`` ``[channels, features]`` and ``bias`` ``[channels]`` as in ``SequenceScorer``. Raises
    SequenceError.
    """
    refuse_reader(subject)
    rows = hashlib.sha256(np.ascontiguousarray(weight).tobytes() + bias.tobytes()).hexdigest()
    found: list[Float32Array] = []
    for chunk in tqdm(chunks(prompts), f"scores ({name})", disable=not subject.progress):
        key = {**_key(subject, chunk, units), "rows": rows}
        lengths = [len(prompt) for prompt in chunk]
        kept = subject.cache.array("token-outputs", key)
        if kept is None or kept.shape != (sum(lengths), len(weight)):
            each: list[Float32Array] = [np.empty(0, np.float32)] * len(chunk)
            for index, activations in _kept_or_read(subject, chunk, units):
                each[index] = np.asarray(activations @ weight.T + bias, dtype=np.float32)
            kept = np.concatenate(each)
            subject.cache.keep_array("token-outputs", key, kept)
        found += np.split(kept, np.cumsum(lengths)[:-1])
    return found


def logits_of(
    subject: Subject,
    probe: Scorer | SequenceScorer,
    units: Units,
    prompts: Sequence[Tokens],
    name: str = "prompts",
) -> Float32Array:
    """Raw logits ``[n]`` of prompts by either kind of probe. Raises SequenceError."""
    if isinstance(probe, Scorer):
        return probe.logits(subject.features(prompts, units, name))
    each = outputs(subject, probe.weight, probe.bias, units, prompts, name)
    return np.array([pool(probe.pooling, part) for part in each], dtype=np.float32)


def refuse_reader(subject: Subject) -> None:
    """Raises SequenceError when vLLM runs the model: it hands out activations of the last token only."""
    if subject.reader is not None:
        raise SequenceError(
            "a sequence probe reads every token of a prompt, and --capture engine reads the last one only; "
            "use --capture transformers"
        )


def _kept_or_read(
    subject: Subject, prompts: Sequence[Tokens], units: Units
) -> Iterator[tuple[int, Float32Array]]:
    """What ``token_activations`` has kept, if it has; else the model is run and nothing is kept."""
    kept = subject.cache.array("token-activations", _key(subject, prompts, units), mapped=True)
    if kept is None:
        yield from _read(subject, prompts, units)
    else:
        yield from enumerate(np.split(kept, np.cumsum([len(prompt) for prompt in prompts])[:-1]))


def _read(subject: Subject, prompts: Sequence[Tokens], units: Units) -> Iterator[tuple[int, Float32Array]]:
    for group in batches([len(prompt) for prompt in prompts], tokens=subject.batch_tokens):
        rows = read_every_token(subject.model, units, [prompts[i] for i in group])
        for index, row in zip(group, rows, strict=True):
            yield index, row.float().cpu().numpy()


def _key(subject: Subject, chunk: Sequence[Tokens], units: Units) -> dict[str, Any]:
    return {**subject.feature_key(chunk, units), "tokens": "every"}


def _need_disk(cache: Cache, size: int) -> None:
    root = cache.root
    while root is not None and not root.exists():
        root = root.parent
    if root is not None and shutil.disk_usage(root).free < 2 * size:
        raise SequenceError(
            f"activations of every token do not fit on the disk of {cache.root}; name fewer units or "
            "prompts, or another folder in NEURONGUARD_CACHE"
        )
