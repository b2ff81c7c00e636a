"""An offline engine in its own process, plain or guarded.

For what cannot be had twice in one process: plain vLLM beside ours, torch.compile, several ranks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 600
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.e2e.preloaded"])


@dataclass(frozen=True)
class Result:
    """What a child's requests got, ``[rounds][prompts]``."""

    tokens: list[list[list[int]]]
    logits: list[list[float | None]]
    actions: list[list[str | None]]
    cached: list[list[int]]
    facts: dict[str, Any]


def run(
    folder: Path,
    model: Path,
    prompts: list[list[int]],
    *,
    bundle: Path | None = None,
    mode: str = "enforce",
    patch: str | None = None,
    max_tokens: int = 16,
    rounds: int = 2,
    options: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    name: str = "child",
) -> Result:
    """Run ``prompts`` greedily, ``rounds`` times; with a bundle under its default policy in ``mode``.

    With ``patch``, all of them are patched instead.
    """
    result, log = folder / f"{name}-result.json", folder / f"{name}.log"
    job = {
        "model": str(model),
        "bundle": bundle and str(bundle),
        "mode": mode,
        "patch": patch,
        "options": options or {},
        "prompts": prompts,
        "max_tokens": max_tokens,
        "rounds": rounds,
    }
    process = FORKS.Process(target=begin, args=(job, result, log, {**os.environ, **(environment or {})}))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, f"{process.exitcode}: {log.read_text()[-3000:]}"
    return Result(**json.loads(result.read_text()))


def begin(job: dict[str, Any], result: Path, log: Path, environment: dict[str, str]) -> None:
    """The child's side; what it prints is in ``log``."""
    with log.open("wb") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    result.write_text(json.dumps(work(job)))


def work(job: dict[str, Any]) -> dict[str, Any]:
    from tests.e2e.inprocess import ENGINE, SETTINGS, answer, guarded, shut_down

    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    facts: dict[str, Any] = {}
    if job["bundle"]:
        from guard.bundle import Bundle
        from guard.engine import selftest, taps

        bundle = Bundle.load(job["bundle"])
        llm = guarded(
            Path(job["model"]), Path(job["bundle"]), mode=job["mode"], patch=job["patch"], **job["options"]
        )
        facts["calls"] = 0
        forward = taps.Tap.forward

        def counted(self: Any, x: Any) -> None:
            facts["calls"] += 1
            forward(self, x)

        taps.Tap.forward = counted  # type: ignore[method-assign]
        selftest.run(llm, bundle.card.self_test.prompts)
    else:
        llm = LLM(job["model"], **{**ENGINE, **job["options"]})
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
    result: dict[str, Any] = {"tokens": [], "logits": [], "actions": [], "cached": [], "facts": facts}
    for _ in range(job["rounds"]):
        outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
        answers = [answer(output) for output in outputs]
        result["tokens"].append([a.tokens for a in answers])
        result["logits"].append([a.verdict.logit if a.verdict else None for a in answers])
        result["actions"].append([a.verdict.action if a.verdict else None for a in answers])
        result["cached"].append([a.cached for a in answers])
    for metric in llm.get_metrics():
        if metric.name in ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens"):
            facts[metric.name] = metric.value
    shut_down(llm)
    return result
