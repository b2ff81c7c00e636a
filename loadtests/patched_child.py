"""``loadtests.child`` with patches: a guarded engine whose requests may each name the patch they run under.

A command is ``{"prompts": [[…]], "max_tokens": 24, "guard": true, "patches": ["stored", null, …]}``; without
``patches`` nobody is patched. The answer tells the seconds until every request has its first token
(``first``) and those of the decode steps after that (``decode``), by process CPU time, and ``wall_first`` and
``wall_decode``.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from guard.sealed import Keyring
from guard.verdict import Decision, Rule, Verdict
from loadtests.orders import Answer, parameters, serve


def prepare(llm: Any, keys: Keyring) -> Answer:
    """What answers a command."""
    from loadtests.switch import Switch

    switch = Switch(llm)

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        (switch.on if command["guard"] else switch.off)()
        names = command["patches"] or [None] * len(command["prompts"])
        return measure(llm, keys, command["prompts"], names, command["max_tokens"])

    return answer


def decision(patch: str | None) -> Decision | None:
    """What has a request patched; None leaves it as it is."""
    if patch is None:
        return None
    rule = Rule(above=0.0, action="patch", patch=patch, still_unsafe="pass")
    return Decision(policy="bench", rules=(rule,))


def measure(
    llm: Any, keys: Keyring, prompts: list[list[int]], names: list[str | None], max_tokens: int
) -> dict[str, float]:
    """Run one batch to its end. Raises RuntimeError when a request was not answered as it was to be."""
    engine = llm.llm_engine
    parts = [parameters(keys, decision(name), max_tokens) for name in names]
    wall, cpu = time.perf_counter(), time.process_time()
    for index, (prompt, params) in enumerate(zip(prompts, parts, strict=True)):
        engine.add_request(f"{wall}-{index}", {"prompt_token_ids": prompt}, params)
    waiting, first, tokens = len(prompts), (0.0, 0.0), 0
    begun: set[str] = set()
    patched: list[str | None] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            begun.add(output.request_id)
            if output.finished:
                tokens += len(output.outputs[0].token_ids)
                patched.append(_patch_of(output))
        if waiting and len(begun) == waiting:
            waiting, first = 0, (time.process_time() - cpu, time.perf_counter() - wall)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    llm.reset_prefix_cache()
    if tokens != len(prompts) * max_tokens:
        raise RuntimeError(f"{tokens} tokens came of {len(prompts)} requests for {max_tokens} each")
    if Counter(patched) != Counter(names):
        raise RuntimeError(f"requests ran under the patches {patched}, not under {names}")
    return {
        "first": first[0],
        "decode": cpu - first[0],
        "wall_first": first[1],
        "wall_decode": wall - first[1],
    }


def _patch_of(output: Any) -> str | None:
    """The patch that the verdict on a request names; plain vLLM gives none."""
    from guard.engine.config import CONFIG_KEY

    carried = (output.kv_transfer_params or {}).get(CONFIG_KEY)
    return Verdict.model_validate_json(carried).patch if carried else None


if __name__ == "__main__":
    serve(prepare)
