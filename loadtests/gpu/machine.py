"""What runs here: ``python -m loadtests.gpu.machine FILE`` writes versions and the GPU as JSON."""

from __future__ import annotations

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from loadtests.gpu.recorder import Recorder


def facts() -> dict[str, Any]:
    """Versions by name; what is not installed is None."""
    found: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count(), "cuda": None}
    for name in ("torch", "triton", "numpy", "transformers"):
        found[name] = _version(name)
    if found["torch"] is not None:
        import torch

        found["cuda"] = torch.version.cuda
        found["gpu"] = None
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            capability = f"{properties.major}.{properties.minor}"
            found["gpu"] = (
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"
            )
    found["driver"] = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["commit"] = _said("git", "rev-parse", "--short", "HEAD")
    return found


def vllm_facts() -> dict[str, Any]:
    """vLLM's version, or why it does not import. It is asked last: its import can end the process."""
    try:
        import vllm
    except Exception as error:
        return {"vllm": None, "vllm_error": f"{type(error).__name__}: {error}"}
    return {"vllm": vllm.__version__, "vllm_error": None}


def compatibility(recorder: Recorder) -> None:
    """What guard.engine.compat says of the installed vLLM, without and with leave to try an untested one."""
    from guard.engine import compat
    from guard.engine.errors import GuardStartupError

    allowed = os.environ.pop(compat.OVERRIDE_ENV, None)
    for leave in (None, allowed):
        if leave is not None:
            os.environ[compat.OVERRIDE_ENV] = leave
        name = "with leave" if leave else "as installed"
        try:
            recorder.number(name, f"vLLM {compat.check()} is accepted")
        except GuardStartupError as error:
            recorder.number(name, str(error))
            if leave is not None:
                recorder.expect(False, str(error))


def _version(name: str) -> str | None:
    try:
        return str(importlib.import_module(name).__version__)
    except Exception:
        return None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


if __name__ == "__main__":
    target = Path(sys.argv[1])
    known = facts()
    target.write_text(json.dumps({**known, "vllm": None, "vllm_error": "its import ended the process"}))
    target.write_text(json.dumps({**known, **vllm_facts()}))
