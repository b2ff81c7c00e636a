"""What stands in the KV blocks of a simulated engine, and that each request reads what it would write itself.

The content of a position is all that a model's KV there depends on: the tokens up to it, and the patch under
which they were computed. A request that is given a cached block relies on the content of every position in
it. Tokens of an answer are told apart by whose they are; no two answers of a simulation share any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from tests.engine.schedulers import BLOCK

Content = tuple[int, int | str]


class Blocks:
    """The pool as workers fill it."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[int, int]]] = defaultdict(list)
        """By request, for each time it began: its patch slot and how many tokens it found computed."""
        self._held: dict[int, list[Content | None]] = defaultdict(lambda: [None] * BLOCK)
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

    def compute(self, spans: Mapping[str, tuple[int, int]], slots: Mapping[str, int]) -> None:
        """Positions ``begin`` to ``end`` of each request are computed in one pass; what is before is read.

        Within a pass all is written before anything is read: a request may be given blocks that another
        fills in the same step.
        """
        for rid, (begin, end) in spans.items():
            for held, own, read in self._blocks(rid, begin, end, slots.get(rid, 0)):
                held[read : len(own)] = own[read:]
        for rid, (begin, end) in spans.items():
            for held, own, read in self._blocks(rid, begin, end, slots.get(rid, 0)):
                assert held[:read] == own[:read], f"request {rid} reads what is not its own"

    def _blocks(
        self, rid: str, begin: int, end: int, slot: int
    ) -> Iterator[tuple[list[Content | None], list[Content], int]]:
        """What stands in each block, what the request would have there, how much of it it did not write."""
        prompt = self._prompts[rid]
        own: list[Content] = [(slot, digest) for digest in prompt[:end]]
        own += [(slot, rid)] * (end - len(own))
        for number in range(0, end, BLOCK):
            held = self._held[self._tables[rid][number // BLOCK]]
            yield held, own[number : number + BLOCK], max(min(begin - number, BLOCK), 0)


def _running(tokens: list[int]) -> list[int]:
    """A digest of the tokens up to each position."""
    found, before = [], 0
    for token in tokens:
        before = hash((before, token))
        found.append(before)
    return found
