"""One engine in a process of its own, told over stdin what to run and answering with its timings.

``python -m loadtests.child '{"model": …, "bundle": … or null, "engine": {…}}'``. A bundle makes it guarded,
none makes it plain vLLM with its own worker and scheduler classes. One JSON command a line:
``{"prompts": [[…]], "max_tokens": 16}``; one JSON line back: process CPU seconds, wall seconds, engine steps,
generated tokens. ``"guard": false`` in it has a guarded engine run it as plain vLLM. CPU seconds of this
process are what comparisons use: another process on the machine does not count towards them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_V2_MODEL_RUNNER="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)


def make_engine(model: str, bundle: str | None, engine: dict[str, Any]) -> Any:
    """A plain or a guarded in-process ``LLM``."""
    from vllm import LLM

    options = {"dtype": "float32", "enforce_eager": True, "async_scheduling": False, **engine}
    if bundle is None:
        return LLM(model, **options)
    from guard.bundle import Bundle
    from guard.engine import selftest
    from guard.engine.config import GuardConfig

    loaded = Bundle.load(bundle)
    llm = LLM(
        model,
        worker_cls="guard.engine.worker.GuardWorker",
        scheduler_cls="guard.engine.scheduler.guard_scheduler",
        additional_config=GuardConfig.for_bundle(bundle, loaded).entry(),
        **options,
    )
    selftest.run(llm, loaded.card.self_test.prompts)
    return llm


def measure(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, float]:
    """Run one batch to its end."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    steps = tokens = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{wall}-{index}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        finished = [output for output in engine.step() if output.finished]
        tokens += sum(len(output.outputs[0].token_ids) for output in finished)
        steps += 1
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    llm.reset_prefix_cache()
    return {"cpu": cpu, "wall": wall, "steps": steps, "tokens": tokens}


def main() -> None:
    """Serve commands until stdin ends. Only answers go to stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    llm = make_engine(**json.loads(sys.argv[1]))
    from loadtests.switch import Switch

    worker = llm.llm_engine.model_executor.driver_worker.worker
    taps = getattr(worker, "taps", None)  # plain vLLM has none
    switch = Switch(llm) if taps else None
    answers.write(json.dumps({"ready": True, "guard_bytes": taps.bytes if taps else 0}) + "\n")
    answers.flush()
    for line in sys.stdin:
        command = json.loads(line)
        guard = command.pop("guard", True)
        if switch:
            (switch.on if guard else switch.off)()
        answers.write(json.dumps(measure(llm, **command)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
