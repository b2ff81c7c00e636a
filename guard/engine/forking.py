"""Start vLLM's processes as copies of the API server, which has imported everything, also on a CPU.

The API server, the engine core and each worker import the same libraries, one after another, and that is most
of a start. A process that is forked has them already. vLLM forks on GPUs unless told otherwise
(``VLLM_WORKER_MULTIPROC_METHOD``), but its CPU platform overwrites that setting with ``spawn``
(``platforms/cpu.py``), since threads are tied to cores by environment variables that OpenMP reads when a
process begins. Where threads are not tied there is nothing to read, and the setting is kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

METHOD_ENV = "VLLM_WORKER_MULTIPROC_METHOD"
BIND_ENV = "VLLM_CPU_OMP_THREADS_BIND"


def may_fork(environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for forked processes and has no thread tied to a core."""
    return environment.get(METHOD_ENV) == "fork" and environment.get(BIND_ENV) == "nobind"


def keep_fork() -> bool:
    """Keep vLLM's CPU platform from overwriting ``fork``; returns whether that was asked for.

    vLLM reads each setting through one table (``vllm/envs.py``). Its entry for the start method is replaced
    here, and forked processes inherit that. A version without the table spawns its processes as before.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    table = getattr(envs, "environment_variables", {})
    if METHOD_ENV not in table or not current_platform.is_cpu() or not may_fork(os.environ):
        return False
    table[METHOD_ENV] = lambda: "fork"
    return True
