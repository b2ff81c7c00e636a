"""Activations and answers by a real vLLM: the same as those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from guard.answers import answer
from guard.bundle import Site
from guard.cache import Cache
from guard.capture import read_prompts
from guard.checkpoint import Checkpoint
from guard.data import Dataset, Prompt
from guard.evaluation import evaluate_bundle
from guard.observe import Subject
from guard.prompts import encode
from guard.protocol_baselines import TRANSFORMERS, baselines
from guard.resample import Bootstrap
from tests.e2e.inprocess import SETTINGS
from tests.guard import worlds

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
UNITS = (
    Site(layer=0, kind="mlp", units=(0, 3, 17, 47)),
    Site(layer=1, kind="attention", units=(1, 3)),
    Site(layer=2, kind="mlp", units=tuple(range(48))),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("reader") / "model"
    # vLLM's CPU attention wants heads of 32 columns at least.
    return Checkpoint.open(worlds.checkpoint(path, worlds.model(head_dim=32)))


@pytest.fixture(scope="module")
def reader(checkpoint: Checkpoint) -> Iterator[Any]:
    from guard.engine.reader import EngineReader

    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        # Small steps: prompts are cut into chunks, and only the last one ends in their final token.
        options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "num_gpu_blocks_override": 40}
        made = EngineReader(checkpoint, "float32", options={**options, "block_size": 32})
        made.expect(UNITS)
        yield made
        made.close()


def prompts(number: int, words: int = 4) -> list[tuple[int, ...]]:
    return [
        encode(worlds.tokenizer(), [{"role": "user", "content": text}])
        for text in worlds.texts(number, seed=9, words=words)
    ]


def test_features_are_those_of_transformers_in_float32(checkpoint: Checkpoint, reader: Any) -> None:
    asked = prompts(20) + prompts(5, words=25)
    expected = read_prompts(checkpoint.load_model(), UNITS, asked)
    found = reader.features(UNITS, asked)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.abs(expected).max() > 1  # so that a thousandth is a small difference


def test_answers_are_those_of_transformers(checkpoint: Checkpoint, reader: Any) -> None:
    asked, tokenizer = prompts(6), worlds.tokenizer()
    expected = answer(checkpoint.load_model(), tokenizer, asked, new_tokens=8)
    assert reader.answers(asked, 8, tokenizer) == expected
    # What was read on the way is not taken for the next prompts' features.
    other = prompts(9)[6:]
    np.testing.assert_allclose(
        reader.features(UNITS, other), read_prompts(checkpoint.load_model(), UNITS, other), atol=1e-3
    )


def test_an_evaluation_by_the_engine_is_that_by_transformers(checkpoint: Checkpoint, reader: Any) -> None:
    texts = worlds.texts(24, seed=5)
    rows = [Prompt((("user", text),), "harmful" if i % 2 else "benign", "s") for i, text in enumerate(texts)]
    sites = [site.model_dump() for site in UNITS]
    bundle = worlds.bundle(model=checkpoint.card().model_dump(), sites=sites)
    found = [
        evaluate_bundle(
            bundle,
            Subject(checkpoint, Cache(None), reader=chosen),
            Dataset("evaluate", tuple(rows), (), {}),
            answers=False,
            bootstrap=Bootstrap(100),
        )
        for chosen in (None, reader)
    ]
    np.testing.assert_allclose(found[1].scored.scores, found[0].scored.scores, atol=1e-2)
    assert found[1].document["overall"]["auroc"] == found[0].document["overall"]["auroc"]
    assert baselines(bundle, Subject(checkpoint, Cache(None), reader=reader)).keys().isdisjoint(TRANSFORMERS)


def test_a_prompt_that_was_seen_before_is_read_again(reader: Any) -> None:
    asked = prompts(3, words=20)
    first = reader.features(UNITS, asked)
    np.testing.assert_allclose(reader.features(UNITS, [*asked, asked[0]]), first[[0, 1, 2, 0]], atol=1e-4)
    # Nothing is kept once it was handed over.
    assert [recorded.rows for recorded in reader._llm.collective_rpc("take_recorded")] == [{}]


def test_an_engine_that_reads_nothing_is_noticed(reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from guard.engine.errors import GuardStartupError

    worker = reader._llm.llm_engine.model_executor.driver_worker.worker
    monkeypatch.setattr(worker.taps, "score", lambda: None)
    with pytest.raises(GuardStartupError, match="did not read every unit"):
        reader.features(UNITS, prompts(2))


def test_an_adapter_is_not_read_by_the_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from guard.adapters import Adapter
    from guard.engine.errors import GuardStartupError
    from guard.engine.reader import EngineReader

    directory = worlds.adapter(tmp_path / "a", worlds.model())
    with pytest.raises(GuardStartupError, match="leave out --capture engine"):
        EngineReader(checkpoint.under(Adapter.open(directory, "tuned")), "float32")
