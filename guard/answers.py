"""The model's own greedy answers, as long as a refusal needs to show itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from guard.capture import batches, pad


def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int = 28, tokens: int = 8192
) -> list[str]:
    """Greedy continuations of token-id prompts as text, in the order given; special tokens are left out."""
    texts = [""] * len(prompts)
    for group, produced in _generated(model, tokenizer, prompts, new_tokens, tokens):
        decoded = tokenizer.batch_decode(produced, skip_special_tokens=True)
        for index, text in zip(group, decoded, strict=True):
            texts[index] = text
    return texts


def answer_tokens(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int, tokens: int = 8192
) -> list[tuple[int, ...]]:
    """Token ids of greedy continuations; the one that ends an answer is its last, if it ended."""
    found: list[tuple[int, ...]] = [()] * len(prompts)
    said = model.generation_config.eos_token_id
    ends = [] if said is None else [said] if isinstance(said, int) else said
    for group, produced in _generated(model, tokenizer, prompts, new_tokens, tokens):
        for index, row in zip(group, produced.tolist(), strict=True):
            last = next((i for i, token in enumerate(row) if token in ends), len(row))
            found[index] = tuple(row[: last + 1])
    return found


@torch.inference_mode()
def _generated(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, tokens: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Indices and new token ids ``[rows, new]`` of each batch.

    Rows are padded on the left, so that all of a batch go on at the same column.
    """
    # Whatever stands in the padding is masked; the model's own choice avoids a needless embedding row.
    pad_token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for group in batches([len(prompt) + new_tokens for prompt in prompts], tokens=tokens):
        ids, mask, _ = pad([prompts[i] for i in group], side="left", pad_token=pad_token)
        produced = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=pad_token,
        )
        yield group, produced[:, ids.shape[1] :]
