"""Batches as vLLM's two model runners lay them out, and what the guard reads from them."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from guard.engine.errors import GuardStartupError
from guard.engine.runners import stage_after_layout
from guard.engine.staging import Layout, Staging

pytestmark = [  # vLLM and its dependencies warn a lot
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:::guard"),
]
# Four requests, in the runner's order: one decodes, one ends its prompt with a second chunk, one is in the
# middle of its prompt, one is computed whole. (name, tokens computed before, tokens scheduled, prompt)
BATCH = (("decodes", 12, 1, 9), ("ends", 30, 6, 36), ("goes on", 8, 5, 40), ("whole", 0, 3, 3))
ROWS = [6, 14]
"""``ends`` holds rows 1 to 6, ``whole`` 12 to 14."""
START = np.array([0, 1, 7, 12, 15], dtype=np.int32)


class RunnerV1:
    """What the guard touches of V1's runner: buffers that outlive the step and are longer than the batch."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(
            req_ids=[], num_computed_tokens_cpu=np.full(8, 77), num_prompt_tokens=np.full(8, 77)
        )
        table = SimpleNamespace(
            slot_mapping=SimpleNamespace(gpu=None), block_table=SimpleNamespace(gpu=None), block_size=16
        )
        self.input_batch.block_table = [table]
        self.query_start_loc = SimpleNamespace(np=np.full(9, 77, dtype=np.int32))

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> tuple[Any, Any]:
        self.input_batch.req_ids[:] = [name for name, *_ in BATCH]
        for i, (_, computed, _, prompt) in enumerate(BATCH):
            self.input_batch.num_computed_tokens_cpu[i] = computed
            self.input_batch.num_prompt_tokens[i] = prompt
        self.query_start_loc.np[: len(START)] = START
        self.query_start_loc.np[len(START) :] = START[-1]
        return scheduler_output, num_scheduled_tokens


class RunnerV2:
    """What the guard touches of V2's runner. Its requests sit in other slots than their rows."""

    def __init__(self) -> None:
        self.slots = np.array([5, 0, 3, 2])
        prompt = np.full(8, 77, dtype=np.int32)
        prompt[self.slots] = [prompt for *_, prompt in BATCH]
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(np=prompt))

    def prepare_inputs(
        self, scheduler_output: Any, batch_req_state: Any, batch_desc: Any, num_active_loras: int
    ) -> Any:
        import torch
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

        self.seen = (scheduler_output, batch_req_state, batch_desc, num_active_loras)
        buffers = InputBuffers(8, 64, torch.device("cpu"))
        return dataclasses.replace(
            InputBatch.make_dummy(len(BATCH), int(START[-1]), buffers),
            req_ids=[name for name, *_ in BATCH],
            idx_mapping_np=self.slots,
            query_start_loc_np=np.append(START, START[-1]),  # padded for a recorded graph
            num_computed_tokens_np=np.array([computed for _, computed, *_ in BATCH], dtype=np.int32),
            # With what a resumed request had already said: not the prompt's length.
            prefill_len_np=np.array([13, 36, 40, 3], dtype=np.int32),
        )


def staged(runner: Any) -> tuple[Staging, list[Layout]]:
    staging, layouts = Staging(8), []
    stage_after_layout(runner, lambda layout: (staging.stage(layout), layouts.append(layout)))
    return staging, layouts


def check_rows(staging: Staging) -> None:
    assert staging.request_ids == ["ends", "whole"]
    assert staging.rows[: staging.count].tolist() == ROWS


def test_first_runner_is_read_after_it_has_laid_the_batch_out():
    runner = RunnerV1()
    staging, layouts = staged(runner)
    assert runner._prepare_inputs("scheduled", "tokens") == ("scheduled", "tokens")
    check_rows(staging)
    assert len(layouts) == 1


def test_second_runner_is_read_from_the_batch_that_it_returns():
    runner = RunnerV2()
    staging, layouts = staged(runner)
    batch = runner.prepare_inputs("scheduled", "state", "description", num_active_loras=0)
    assert runner.seen == ("scheduled", "state", "description", 0)
    assert batch.query_start_loc_np.tolist() == [0, 1, 7, 12, 15, 15]
    check_rows(staging)
    assert len(layouts) == 1


def test_names_staged_outlive_the_runners_own_list():
    runner = RunnerV1()
    staging, _ = staged(runner)
    runner._prepare_inputs(None, None)
    runner.input_batch.req_ids[:] = ["another", "order", "of", "requests"]
    check_rows(staging)


def test_dummy_batches_are_not_staged():
    runner = RunnerV2()
    _, layouts = staged(runner)
    import torch
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    InputBatch.make_dummy(2, 9, InputBuffers(8, 64, torch.device("cpu")))
    assert layouts == []


def test_runner_of_another_kind_is_refused():
    with pytest.raises(GuardStartupError, match="cannot read: SimpleNamespace"):
        stage_after_layout(SimpleNamespace(prepare_inputs=print), lambda layout: None)


@pytest.mark.parametrize(
    ("module", "stand_in", "method"),
    [
        ("vllm.v1.worker.gpu_model_runner", RunnerV1, "_prepare_inputs"),
        ("vllm.v1.worker.gpu.model_runner", RunnerV2, "prepare_inputs"),
    ],
)
def test_the_stand_ins_take_what_vllms_runners_take(module: str, stand_in: type, method: str):
    real = importlib.import_module(module).GPUModelRunner
    expected = list(inspect.signature(getattr(real, method)).parameters)
    assert list(inspect.signature(getattr(stand_in, method)).parameters) == expected


def test_each_of_vllms_runners_is_told_by_what_it_has():
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

    assert hasattr(First, "_prepare_inputs")
    assert not hasattr(Second, "_prepare_inputs")
    assert hasattr(Second, "prepare_inputs")
