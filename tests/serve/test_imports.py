"""The supervisor only starts others: what they need is not imported a second time in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from guard.lab import materialise
from guard.serve.command import DEFAULT_VARIANT, LAB_DIR
from guard.serve.plan import free_port

HEAVY = ("torch", "vllm", "transformers", "safetensors", "fastapi", "uvicorn", "sklearn")

CODE = f"""
import sys
from guard.serve import checks, supervise
from guard.serve.command import run

checks.check_memory = lambda: None
supervise.supervise = lambda services, *args, **options: len(services)
assert run(port=int(sys.argv[1])) == 2
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_supervisor_imports_nothing_heavy_once_the_checkpoint_is_there(tmp_path: Path) -> None:
    materialise(LAB_DIR, DEFAULT_VARIANT, cache=tmp_path / "checkpoints")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(free_port())],
        env={**os.environ, "NEURONGUARD_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
