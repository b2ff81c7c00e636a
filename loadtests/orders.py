"""A benchmark's in-process engine that takes commands and sealed decisions for single requests."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guard.sealed import Keyring
from guard.verdict import Decision, Directive

AUDIENCE = "bench"
Answer = Callable[[dict[str, Any]], dict[str, Any]]


def serve(prepare: Callable[[Any, Keyring], Answer]) -> None:
    """Make the engine that the command line describes, and answer commands until stdin ends.

    ``prepare`` is given the ``LLM`` and its keys, and returns what answers a command.
    """
    # Sets what vLLM reads from the environment when it is imported.
    from loadtests import child

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints is no answer
    with tempfile.TemporaryDirectory() as folder:
        keys = make_keys(Path(folder) / "keys")
        answer = prepare(child.make_engine(**json.loads(sys.argv[1])), keys)
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def make_keys(path: Path) -> Keyring:
    """Fresh keys in a file that an engine made after this in the same process reads."""
    from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV

    keys = Keyring.generate()
    keys.save(path)
    os.environ.update({KEY_FILE_ENV: str(path), AUDIENCE_ENV: AUDIENCE})
    return keys


def parameters(keys: Keyring, decision: Decision | None, max_tokens: int) -> Any:
    """Greedy sampling, of fixed length; under ``decision`` if there is one, else the engine's own."""
    from vllm import SamplingParams

    from guard.engine.config import EXTRA_ARG

    extra = None
    if decision is not None:
        extra = {EXTRA_ARG: Directive.issue(decision, audience=AUDIENCE, body=b"").seal(keys)}
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, extra_args=extra)
