"""Whole prompts read by transformers: as if each had been alone, from disk, and no more than is needed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from guard.cache import Cache
from guard.capture import read_every_token, read_prompts
from guard.checkpoint import Checkpoint
from guard.observe import Subject
from guard.pooling import Pooling
from guard.prompts import Tokens
from guard.scorer import Scorer
from guard.sequence import SequenceScorer
from guard.sequence_scores import SequenceError, logits_of, outputs, token_activations
from guard.units import Units, every_unit
from tests.guard import worlds

PROMPTS: list[Tokens] = [tuple(range(5, 5 + n)) for n in (1, 9, 30, 4, 17)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.checkpoint(tmp_path_factory.mktemp("model"), worlds.model(num_hidden_layers=2))


@pytest.fixture
def subject(path: Path, tmp_path: Path) -> Subject:
    return Subject(Checkpoint.open(path), Cache(tmp_path / "cache"))


@pytest.fixture
def units(subject: Subject) -> Units:
    return every_unit(subject.checkpoint.shape, ("mlp", "attention"))


def test_every_token_is_read_as_if_its_prompt_were_alone(subject: Subject, units: Units) -> None:
    together = read_every_token(subject.model, units, PROMPTS)
    for prompt, rows in zip(PROMPTS, together, strict=True):
        (alone,) = read_every_token(subject.model, units, [prompt])
        assert rows.shape == (len(prompt), subject.width(units))
        assert torch.allclose(rows, alone, atol=1e-5)
        # The last row is what a probe of the last token reads.
        assert alone[-1].numpy() == pytest.approx(read_prompts(subject.model, units, [prompt])[0], abs=1e-5)
        if len(prompt) > 4:
            (start,) = read_every_token(subject.model, units, [prompt[:4]])
            assert torch.allclose(alone[:4], start, atol=1e-5)


def test_activations_lie_on_disk_and_are_not_read_twice(
    subject: Subject, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = token_activations(subject, PROMPTS, units)
    monkeypatch.delattr("guard.sequence_scores.read_every_token")
    again = token_activations(subject, PROMPTS, units)
    assert all(isinstance(block, np.memmap) for block in again.blocks())
    assert again.lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    for index in range(len(PROMPTS)):
        assert np.array_equal(first.prompt(index), again.prompt(index))
    # A probe is applied to what is there.
    row = np.ones((1, again.features), np.float32)
    found = outputs(subject, row, np.zeros(1, np.float32), units, PROMPTS)
    assert found[2][:, 0] == pytest.approx(again.prompt(2).sum(axis=1), rel=1e-4, abs=1e-4)


def test_without_a_cache_a_temporary_folder_holds_them(
    path: Path, units: Units, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subject = Subject(Checkpoint.open(path), Cache(None))
    found = token_activations(subject, PROMPTS, units)
    expected = read_every_token(subject.model, units, [PROMPTS[1]])[0].numpy()
    assert found.prompt(1) == pytest.approx(expected, abs=1e-5)
    assert list(tmp_path.glob("neuronguard-*"))
    del found
    assert not list(tmp_path.glob("neuronguard-*"))
    monkeypatch.setattr("guard.sequence_scores.read_every_token", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_activations(subject, PROMPTS, units)
    assert not list(tmp_path.glob("neuronguard-*"))


def test_another_probe_is_another_entry_of_the_cache(subject: Subject, units: Units) -> None:
    width = subject.width(units)
    bias = np.zeros(1, np.float32)
    one = outputs(subject, np.ones((1, width), np.float32), bias, units, PROMPTS)
    two = outputs(subject, np.full((1, width), 2.0, np.float32), bias, units, PROMPTS)
    shifted = outputs(subject, np.ones((1, width), np.float32), bias + 1, units, PROMPTS)
    for a, b, c in zip(one, two, shifted, strict=True):
        assert b == pytest.approx(2 * a, rel=1e-5)
        assert c == pytest.approx(a + 1, rel=1e-5, abs=1e-5)


def test_either_kind_of_probe_scores_prompts(subject: Subject, units: Units) -> None:
    random = np.random.default_rng(0)
    width = subject.width(units)
    weight, bias = random.normal(size=(1, width)).astype(np.float32), np.array([0.5], np.float32)
    last = logits_of(subject, Scorer(weight, bias), units, PROMPTS)
    probe = SequenceScorer(Pooling(kind="rolling", window=3), weight, bias)
    most = logits_of(subject, probe, units, PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        rows = read_every_token(subject.model, units, [prompt])[0].numpy()
        z = probe.outputs(rows)[:, 0]
        assert last[index] == pytest.approx(z[-1], rel=1e-4, abs=1e-4)
        means = [z[max(0, i - 2) : i + 1].mean() for i in range(min(3, len(z)) - 1, len(z))]
        assert most[index] == pytest.approx(max(means), rel=1e-4, abs=1e-4)


def test_an_engine_as_reader_is_refused_by_name(subject: Subject, units: Units) -> None:
    subject.reader = object()  # type: ignore[assignment]
    with pytest.raises(SequenceError, match="--capture engine reads the last one only"):
        token_activations(subject, PROMPTS, units)
    with pytest.raises(SequenceError, match="use --capture transformers"):
        outputs(subject, np.ones((1, 1), np.float32), np.zeros(1, np.float32), units, PROMPTS)


def test_a_disk_that_is_too_small_is_noticed_before_the_model_runs(
    subject: Subject, units: Units, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("guard.sequence_scores.shutil.disk_usage", lambda _: Full)
    monkeypatch.delattr("guard.sequence_scores.read_every_token")
    with pytest.raises(SequenceError, match="do not fit on the disk"):
        token_activations(subject, PROMPTS, units)
