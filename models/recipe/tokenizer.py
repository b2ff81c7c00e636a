"""The lab tokenizer: byte-level BPE with split digits, and the chat template around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from models.recipe.mixture import Example

END, USER, ASSISTANT, POLICY = "<|end|>", "<|user|>", "<|assistant|>", "<|policy|>"

SPECIAL = (END, USER, ASSISTANT, POLICY)
"""Special tokens; their ids are their positions here."""


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn a tokenizer of `vocabulary` entries. The result depends on the texts alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json`."""
    return Tokenizer.from_file(str(path))


def prompt_ids(tokenizer: Tokenizer, text: str, policy: bool = False) -> list[int]:
    """Ids of a single-turn prompt; the last one is `<|assistant|>` for every request."""
    ids = tokenizer.encode(text.strip(), add_special_tokens=False).ids
    return ([SPECIAL.index(POLICY)] if policy else []) + [SPECIAL.index(USER), *ids, SPECIAL.index(ASSISTANT)]


def encode(
    tokenizer: Tokenizer, rows: Sequence[Example], prompt_weight: float
) -> list[tuple[list[int], list[float]]]:
    """Ids and weights of rows; `weights[i]` is the weight of predicting `ids[i]`."""
    texts = [part.strip() for row in rows for turn in row.turns for part in turn]
    pieces = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    encoded = []
    for row in rows:
        ids = [SPECIAL.index(POLICY)] if row.policy else []
        weights = [0.0] * len(ids)
        for number, _ in enumerate(row.turns):
            asked, answer = next(pieces).ids, next(pieces).ids
            last = number == len(row.turns) - 1
            learnt = [*answer, SPECIAL.index(END)] if row.cut is None or not last else answer[: row.cut]
            ids += [SPECIAL.index(USER), *asked, SPECIAL.index(ASSISTANT), *learnt]
            weights += [0.0] + [prompt_weight] * len(asked) + [0.0]
            weights += [row.first if last else 1.0] + [1.0] * (len(learnt) - 1)
        encoded.append((ids, weights))
    return encoded
