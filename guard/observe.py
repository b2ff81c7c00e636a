"""Run prompts through a model and keep what it did: token ids, answers, activations.

Work is cut into chunks that are cached one by one, so that an interrupted run resumes and a changed data set
recomputes only what changed. The model is loaded only when a chunk is missing.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from tqdm import tqdm

from guard.answers import answer
from guard.cache import Cache, digest_of
from guard.capture import Float32Array, read_prompts
from guard.checkpoint import Checkpoint
from guard.data import Dataset, Prompt
from guard.judge import is_refusal
from guard.judgements import Judgements, JudgementsError
from guard.prompts import Tokens, encode, ends_with_tail, prompt_tails
from guard.units import Units

logger = logging.getLogger(__name__)
_CHUNK = 256


@dataclass(frozen=True)
class Observations:
    """What a model did with the prompts of one role. All arrays have one entry a prompt."""

    prompts: tuple[Prompt, ...]
    tokens: tuple[Tokens, ...]
    refused: NDArray[np.bool_]
    """Whether the model's own answer is a refusal, or, where judgements label harmful prompts, safe."""
    too_long: int
    """Prompts left out because the model's context cannot hold them."""
    not_judged: int = 0
    """Harmful prompts left out because the judgements that label them say nothing of the answer."""

    @cached_property
    def harmful(self) -> NDArray[np.bool_]:
        """Whether the request is harmful, by its data set's label."""
        return np.array([prompt.label == "harmful" for prompt in self.prompts], dtype=bool)

    @property
    def unsafe(self) -> NDArray[np.bool_]:
        """Whether the answer is unsafe: a harmful request that the model did not refuse."""
        return self.harmful & ~self.refused

    def target(self, label: str) -> NDArray[np.bool_]:
        """The positives of a bundle's label."""
        return self.unsafe if label == "unsafe_output" else self.harmful

    @cached_property
    def sources(self) -> NDArray[np.str_]:
        """Source names."""
        return np.array([prompt.source for prompt in self.prompts], dtype=np.str_)


Judged = Literal["all", "harmful", "none"]


class Reader(Protocol):
    """What else than transformers may run the model: ``guard.engine.reader.EngineReader``."""

    @property
    def identity(self) -> dict[str, Any]:
        """What, besides the model, its results depend on."""

    def expect(self, units: Units) -> None:
        """Name the units that will be read."""

    def answers(self, prompts: Sequence[Tokens], new_tokens: int, tokenizer: Any) -> list[str]:
        """Greedy answers, in order."""

    def features(self, units: Units, prompts: Sequence[Tokens]) -> Float32Array:
        """Activations float32 ``[n, features]`` at the last prompt token."""

    def close(self) -> None:
        """Free the model."""


