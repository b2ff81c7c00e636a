"""What the blocks of a model get for prompts of one length, without running any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guard.locate.blocks import idle
from guard.locate.errors import LocateError
from guard.prompts import Tokens


@dataclass
class Bucket:
    """Prompts of one length."""

    index: list[int]
    """Their places in the list of prompts."""
    entry: Tensor
    """What the first block gets, ``[rows, tokens, width]``."""
    arguments: list[dict[str, Any]]
    """What else each block gets, made for one row and the same for every other."""


@torch.inference_mode()
def recorded(model: Any, blocks: Sequence[Any], prompts: Sequence[Tokens], batch_tokens: int) -> list[Bucket]:
    """All prompts by length, the shortest first, at most about ``batch_tokens`` tokens in a bucket.

    Raises LocateError when the model does not call ``blocks`` once each.
    """
    found = []
    for index in _same_length(prompts, batch_tokens):
        ids = torch.tensor([prompts[i] for i in index], device=model.device)
        entry, _ = _record(model, blocks, ids)
        found.append(Bucket(index, entry, _record(model, blocks, ids[:1])[1]))
    return found


def _record(model: Any, blocks: Sequence[Any], ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
    """The first block's input and all blocks' other arguments in a pass in which no block does anything."""
    inputs: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def hook(_block: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.extend(args[:1] if not inputs else ())
        arguments.append(kwargs)

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            stack.enter_context(idle(block))
        model.base_model(input_ids=ids, use_cache=False)
    if len(arguments) != len(blocks) or not inputs:
        raise LocateError("the model does not call its decoder blocks once each, in order")
    return inputs[0], arguments


def _same_length(prompts: Sequence[Tokens], tokens: int) -> Iterator[list[int]]:
    """Places of prompts of one length, at most about ``tokens`` tokens together."""
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    for length, places in sorted(by_length.items()):
        rows = max(1, tokens // length)
        for start in range(0, len(places), rows):
            yield places[start : start + rows]
