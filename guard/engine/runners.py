"""The two model runners of vLLM: where each has laid out the batch of a step before its forward pass.

V1 is vllm/v1/worker/gpu_model_runner.py (and the CPU's runner, which extends it), V2 is
vllm/v1/worker/gpu/model_runner.py. Both order the batch as they like, so rows are computed from what they
laid out, never from the scheduler's order. Dummy runs (profiling, capture, idle ranks) lay nothing out
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from guard.engine.errors import GuardStartupError
from guard.engine.staging import KvPlaces, Layout

Stage = Callable[[Layout], None]


def stage_after_layout(runner: Any, stage: Stage) -> None:
    """Have ``stage`` called with every batch that ``runner`` lays out. Raises GuardStartupError."""
    if hasattr(runner, "_prepare_inputs"):
        _wrap_v1(runner, stage)
    elif hasattr(runner, "prepare_inputs") and hasattr(runner, "req_states"):
        _wrap_v2(runner, stage)
    else:
        raise GuardStartupError(
            f"this vLLM uses a model runner whose batches the guard cannot read: {type(runner).__name__}"
        )


def tell(runner: Any, tokens: Mapping[str, list[int]]) -> None:
    """Replace what the runner sampled for requests that come back after a preemption.

    V1 keeps output tokens over a preemption, and takes the scheduler's only with asynchronous scheduling; V2
    is sent a resumed request as if it were new.
    """
    for request_id, given in tokens.items():
        state = getattr(runner, "requests", {}).get(request_id)
        if state is not None:
            state.output_token_ids = list(given)


def _wrap_v1(runner: Any, stage: Stage) -> None:
    prepare = runner._prepare_inputs

    def prepare_and_stage(scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = prepare(scheduler_output, num_scheduled_tokens)
        batch = runner.input_batch
        table = batch.block_table[0]
        stage(
            Layout(
                batch.req_ids,
                runner.query_start_loc.np,
                batch.num_computed_tokens_cpu,
                batch.num_prompt_tokens,
                KvPlaces(table.slot_mapping.gpu, table.block_table.gpu, table.block_size),
            )
        )
        return prepared

    runner._prepare_inputs = prepare_and_stage


def _wrap_v2(runner: Any, stage: Stage) -> None:
    prepare = runner.prepare_inputs

    # Its parameters grow from version to version, and the guard needs none of them.
    def prepare_and_stage(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        stage(
            Layout(
                batch.req_ids,
                batch.query_start_loc_np,
                batch.num_computed_tokens_np,
                runner.req_states.prompt_len.np[batch.idx_mapping_np],
            )
        )
        return batch

    runner.prepare_inputs = prepare_and_stage
