"""The two losses, over answers alone: weighted likelihood, and DPO (Rafailov et al., arXiv 2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from guard.capture import batches, pad
from guard.prompts import Tokens
from guard.tune.texts import Text


class Item(NamedTuple):
    """One text and, for DPO, the log-probabilities of its two answers under the model as it was, in nats."""

    text: Text
    reference: tuple[float, float] | None = None


class Collator:
    """Makes a batch: texts padded on the right, which a causal model needs no mask for.

    For DPO the rows with the rejected answers follow those with the preferred ones.
    """

    def __init__(self, first_token: float) -> None:
        self.first_token = first_token

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """``input_ids`` int64, ``weights`` float32 ``[rows, tokens]``; ``reference`` float32 ``[2, items]``.

        A weight is that of predicting the token in its place; ``keep`` says how many last columns have one,
        and the column before them.
        """
        pairs = [(item.text.prompt, item.text.answer) for item in items]
        pairs += [(item.text.prompt, item.text.rejected) for item in items if item.reference]
        ids, _, _ = pad([prompt + answer for prompt, answer in pairs])
        weights = torch.zeros(ids.shape)
        for row, (prompt, answer) in enumerate(pairs):
            weights[row, len(prompt) : len(prompt) + len(answer)] = 1.0
            weights[row, len(prompt)] = self.first_token
        made = {
            "input_ids": ids,
            "weights": weights,
            "keep": ids.shape[1] - min(len(prompt) for prompt, _ in pairs) + 1,
        }
        if items[0].reference:
            made["reference"] = torch.tensor([item.reference for item in items]).T
        return made


def token_nats(model: Any, input_ids: Tensor, keep: int) -> Tensor:
    """Minus log-probability of each of the last ``keep - 1`` tokens, float32 ``[rows, keep - 1]``."""
    logits = model(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()
    targets = input_ids[:, 1 - keep :]
    nats: Tensor = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view_as(targets)


def sft_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Weighted mean of the answers' tokens, in nats."""
    weights: Tensor = batch["weights"][:, 1 - batch["keep"] :]
    nats: Tensor = token_nats(model, batch["input_ids"], batch["keep"]) * weights
    return nats.sum() / weights.sum()


def dpo_loss(model: Any, batch: dict[str, Any], beta: float) -> Tensor:
    """Mean over pairs of −log σ(β (gain of the preferred − gain of the rejected answer))."""
    weights = (batch["weights"][:, 1 - batch["keep"] :] > 0).float()
    total = -(token_nats(model, batch["input_ids"], batch["keep"]) * weights).sum(1)
    preferred, rejected = total.view(2, -1) - batch["reference"]
    return -logsigmoid(beta * (preferred - rejected)).mean()


@torch.no_grad()
def with_reference(model: Any, texts: Sequence[Text]) -> list[Item]:
    """The texts with the log-probabilities of both answers under the model as it is now."""
    pairs: list[tuple[Tokens, Tokens]] = [(t.prompt, t.answer) for t in texts]
    pairs += [(t.prompt, t.rejected) for t in texts]
    found = [0.0] * len(pairs)
    collate = Collator(1.0)
    for group in batches([len(prompt) + len(answer) for prompt, answer in pairs], rows=16):
        batch = collate([Item(Text(*pairs[i])) for i in group])
        nats = token_nats(model, batch["input_ids"].to(model.device), batch["keep"]).cpu()
        sums = (nats * batch["weights"][:, 1 - batch["keep"] :]).sum(1)
        for index, value in zip(group, sums.tolist(), strict=True):
            found[index] = -value
    return [Item(t, (found[i], found[i + len(texts)])) for i, t in enumerate(texts)]
