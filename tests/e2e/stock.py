"""Greedy tokens of plain vLLM, in its own process: ``python -m tests.e2e.stock MODEL IN.json OUT.json``."""

import json
import os
import sys
from pathlib import Path

from tests.e2e.inprocess import ENGINE, SETTINGS

if __name__ == "__main__":
    os.environ.update(SETTINGS)
    from vllm import LLM, SamplingParams

    model, source, target = sys.argv[1:]
    job = json.loads(Path(source).read_text())
    llm = LLM(model, **ENGINE)
    params = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
    rounds = []
    for _ in range(job["rounds"]):
        outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
        rounds.append([list(o.outputs[0].token_ids) for o in outputs])
    Path(target).write_text(json.dumps(rounds))