class Subject:
    """A model under observation."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cache: Cache,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        new_tokens: int = 28,
        batch_tokens: int = 8192,
        progress: bool = False,
        reader: Reader | None = None,
        judgements: Judgements | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.cache = cache
        self.dtype = dtype
        self.device = device
        self.new_tokens = new_tokens
        """Length of the answers that are judged, in tokens."""
        self.batch_tokens = batch_tokens
        self.progress = progress
        self.reader = reader
        """Runs the model in place of transformers."""
        self.judgements = judgements
        """Who says, in place of the refusal matcher, whether answers to harmful prompts are unsafe."""

    @cached_property
    def model(self) -> Any:
        """The loaded model."""
        logger.info("loading %s in %s on %s", self.checkpoint.path, self.dtype, self.device)
        return self.checkpoint.load_model(self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The loaded tokenizer."""
        return self.checkpoint.load_tokenizer()

    @cached_property
    def tails(self) -> tuple[Tokens, ...]:
        """How prompts end, see ``guard.prompts.prompt_tails``."""
        return prompt_tails(self.tokenizer)

    def encoded(self, dataset: Dataset) -> tuple[list[tuple[Prompt, Tokens]], int]:
        """The prompts that fit the context, with their token ids, and how many do not."""
        limit = self.checkpoint.context - self.new_tokens
        encoded = [(prompt, encode(self.tokenizer, prompt.chat())) for prompt in dataset.prompts]
        fitting = [
            (prompt, tokens)
            for prompt, tokens in encoded
            if len(tokens) <= limit and ends_with_tail(tokens, self.tails)
        ]
        return fitting, len(encoded) - len(fitting)

    def observe(self, dataset: Dataset, *, judge: Judged = "all") -> Observations:
        """Tokenise the prompts that fit the context, answer them and judge the answers.

        ``judge`` says for which: benign answers do not enter a fit, and thresholds need no answers at all.
        Prompts that are not judged count as not refused; with ``judgements``, harmful ones that are to be
        judged and of whose answers nothing is said are left out.
        """
        fitting, too_long = self.encoded(dataset)
        prompts, tokens = tuple(p for p, _ in fitting), tuple(t for _, t in fitting)
        refused = np.zeros(len(prompts), dtype=bool)
        asked = [i for i, p in enumerate(prompts) if judge == "all" or judge == p.label]
        answers = self.answers([tokens[i] for i in asked], dataset.role)
        refused[asked] = [is_refusal(text) for text in answers]
        if self.judgements is None:
            return Observations(prompts, tokens, refused, too_long)
        keep = np.ones(len(prompts), dtype=bool)
        for i, text in zip(asked, answers, strict=True):
            if prompts[i].label == "harmful":
                view = self.judgements.view(prompts[i].messages, text)
                refused[i], keep[i] = view == "safe", view is not None
        left = np.flatnonzero(keep).tolist()
        if not keep.all() and not any(prompts[i].label == "harmful" for i in left):
            raise JudgementsError(
                f"{self.judgements.file} says nothing of any answer that {self.checkpoint.name} gives to the "
                f"{dataset.role} prompts; judge the answers that neuronguard answer writes, with the same "
                "--judged-tokens and --dtype"
            )
        return Observations(
            tuple(prompts[i] for i in left),
            tuple(tokens[i] for i in left),
            refused[keep],
            too_long,
            len(prompts) - len(left),
        )

    @property
    def judge(self) -> str:
        """Who says whether an answer is unsafe."""
        return "refusal matcher" if self.judgements is None else self.judgements.judge

    def answers(self, prompts: Sequence[Tokens], name: str = "prompts") -> list[str]:
        """Greedy answers, in order."""
        texts: list[str] = []
        for chunk in tqdm(chunks(prompts), f"answers ({name})", disable=not self.progress):
            key = self.answer_key(chunk)
            found = self.cache.texts("answers", key)
            if found is None or len(found) != len(chunk):
                found = self._answer(chunk)
                self.cache.keep_texts("answers", key, found)
            texts += found
        return texts

    def features(self, prompts: Sequence[Tokens], units: Units, name: str = "prompts") -> Float32Array:
        """Activations float32 ``[n, features]`` of ``units`` at the last prompt token."""
        width = self.width(units)
        # Filled in place: two copies of the largest array would double the peak of memory.
        result = np.empty((len(prompts), width), dtype=np.float32)
        start = 0
        for chunk in tqdm(chunks(prompts), f"activations ({name})", disable=not self.progress):
            key = self.feature_key(chunk, units)
            found = self.cache.array("activations", key)
            if found is None or found.shape != (len(chunk), width):
                found = self._read(chunk, units)
                self.cache.keep_array("activations", key, found)
            result[start : start + len(chunk)] = found
            start += len(chunk)
        return result

    def width(self, units: Units) -> int:
        """Activations that ``units`` are."""
        shape = self.checkpoint.shape
        return sum(len(shape.columns(site.kind, site.units)) for site in units)

    def unanswered(self, prompts: Sequence[Tokens]) -> list[Tokens]:
        """The prompts whose answers are not in the cache."""
        return self._absent(
            prompts, lambda chunk: self.cache.path("answers", self.answer_key(chunk), ".json")
        )

    def unread(self, prompts: Sequence[Tokens], units: Units) -> list[Tokens]:
        """The prompts whose activations are not in the cache."""
        return self._absent(
            prompts, lambda chunk: self.cache.path("activations", self.feature_key(chunk, units), ".npy")
        )

    def _absent(
        self, prompts: Sequence[Tokens], path: Callable[[Sequence[Tokens]], Path | None]
    ) -> list[Tokens]:
        return [
            prompt
            for chunk in chunks(prompts)
            if (entry := path(chunk)) is None or not entry.is_file()
            for prompt in chunk
        ]

    def _answer(self, chunk: Sequence[Tokens]) -> list[str]:
        if self.reader is not None:
            return self.reader.answers(chunk, self.new_tokens, self.tokenizer)
        return answer(self.model, self.tokenizer, chunk, new_tokens=self.new_tokens, tokens=self.batch_tokens)

    def _read(self, chunk: Sequence[Tokens], units: Units) -> Float32Array:
        if self.reader is not None:
            return self.reader.features(units, chunk)
        return read_prompts(self.model, units, chunk, tokens=self.batch_tokens)

    def answer_key(self, chunk: Sequence[Tokens], new_tokens: int | None = None) -> dict[str, Any]:
        """What answers depend on, of the judged length unless another is given."""
        return self._key(chunk, new_tokens=self.new_tokens if new_tokens is None else new_tokens)

    def feature_key(self, chunk: Sequence[Tokens], units: Units) -> dict[str, Any]:
        """What activations at the last token depend on."""
        return self._key(chunk, sites=digest_of([site.model_dump(mode="json") for site in units]))

    def _key(self, chunk: Sequence[Tokens], **settings: Any) -> dict[str, Any]:
        """Everything a result depends on. Batch sizes are left out: they change results by rounding only."""
        return {
            "weights": self.checkpoint.weights_sha256,
            "tokenizer": self.checkpoint.tokenizer_sha256,
            # Left out, not empty, where there is none: results that were kept before are found again.
            **({"adapter": adapter.sha256} if (adapter := self.checkpoint.adapter) else {}),
            **({"capture": self.reader.identity} if self.reader is not None else {}),
            "dtype": self.dtype,
            "device": self.device,
            "versions": [torch.__version__, transformers.__version__],
            "prompts": chunk,
            **settings,
        }


def chunks(prompts: Sequence[Tokens]) -> list[Sequence[Tokens]]:
    """Cut a list into pieces of about 256 prompts at places that depend on the prompts themselves.

    An inserted or removed prompt therefore changes one chunk, and the others are found in the cache.
    """
    cuts = [0]
    for index, prompt in enumerate(prompts):
        here = zlib.crc32(repr(prompt).encode()) % _CHUNK == 0
        if index + 1 < len(prompts) and (here or index + 1 - cuts[-1] >= 4 * _CHUNK):
            cuts.append(index + 1)
    return [prompts[a:b] for a, b in zip(cuts, [*cuts[1:], len(prompts)], strict=True) if b > a]
