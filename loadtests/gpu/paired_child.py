"""``loadtests.child`` for a GPU: vLLM's own choice of runner, and no clock started while the GPU still works.

The last token of a batch is on the host when the clock stops, so all of the batch's work lies between.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from loadtests import child

os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)


def main() -> None:
    """Serve commands until stdin ends, as ``loadtests.child`` does."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llm = child.make_engine(**json.loads(sys.argv[1]))
    say(answers, {"ready": True, "bytes": guard_bytes(llm), "blocks": blocks(llm)})
    import torch

    for line in sys.stdin:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        say(answers, child.measure(llm, **json.loads(line)))


def say(answers: Any, entry: dict[str, Any]) -> None:
    """One answer."""
    answers.write(json.dumps(entry) + "\n")
    answers.flush()


def guard_bytes(llm: Any) -> int:
    """Device memory of the guard; 0 for plain vLLM."""
    wrapper = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    taps = getattr(getattr(wrapper, "worker", wrapper), "taps", None)
    return 0 if taps is None else int(taps.bytes)


def blocks(llm: Any) -> int:
    """Blocks in the KV pool, which is made of the memory that model and guard leave."""
    return int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks or 0)


if __name__ == "__main__":
    main()
