"""What a benchmark's in-process engine is told of single requests: its keys, and sealed decisions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from guard.sealed import Keyring
from guard.verdict import Decision, Directive

AUDIENCE = "bench"


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
