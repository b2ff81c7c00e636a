"""What every offline engine imports, once: its processes are forked from one that has imported this."""

from __future__ import annotations

import os

from tests.e2e.inprocess import SETTINGS

os.environ.update(SETTINGS)

import vllm.v1.engine.core
import vllm.v1.engine.llm_engine
import vllm.v1.worker.cpu_worker  # noqa: F401
