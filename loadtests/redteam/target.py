"""The guard as an attacker with its weights sees it: text in, logit out, and the gradient behind it.

Attacks that read weights are for measuring how much a guard withstands, so the harness takes none but the lab
models of this repository: models of seven million parameters that know nothing worth getting out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from guard.capture import Float32Array, batches, capture, pad, read_prompts
from guard.checkpoint import Checkpoint
from guard.observe import Subject
from guard.prompts import Tokens, encode, ends_with_tail, prompt_tails
from guard.scorer import Scorer
from guard.units import Units

LAB_WEIGHTS = {
    "lab-partial": "6d62d4bbef38fed30917c14e32947b4f69a5ab846a642fd302a502690517c578",
}
"""SHA-256 of the weights that may be attacked (``guard.digest.weights_digest``), by variant."""

Float64Array = NDArray[np.float64]


class TargetError(ValueError):
    """The model is none that this harness attacks."""


def refuse_others(checkpoint: Checkpoint) -> None:
    """Raises TargetError unless the checkpoint is one of the repository's lab models."""
    if checkpoint.weights_sha256 not in LAB_WEIGHTS.values():
        raise TargetError(
            f"{checkpoint.name} has weights {checkpoint.weights_sha256[:12]}, which is no lab model of this "
            f"repository; expected {', '.join(LAB_WEIGHTS)}. The attacks measure the lab guard and are made "
            "for nothing else"
        )


@dataclass(frozen=True)
class Target:
    """A model and the probe that reads it."""

    model: Any
    """In transformers, without gradients on its weights."""
    tokenizer: Any
    sites: Units
    probe: Scorer
    longest: int
    """Most tokens of a prompt."""
    read: Callable[[Sequence[Tokens]], Float32Array] | None = None
    """Activations of prompts ``[n, features]`` where they are kept; None: the model is run."""

    @classmethod
    def of(cls, subject: Subject, sites: Units, probe: Scorer) -> Target:
        """A lab model under observation. Raises TargetError for any other."""
        refuse_others(subject.checkpoint)
        longest = subject.checkpoint.context - subject.new_tokens
        return cls(
            subject.model,
            subject.tokenizer,
            sites,
            probe,
            longest,
            lambda prompts: subject.features(prompts, sites, "attacked"),
        )

    def under(self, probe: Scorer) -> Target:
        """The same model behind another probe."""
        return replace(self, probe=probe)

    @cached_property
    def tails(self) -> tuple[Tokens, ...]:
        """How prompts end."""
        return prompt_tails(self.tokenizer)

    def encode(self, text: str) -> Tokens:
        """Token ids of one user turn, as a chat endpoint makes them."""
        return encode(self.tokenizer, [{"role": "user", "content": text}])

    def fits(self, tokens: Tokens) -> bool:
        """Whether the guard would score it: the context holds it and it ends as it should."""
        return len(tokens) <= self.longest and ends_with_tail(tokens, self.tails)

    def features(self, texts: Sequence[str]) -> Float32Array:
        """Activations ``[n, features]``, NaN for a text that the context cannot hold."""
        tokens = [self.encode(text) for text in texts]
        held = np.array([self.fits(each) for each in tokens], dtype=bool)
        found = np.full((len(texts), self.probe.features), np.nan, dtype=np.float32)
        kept = [each for each, fit in zip(tokens, held, strict=True) if fit]
        if kept:
            found[held] = self.read(kept) if self.read else read_prompts(self.model, self.sites, kept)
        return found

    def logits(self, prompts: Sequence[Tokens]) -> Float64Array:
        """Logits ``[n]`` of token ids; nothing is kept."""
        if not prompts:
            return np.empty(0)
        return self.probe.logits(read_prompts(self.model, self.sites, prompts)).astype(np.float64)

    def gradients(self, prompts: Sequence[Tokens], starts: Sequence[int], length: int) -> Tensor:
        """The logit's slope by every token at ``length`` places from ``starts``, ``[n, length, vocabulary]``.

        Of the one-hot rows, as in GCG (Zou et al., arXiv 2307.15043, section 2.2). Raises TargetError for a
        probe that is not linear.
        """
        if self.probe.kind != "linear":
            raise TargetError(f"gradients are taken of linear probes, this one is {self.probe.kind}")
        weight = torch.from_numpy(self.probe.weight[0])
        table = self.model.get_input_embeddings().weight
        out = torch.empty(len(prompts), length, len(table))
        for group in batches([len(prompt) for prompt in prompts], rows=32):
            ids, mask, last = pad([prompts[i] for i in group])
            embedded = table[ids].detach().requires_grad_(True)
            with torch.enable_grad(), capture(self.model, self.sites, last) as captured:
                self.model.base_model(
                    inputs_embeds=embedded,
                    attention_mask=None if bool(mask.all()) else mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                )
                (captured.features().float() @ weight).sum().backward()
            assert embedded.grad is not None
            for row, index in enumerate(group):
                here = embedded.grad[row, starts[index] : starts[index] + length]
                out[index] = (here @ table.T).float()
        return out
