"""What stands in the KV blocks of a simulated engine, and that each request reads what it would write itself.

The content of a position is all that a model's KV there depends on: the tokens up to it, and the patch under
which they were computed. A request that is given a cached block relies on the content of every position in
it. Tokens of an answer are told apart by whose they are; no two answers of a simulation share any.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.engine.schedulers import BLOCK

Content = tuple[int, int | str]


class Blocks:
    """The pool as workers fill it."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """By request, for each time it began: its patch slot and how many tokens it found computed."""
        self._held: dict[tuple[int, int], Content] = {}
        self._tables: dict[str, list[int]] = {}
        self._prompts: dict[str, list[int]] = {}

    def follow(self, scheduled: Any, slots: dict[str, int]) -> None:
        """Take over the blocks that a step gives out, as vllm/v1/worker/gpu_model_runner.py does."""
        for new in scheduled.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            self._prompts[new.req_id] = _running(new.prompt_token_ids)
            self.taken[new.req_id].append((slots.get(new.req_id, 0), new.num_computed_tokens))
        cached = scheduled.scheduled_cached_reqs
        for rid, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if rid in cached.resumed_req_ids:
                self._tables[rid] = []
                self.taken[rid].append((slots.get(rid, 0), computed))
            if ids is not None:
                self._tables[rid] += ids[0]

    def compute(self, rid: str, begin: int, end: int, slot: int) -> None:
        """Positions ``begin`` to ``end`` of a request are computed, and those before them read."""
        for position in range(begin):
            found, own = self._held.get(self._place(rid, position)), self._content(rid, position, slot)
            assert found == own, f"request {rid} reads {found} at {position}, not its own {own}"
        for position in range(begin, end):
            self._held[self._place(rid, position)] = self._content(rid, position, slot)

    def _place(self, rid: str, position: int) -> tuple[int, int]:
        return self._tables[rid][position // BLOCK], position % BLOCK

    def _content(self, rid: str, position: int, slot: int) -> Content:
        prompt = self._prompts[rid]
        return slot, prompt[position] if position < len(prompt) else rid


def _running(tokens: list[int]) -> list[int]:
    """A digest of the tokens up to each position."""
    found, before = [], 0
    for token in tokens:
        before = hash((before, token))
        found.append(before)
    return found
