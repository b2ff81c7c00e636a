"""One engine in a process of its own: ``python -m loadtests.gpu.serve JOB.json RESULT.json``.

Plain or guarded, in-process ``LLM``; every prompt twice, greedy. ``loadtests.gpu.judge`` judges what it says.
It also counts, step by step, how often Python of ours ran in the forward pass and how often a CUDA graph was
replayed: that is how a replayed tap is told from one that was called.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROUNDS = 2
"""The second one finds its prefixes in the cache."""


def serve(job: dict[str, Any], keep: Any) -> None:
    """Start the engine, ask, and ``keep(name, value)`` everything, early things first."""
    counts = None if job["bundle"] is None else Counts()
    llm = _engine(job)
    keep("facts", _facts(llm))
    if counts is None:
        llm.reset_prefix_cache()
        keep("rounds", [_ask(llm, job, None) for _ in range(ROUNDS)])
        return
    from guard.bundle import Bundle
    from guard.engine import selftest
    from guard.engine.errors import GuardStartupError

    bundle = Bundle.load(job["bundle"])
    try:
        selftest.run(llm, bundle.card.self_test.prompts)
        keep("self_test", None)
    except GuardStartupError as error:
        keep("self_test", str(error))
        return
    finally:
        keep("self_test_worst", _scheduler(llm).ledger.self_test.worst)
    taps = _worker(llm).taps
    keep("bytes", taps.bytes)
    keep("sites", len(bundle.card.sites))
    steps = counts.watch(taps)
    llm.reset_prefix_cache()
    keep("rounds", [_ask(llm, job, "observe") for _ in range(ROUNDS)])
    keep("enforced", _ask(llm, job, "enforce"))
    keep("steps", steps)
    keep("left", len(_scheduler(llm).ledger))


class Counts:
    """Calls of the gather operation's Python, and replays of CUDA graphs. Made before the engine."""

    def __init__(self) -> None:
        import torch

        from guard.engine import ops

        self.calls = self.replays = 0
        rows, replay = ops.gather_rows, torch.cuda.CUDAGraph.replay

        def counted_rows(*args: Any) -> None:
            self.calls += 1
            rows(*args)

        def counted_replay(graph: Any) -> Any:
            self.replays += 1
            return replay(graph)

        ops.gather_rows = counted_rows  # type: ignore[assignment]
        torch.cuda.CUDAGraph.replay = counted_replay  # type: ignore[method-assign, assignment]

    def watch(self, taps: Any) -> list[list[int]]:
        """A list that grows by [prompts ended, Python calls, graph replays] with every step."""
        steps: list[list[int]] = []
        score = taps.score

        def counted() -> Any:
            steps.append([taps.staging.count, self.calls, self.replays])
            self.calls = self.replays = 0
            return score()

        self.calls = self.replays = 0
        taps.score = counted
        return steps


def _engine(job: dict[str, Any]) -> Any:
    from vllm import LLM

    if job["bundle"] is None:
        return LLM(job["model"], **job["engine"])
    from guard.bundle import Bundle
    from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV, GuardConfig
    from guard.sealed import Keyring

    keys = Path(job["keys"])
    if not keys.exists():
        Keyring.generate().save(keys)
    os.environ.update({KEY_FILE_ENV: str(keys), AUDIENCE_ENV: "engine"})
    return LLM(
        job["model"],
        worker_cls="guard.engine.worker.GuardWorker",
        scheduler_cls="guard.engine.scheduler.guard_scheduler",
        additional_config=GuardConfig.for_bundle(job["bundle"], Bundle.load(job["bundle"])).entry(),
        **job["engine"],
    )


def _ask(llm: Any, job: dict[str, Any], mode: Any) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    from guard.engine.config import CONFIG_KEY, EXTRA_ARG

    extra = None
    if mode is not None:
        from guard.sealed import Keyring
        from guard.verdict import Decision, Directive, Rule

        decision = Decision(policy="gpu", mode=mode, rules=(Rule(above=0.5, action="refuse"),))
        directive = Directive.issue(decision, audience="engine", body=b"")
        extra = {EXTRA_ARG: directive.seal(Keyring.load(job["keys"]))}
    params = SamplingParams(temperature=0.0, max_tokens=job["tokens"], ignore_eos=True, extra_args=extra)
    outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
    answers = []
    for output in outputs:
        carried = (output.kv_transfer_params or {}).get(CONFIG_KEY)
        verdict = json.loads(carried) if carried else {}
        answers.append(
            {
                "tokens": list(output.outputs[0].token_ids),
                "finish": output.outputs[0].finish_reason,
                "cached": output.num_cached_tokens or 0,
                **{key: verdict.get(key) for key in ("logit", "decision", "action", "reason")},
            }
        )
    return answers


def _worker(llm: Any) -> Any:
    wrapper = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    return getattr(wrapper, "worker", wrapper)


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def _facts(llm: Any) -> dict[str, Any]:
    """What vLLM made of the options: it changes what it cannot do."""
    from vllm.compilation.counter import compilation_counter

    config = llm.llm_engine.vllm_config
    compilation = config.compilation_config
    return {
        "compilation": compilation.mode.name,
        "graphs": compilation.cudagraph_mode.name,
        "async": bool(config.scheduler_config.async_scheduling),
        "runner": type(_worker(llm).model_runner).__module__,
        "worker": type(_worker(llm)).__name__,
        "counters": {k: v for k, v in vars(compilation_counter).items() if isinstance(v, int)},
    }


def main() -> None:
    """Read the job; write the result anew with every part of it."""
    job, target = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    result: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        result[name] = value
        target.write_text(json.dumps(result))

    serve(job, keep)


if __name__ == "__main__":
    main()
