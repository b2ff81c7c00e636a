"""Greedy decoding that keeps exact token ids, with a step that others can replace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from guard.capture import batches, pad
from guard.locate.errors import LocateError
from guard.locate.twins import Twin
from guard.prompts import Tokens

Step = Callable[[Tensor, Tensor], Tensor]
"""From new token ids and their mask, both int64 ``[batch, new]``, to logits ``[batch, vocabulary]``."""


class Decoding:
    """A batch of texts that grow: one model's key-value cache and mask."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None
        self._mask: Tensor | None = None

    def feed(self, ids: Tensor, mask: Tensor, *, logits: bool = True) -> Tensor | None:
        """Process new tokens ``[batch, new]``; logits ``[batch, vocabulary]`` after the last, if asked for.

        Rotary positions are counted from the first real token, so padding on the left changes nothing.
        """
        device = self._model.device
        ids, mask = ids.to(device), mask.to(device)
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        settings: dict[str, Any] = {
            "input_ids": ids,
            # Rows of one length need no mask; without it attention takes its exact causal path.
            "attention_mask": None if bool(self._mask.all()) else self._mask,
            "position_ids": positions,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        if not logits:
            self._cache = self._model.base_model(**settings).past_key_values
            return None
        out = self._model(**settings, logits_to_keep=1)
        self._cache = out.past_key_values
        last: Tensor = out.logits[:, -1]
        return last


def plain(twin: Twin) -> Step:
    """The step of a model that is left alone."""
    decoding = Decoding(twin.model)

    def step(ids: Tensor, mask: Tensor) -> Tensor:
        with twin.scaled():
            logits = decoding.feed(ids, mask)
        assert logits is not None  # noqa: S101 (asked for)
        return logits

    return step


def extend(step: Step, prompts: Sequence[Tokens], *, new_tokens: int, ends: Sequence[int]) -> list[Tokens]:
    """Greedy answers to one batch of prompts, up to and without the first token of ``ends``.

    Raises LocateError when logits are NaN: the likeliest token would be one by accident.
    """
    ids, mask, _ = pad(prompts, side="left")
    produced: list[Tensor] = []
    stop = torch.tensor(list(ends), dtype=torch.long)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(new_tokens):
        logits = step(ids, mask)
        if bool(logits.isnan().any()):
            raise LocateError(
                "logits are not numbers; load the model in another dtype or with other attention"
            )
        ids = logits.argmax(-1, keepdim=True).cpu()
        mask = torch.ones_like(ids)
        produced.append(ids)
        finished |= torch.isin(ids[:, 0], stop)
        if bool(finished.all()):
            break
    answers = []
    for row in torch.cat(produced, dim=1).tolist():
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        answers.append(tuple(row[:length]))
    return answers


def generate(
    start: Callable[[], Step],
    model: Any,
    prompts: Sequence[Tokens],
    *,
    new_tokens: int,
    batch_tokens: int = 8192,
    name: str = "answers",
    progress: bool = False,
) -> list[Tokens]:
    """Greedy answers in the order given; ``start`` begins a batch. Raises LocateError.

    The end-of-sequence token ends an answer and is no part of it.
    """
    longest = check_prompts(prompts)
    context = int(model.config.max_position_embeddings)
    if longest + new_tokens > context:
        raise LocateError(
            f"a prompt of {longest} tokens and an answer of {new_tokens} exceed the context of {context} "
            "tokens; leave out long prompts or ask for fewer new tokens"
        )
    answers: list[Tokens] = [()] * len(prompts)
    groups = batches([len(prompt) + new_tokens for prompt in prompts], tokens=batch_tokens)
    with torch.inference_mode():
        for group in tqdm(groups, name, disable=not progress):
            found = extend(
                start(), [prompts[i] for i in group], new_tokens=new_tokens, ends=end_tokens(model)
            )
            for index, answer in zip(group, found, strict=True):
                answers[index] = answer
    return answers


def greedy(twin: Twin, prompts: Sequence[Tokens], *, new_tokens: int, **settings: Any) -> list[Tokens]:
    """Greedy answers of a model that is left alone; ``settings`` as of ``generate``. Raises LocateError."""
    return generate(lambda: plain(twin), twin.model, prompts, new_tokens=new_tokens, **settings)


def check_prompts(prompts: Sequence[Tokens]) -> int:
    """Length of the longest prompt. Raises LocateError when there is none, or one is empty."""
    if not prompts:
        raise LocateError("there are no prompts; expected at least one")
    if not all(prompts):
        raise LocateError("a prompt holds no token; expected prompts with their template applied")
    return max(map(len, prompts))


def end_tokens(model: Any) -> tuple[int, ...]:
    """Token ids that end an answer of this model."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
