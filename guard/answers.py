"""The model's own greedy answers, as long as a refusal needs to show itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from guard.capture import batches, pad


@torch.inference_mode()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, new_tokens: int = 28, tokens: int = 8192
) -> list[str]:
    """Greedy continuations of token-id prompts as text, in the order given; special tokens are left out.

    Rows are padded on the left, so that all of a batch go on at the same column.
    """
    texts = [""] * len(prompts)
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
        decoded = tokenizer.batch_decode(produced[:, ids.shape[1] :], skip_special_tokens=True)
        for index, text in zip(group, decoded, strict=True):
            texts[index] = text
    return texts
