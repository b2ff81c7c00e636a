"""A bundle fitted on what vLLM itself reads is served by vLLM, and decides as its thresholds say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.bundle import Bundle
from guard.checkpoint import Checkpoint
from tests.e2e import inprocess
from tests.guard import worlds
from tests.guard.test_cli import run

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("fit-engine")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in inprocess.SETTINGS.items():
            patch.setenv(name, value)
        patch.setenv("NEURONGUARD_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def planted(home: Path) -> worlds.Planted:
    # vLLM's CPU attention wants heads of 32 columns at least.
    return worlds.planted(home / "world", head_dim=32)


@pytest.fixture(scope="module")
def bundle(home: Path, planted: worlds.Planted) -> Path:
    """Fitted in bfloat16, a dtype whose rounding transformers does not share with vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "load_model", lambda *_: pytest.fail("transformers loaded the model"))
        result = run(
            "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
            "--units", planted.neurons, "--label", "harmful_prompt", "--rate", 0.01, "--out", home / "bundle",
            "--capture", "engine", "--dtype", "bfloat16", "--engine-option", "num_gpu_blocks_override=100",
            "--engine-option", "block_size=32",
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return home / "bundle"


def test_the_card_says_what_read_the_model_and_tests_itself_in_that_dtype(bundle: Path) -> None:
    card = Bundle.load(bundle).card
    assert card.created["capture"] == "engine"
    assert list(card.self_test.logits) == ["bfloat16"]
    assert card.metrics["fit"]["sources_left_out"]["mean_auroc"] > 0.95


def test_the_bundle_is_served_and_flags_as_its_threshold_says(bundle: Path, planted: worlds.Planted) -> None:
    from guard.engine.selftest import run as self_test

    loaded = Bundle.load(bundle)
    llm = inprocess.guarded(planted.model, bundle, dtype="bfloat16", max_model_len=256)
    try:
        self_test(llm, loaded.card.self_test.prompts)
        rows = [json.loads(line) for line in planted.evaluation.read_text().splitlines()][:60]
        from guard.prompts import encode

        prompts = [
            list(encode(worlds.tokenizer(), [{"role": "user", "content": row["prompt"]}])) for row in rows
        ]
        answers = inprocess.ask(llm, prompts, inprocess.sampling(max_tokens=1))
    finally:
        inprocess.shut_down(llm)
    threshold = loaded.card.thresholds[0]
    for answer in answers:
        assert (answer.verdict.action == "refuse") == (answer.verdict.logit >= threshold.logit)
    harmful = [
        a.verdict.action == "refuse" for a, r in zip(answers, rows, strict=True) if r["label"] == "harmful"
    ]
    benign = [
        a.verdict.action == "refuse" for a, r in zip(answers, rows, strict=True) if r["label"] == "benign"
    ]
    assert sum(harmful) / len(harmful) > 0.5
    assert sum(benign) <= 2


def test_a_second_fit_starts_no_engine(
    home: Path, planted: worlds.Planted, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guard.engine.reader import EngineReader

    monkeypatch.setattr(EngineReader, "_start", lambda *_: pytest.fail("vLLM was started"))
    result = run(
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--units", planted.neurons, "--label", "harmful_prompt", "--rate", 0.01, "--out", home / "again",
        "--capture", "engine", "--dtype", "bfloat16", "--engine-option", "num_gpu_blocks_override=100",
        "--engine-option", "block_size=32",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Bundle.load(home / "again").digest == Bundle.load(bundle).digest


def test_what_the_engine_has_read_is_not_taken_for_what_transformers_would(
    planted: worlds.Planted, bundle: Path
) -> None:
    options = (
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--units", planted.neurons, "--label", "harmful_prompt", "--out", bundle.with_name("other"),
        "--dtype", "bfloat16", "--dry-run",
    )  # fmt: skip
    assert "activations of 1000 to read, 0 cached" in run(*options).output
    engine = ("--capture", "engine", "--engine-option", "block_size=32")
    # Another option may make the engine compute otherwise.
    assert "activations of 1000 to read, 0 cached" in run(*options, *engine).output
    same = (*engine, "--engine-option", "num_gpu_blocks_override=100")
    assert "activations of 0 to read, 1000 cached" in run(*options, *same).output


def test_a_vllm_that_does_not_start_ends_in_one_sentence(home: Path, planted: worlds.Planted) -> None:
    result = run(
        "fit", "--model", planted.model, "--data", planted.fit, "--threshold-data", planted.threshold,
        "--units", planted.neurons, "--label", "harmful_prompt", "--out", home / "none", "--no-cache",
        "--capture", "engine", "--engine-option", "max_model_len=9999",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "vLLM does not start on model (its options: --engine-option)" in result.output
    assert not (home / "none").exists()
