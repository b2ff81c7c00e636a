"""``neuronguard verify --model``: everything that binds a bundle to its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.bundle import Bundle
from guard.checkpoint import Checkpoint
from guard.prompts import encode, prompt_tails
from guard.scorer import Scorer
from guard.verification import verify_bundle
from tests.guard import worlds
from tests.guard.test_verification import sound


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("model") / "m", worlds.model())


def fitting(model: Path, **changes: Any) -> dict[str, Any]:
    """What a card says of ``model``, with changes."""
    checkpoint = Checkpoint.open(model)
    tokenizer = checkpoint.load_tokenizer()
    prompts = [encode(tokenizer, [{"role": "user", "content": text}]) for text in ("a", "b")]
    return {
        "model": {**checkpoint.card().model_dump(), **changes},
        "prompt_tails": prompt_tails(tokenizer),
        "self_test": {
            "prompts": prompts,
            "logits": {"float32": [0.25, 1.5]},
            "tolerance": {"float32": 0.001},
        },
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"weights_sha256": "9" * 64}, "weights digest is"),
        ({"tokenizer_sha256": "9" * 64}, "tokenizer and chat template digest is"),
        ({"layers": 4}, "shape is"),
        ({"prompt_tails": [[0, 1]]}, "the template ends prompts in"),
        ({"token": 9999}, "the self-test holds token 9999"),
    ],
)
def test_a_model_is_compared_in_all_that_a_bundle_is_bound_to(
    tmp_path: Path, model: Path, changes: dict[str, Any], words: str | None
) -> None:
    about = {key: value for key, value in changes.items() if key not in ("prompt_tails", "token")}
    document = fitting(model, **about)
    if tails := changes.get("prompt_tails"):
        document["prompt_tails"] = tails
    if token := changes.get("token"):
        document["self_test"]["prompts"] = [[token, *p] for p in document["self_test"]["prompts"]]
    card = sound(**document)
    scorer = Scorer.linear(np.linspace(-1, 1, card.features, dtype=np.float32), 0.5)
    directory = Bundle(card, scorer).save(tmp_path / "b")
    checks = {c.name: c for c in verify_bundle(directory, checkpoint=lambda: Checkpoint.open(model))}
    assert checks["model"].outcome == ("failed" if words else "passed")
    assert words is None or words in checks["model"].text
