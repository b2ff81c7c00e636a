"""The guarded engine against transformers and against plain vLLM, in one mode."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from loadtests.gpu import judge, modes
from loadtests.gpu.isolate import ended, run_process
from loadtests.gpu.recorder import Recorder
from loadtests.gpu.world import World, prepare

TOKENS = 12
SECONDS = 280
"""One engine's time: start, compilation, and all questions."""


def check(recorder: Recorder, model: str, dtype: str, mode: str, runner: str, scheduling: str) -> None:
    """Plain vLLM first: where it does not run, nothing can be said about the guard."""
    made = prepare(recorder.folder, model, recorder.device)
    options = modes.options(mode, scheduling, dtype, recorder.device)
    with tempfile.TemporaryDirectory() as cache:
        settings = modes.environment(runner, cache)
        plain, why = serve(recorder, made, None, options, settings)
        if why:
            recorder.cannot(f"plain vLLM does not run in this mode: {why}")
        if other := otherwise(plain["facts"], runner, scheduling):
            recorder.cannot(other)
        guarded, why = serve(recorder, made, made.bundle, options, settings)
    verdict(recorder, made, dtype, plain, guarded, why)
    if "facts" in guarded:
        other = otherwise(guarded["facts"], runner, scheduling)
        recorder.expect(other is None, f"with the guard, {other}")


def verdict(
    recorder: Recorder,
    made: World,
    dtype: str,
    plain: dict[str, Any],
    guarded: dict[str, Any],
    why: str | None,
) -> None:
    """Record the numbers of a guarded engine and what is wrong with it."""
    wanted = judge.Wanted(made.logits[dtype], made.tolerance[dtype], dtype == "float32")
    if "facts" in guarded:
        for name, value in judge.summary(guarded, plain, wanted).items():
            recorder.number(name, value)
    if why:
        recorder.expect(False, f"the guarded engine: {why}")
        return
    for sentence in judge.problems(guarded, plain, wanted):
        recorder.expect(False, sentence)


def otherwise(facts: dict[str, Any], runner: str, scheduling: str) -> str | None:
    """How vLLM runs when it has not taken the runner or the scheduler that was asked for."""
    runs = "v2" if ".worker.gpu." in facts["runner"] else "v1"
    if runs != runner:
        return f"vLLM took the {runs} runner where {runner} was asked for"
    if facts["async"] != (scheduling == "async"):
        return f"vLLM set asynchronous scheduling to {facts['async']} where {scheduling} was asked for"
    return None


def serve(
    recorder: Recorder, made: World, bundle: Path | None, options: dict[str, Any], settings: dict[str, str]
) -> tuple[dict[str, Any], str | None]:
    """What an engine answered, and why it ended early if it did."""
    with tempfile.TemporaryDirectory(dir=recorder.folder) as name:
        folder = Path(name)
        job, result, log = folder / "job.json", folder / "result.json", folder / "log"
        job.write_text(
            json.dumps(
                {
                    "model": str(made.model),
                    "bundle": bundle and str(bundle),
                    "engine": options,
                    "prompts": made.prompts,
                    "tokens": TOKENS,
                    "keys": str(folder / "keys"),
                }
            )
        )
        command = [sys.executable, "-m", "loadtests.gpu.serve", str(job), str(result)]
        status = run_process(command, log, seconds=SECONDS, environment=settings, group=False)
        print(f"----- {'plain' if bundle is None else 'guarded'}: {options} {settings}")
        print(log.read_text("utf-8", "replace"), flush=True)
        answers = json.loads(result.read_text("utf-8")) if result.exists() else {}
        if status is None:
            return answers, f"it took longer than {SECONDS} s and was ended"
        return answers, ended(status, log) if status else None
