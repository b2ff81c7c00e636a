"""The losses against their definitions, and against the pooling that they are the twins of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from guard.pooling import Pooling, moving, pool
from guard.sequence_loss import losses, pooled, position_losses, smoothed

KINDS = (
    Pooling(kind="ema", window=64, rate=0.125),
    Pooling(kind="rolling", window=5),
    Pooling(kind="softmax", temperature=0.7),
    Pooling(kind="attention", heads=3),
)
LENGTHS = (1, 3, 7, 90)


def _outputs(channels: int, probes: int = 2) -> tuple[Tensor, list[np.ndarray]]:
    """Padded outputs, and each prompt's own ``[tokens, probes, channels]``; the padding is not zero."""
    random = np.random.default_rng(0)
    each = [random.normal(size=(n, probes, channels)).astype(np.float32) for n in LENGTHS]
    padded = np.full((len(LENGTHS), max(LENGTHS), probes, channels), 50.0, dtype=np.float32)
    for row, part in enumerate(each):
        padded[row, : len(part)] = part
    return torch.from_numpy(padded), each


def _bce(logit: np.ndarray | float, positive: bool) -> np.ndarray:
    return np.asarray(np.logaddexp(0.0, -logit if positive else logit))


@pytest.mark.parametrize("pooling", KINDS[:2], ids=lambda p: p.kind)
def test_smoothing_is_the_moving_average_of_the_pooling(pooling: Pooling) -> None:
    outputs, each = _outputs(1)
    found = smoothed(pooling, outputs[..., 0]).numpy()
    for row, part in enumerate(each):
        for probe in range(2):
            expected = moving(pooling, part[:, probe, 0])
            assert found[row, : len(part), probe] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pooling", KINDS[2:], ids=lambda p: p.kind)
def test_the_pooled_logit_is_that_of_the_pooling(pooling: Pooling) -> None:
    outputs, each = _outputs(pooling.channels)
    found = pooled(pooling, outputs, torch.tensor(LENGTHS)).numpy()
    for row, part in enumerate(each):
        for probe in range(2):
            assert found[row, probe] == pytest.approx(pool(pooling, part[:, probe]), abs=1e-5)


@pytest.mark.parametrize("pooling", KINDS[2:], ids=lambda p: p.kind)
@pytest.mark.parametrize("positive", [True, False])
def test_softmax_and_attention_are_trained_on_the_pooled_logit(pooling: Pooling, positive: bool) -> None:
    outputs, each = _outputs(pooling.channels)
    said = torch.full((len(LENGTHS),), float(positive))
    found = losses(pooling, outputs, torch.tensor(LENGTHS), said).numpy()
    expected = [[_bce(pool(pooling, part[:, probe]), positive) for probe in range(2)] for part in each]
    assert found == pytest.approx(np.array(expected), abs=1e-5)


@pytest.mark.parametrize("pooling", KINDS[:2], ids=lambda p: p.kind)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1e6, 1e-4])
def test_smoothed_positions_weigh_by_how_alarming_they_are(
    pooling: Pooling, positive: bool, temperature: float
) -> None:
    outputs, each = _outputs(1)
    said = torch.full((len(LENGTHS),), float(positive))
    found = losses(pooling, outputs, torch.tensor(LENGTHS), said, temperature=temperature).numpy()
    for row, part in enumerate(each):
        for probe in range(2):
            means = moving(pooling, part[:, probe, 0]).astype(np.float64)
            means = means[min(pooling.full, len(means)) - 1 :]
            loss = _bce(means, positive)
            weight = np.exp((means - means.max()) / temperature)
            assert found[row, probe] == pytest.approx(float(weight @ loss / weight.sum()), abs=1e-4)
            if temperature == 1e6:
                assert found[row, probe] == pytest.approx(loss.mean(), abs=1e-4)
            if temperature == 1e-4:
                # The same place as in the logit that a guard acts on.
                assert found[row, probe] == pytest.approx(_bce(pool(pooling, part[:, probe]), positive), 1e-4)


def test_positions_that_do_not_count_have_no_say() -> None:
    smooth = torch.tensor([[[0.3], [9.0], [-2.0]]])
    counts = torch.tensor([[True, False, True]])
    whole = position_losses(smooth[:, [0, 2]], torch.tensor([[True, True]]), torch.ones(1), 1.0)
    assert torch.equal(position_losses(smooth, counts, torch.ones(1), 1.0), whole)
