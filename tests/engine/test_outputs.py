"""Scores on their way to the scheduler: onto either kind of output, and not mixed up between steps."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from guard.engine.buffers import PendingScores, ScoreBuffers
from guard.engine.staging import Layout, Staging

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]


@pytest.fixture
def outputs() -> Any:
    from guard.engine import outputs

    return outputs


def plain() -> Any:
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0}, sampled_token_ids=[[5]])


class Scores:
    """Pending scores that note whether they were taken."""

    taken = 0

    def take(self) -> dict[str, float]:
        self.taken += 1
        return {"a": 1.5}


def test_scores_are_attached_to_a_finished_output(outputs: Any) -> None:
    output = plain()
    assert outputs.attach(output, Scores()) is output
    assert getattr(output, outputs.LOGITS_ATTRIBUTE) == {"a": 1.5}


def test_scores_of_an_output_under_way_are_taken_only_once_it_is_there(outputs: Any) -> None:
    from vllm.v1.outputs import AsyncModelRunnerOutput

    asked, ready = threading.Event(), threading.Event()

    class UnderWay(AsyncModelRunnerOutput):
        def get_output(self) -> Any:
            asked.set()
            assert ready.wait(30)
            return plain()

    scores = Scores()
    attached = outputs.attach(UnderWay(), scores)
    assert isinstance(attached, AsyncModelRunnerOutput)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(attached.get_output()))
    waiting.start()
    assert asked.wait(30)
    assert scores.taken == 0
    assert not found
    ready.set()
    waiting.join(30)
    assert getattr(found[0], outputs.LOGITS_ATTRIBUTE) == {"a": 1.5}
    assert scores.taken == 1


def test_a_step_without_scores_keeps_its_output_as_it_is(outputs: Any) -> None:
    output, unknown = plain(), object()
    assert outputs.attach(output, None) is output
    assert not hasattr(output, outputs.LOGITS_ATTRIBUTE)
    assert outputs.attach(unknown, None) is unknown


@pytest.mark.parametrize("output", [None, object()])
def test_scores_are_never_dropped_for_an_output_of_another_kind(outputs: Any, output: Any) -> None:
    with pytest.raises(RuntimeError, match=f"cannot attach its scores to a {type(output).__name__}"):
        outputs.attach(output, Scores())


def test_logits_of_a_step_survive_the_staging_and_scoring_of_the_next_ones() -> None:
    buffers = ScoreBuffers(4, torch.device("cpu"))
    logits = torch.zeros(4)
    pending = []
    for step in range(6):
        buffers.to_device(np.arange(2))
        logits.fill_(step)  # the probe writes every step's results to the same tensor
        pending.append(buffers.to_host([f"{step}-0", f"{step}-1"], logits[:2]))
    for step, scores in enumerate(pending):
        assert scores.take() == {f"{step}-0": step, f"{step}-1": step}


def test_rows_reach_the_device_as_they_were_staged() -> None:
    staging = Staging(4)
    count = staging.stage(Layout(["a", "b"], np.array([0, 5, 9]), np.array([0, 0]), np.array([5, 4])))
    buffers = ScoreBuffers(4, torch.device("cpu"))
    assert buffers.to_device(staging.rows[:count]).tolist() == [4, 8]
    assert buffers.bytes == 0  # nothing on a device of its own


def test_one_logit_for_each_request_or_none_at_all() -> None:
    with pytest.raises(ValueError, match="shorter"):
        PendingScores(["a", "b"], torch.zeros(1), None).take()
