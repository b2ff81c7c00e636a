"""vLLM's offline ``LLM`` in this process: one engine core, one worker, no child processes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vLLM is imported. OMP_NUM_THREADS: idle OpenMP threads spin and starve the one that works.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
# Small chunks, few blocks: prompts are split, prefixes are shared, and requests preempt each other.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_batched_tokens": 96,
    "max_num_seqs": 8,
    "block_size": 32,
    "num_gpu_blocks_override": 40,
    "async_scheduling": False,
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    tokens: list[int]
    text: str
    finish_reason: str | None
    stop_reason: Any
    verdict: Any
    cached: int
    output: Any


def guarded(
    model: Path,
    bundle: Path,
    *,
    mode: str = "enforce",
    adapters: dict[str, str] | None = None,
    donor: Path | None = None,
    patch: str | None = None,
    **options: Any,
) -> Any:
    """A guarded ``LLM`` whose self-test has not been run yet; ``mode`` is its default policy's.

    With ``patch``, the default policy patches every request.
    """
    os.environ.update(SETTINGS)
    from vllm import LLM

    from guard.bundle import Bundle
    from guard.engine.config import GuardConfig
    from guard.verdict import Decision, Rule

    loaded = Bundle.load(bundle)
    default = loaded.card.default_decision.model_copy(update={"mode": mode})
    if patch is not None:
        rule = Rule(above=0.0, action="patch", patch=patch, still_unsafe="pass")
        default = Decision(policy="patch", rules=(rule,))
    return LLM(
        str(model),
        worker_cls="guard.engine.worker.GuardWorker",
        scheduler_cls="guard.engine.scheduler.guard_scheduler",
        additional_config=GuardConfig.for_bundle(
            str(bundle), loaded, default, adapters, str(donor) if donor else None
        ).entry(),
        **{**ENGINE, **options},
    )


def scheduler(llm: Any) -> Any:
    """The guard's scheduler inside an in-process ``LLM``."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def sampling(directive: str | None = None, **options: Any) -> Any:
    """Greedy parameters, with a sealed directive where the API server would put it."""
    from vllm import SamplingParams

    from guard.engine.config import EXTRA_ARG

    extra = {EXTRA_ARG: directive} if directive else None
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "extra_args": extra, **options})


def ask(llm: Any, prompts: list[list[int]], params: Any) -> list[Answer]:
    """Run a batch; ``params`` is one for all or a list."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [answer(output) for output in outputs]


def answer(output: Any) -> Answer:
    """The first completion of a ``RequestOutput``."""
    from guard.engine.config import CONFIG_KEY
    from guard.verdict import Verdict

    completion = output.outputs[0]
    carried = (output.kv_transfer_params or {}).get(CONFIG_KEY)
    return Answer(
        tokens=list(completion.token_ids),
        text=completion.text,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        verdict=carried and Verdict.model_validate_json(carried),
        cached=output.num_cached_tokens or 0,
        output=output,
    )


def shut_down(llm: Any) -> None:
    """Free the engine so that another one can be made in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
