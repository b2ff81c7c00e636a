from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.guard import worlds

REFUSAL = "No."


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONGUARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with grouped heads and a tied embedding, in bfloat16 as models are shipped."""
    made = worlds.model(dtype=torch.bfloat16, tie_word_embeddings=True)
    return worlds.checkpoint(tmp_path_factory.mktemp("tune") / "model", made)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve requests of each kind: the harmful ones lack a response, the benign ones have one."""
    texts = worlds.texts(24, seed=3, words=2)
    rows = [{"prompt": text, "label": "harmful"} for text in texts[:12]]
    rows += [{"prompt": text, "label": "benign", "response": f"Yes {text[:3]}"} for text in texts[12:]]
    return worlds.write_rows(tmp_path_factory.mktemp("tune-data") / "rows.jsonl", rows)
