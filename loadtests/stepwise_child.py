"""A guarded engine whose guard is turned off and on between two steps, told over stdin what to run.

Steps of one kind that follow one another differ by chance, but the pace of a machine that others use, too,
changes little within a tenth of a second: comparing neighbours takes that out. A command is
``{"what": "prefill" | "decode", "prompts": [[…]], "cycles": 40, "watched": false}``; with ``watched`` all
answers are watched as they grow, and none is stopped. The answer has, for each of ``WAYS``, the process CPU
seconds of as many steps:

- *prefill*: as many equal shares of the prompts as there are cycles, each read in one step, in each way;
- *decode*: all prompts are read guarded, and each decode step is made in the next way. What a plain step has
  not scored stays as it was in the table of scores, which is first filled with zeros, so that a monitor has
  numbers to pool.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

from guard.monitor import Monitor
from guard.sealed import Keyring
from guard.verdict import Decision
from loadtests.orders import Answer, parameters, serve

OUT_OF_REACH = 1e9
"""A limit of the monitor that no score reaches."""
WATCHED = Decision(policy="bench", rules=(), monitor=Monitor(logit=OUT_OF_REACH))
WAYS = ("plain", "guarded", "control")
"""``control``: plain once more."""


def order(cycle: int) -> tuple[str, ...]:
    """The ways of one cycle; each comes first in turn."""
    start = cycle % len(WAYS)
    return WAYS[start:] + WAYS[:start]


def prepare(llm: Any, keys: Keyring) -> Answer:
    """What answers a command."""
    from loadtests.switch import Switch

    llm.llm_engine.model_executor.driver_worker.worker.taps._table.zero_()
    run = Run(llm.llm_engine, Switch(llm), keys)

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        what = {"prefill": run.prefill, "decode": run.decode}[command.pop("what")]
        found = what(**command)
        llm.reset_prefix_cache()
        return found

    return answer


class Run:
    """Timings of single steps of an in-process engine; ``switch`` has ``on`` and ``off``."""

    def __init__(self, engine: Any, switch: Any, keys: Keyring) -> None:
        self._engine = engine
        self._switch = switch
        self._keys = keys
        self._names: Iterator[int] = iter(range(sys.maxsize))

    def prefill(self, prompts: list[list[int]], cycles: int, watched: bool) -> dict[str, list[float]]:
        """Each of ``cycles`` reads its share of ``prompts`` in every way."""
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        share = len(prompts) // cycles
        for cycle in range(cycles):
            for way in order(cycle):
                self._turn(way)
                self._add(prompts[cycle * share : (cycle + 1) * share], 1, watched)
                found[way].append(self._timed())
                self._expect_end()
                self._engine.reset_prefix_cache()
        return found

    def decode(self, prompts: list[list[int]], cycles: int, watched: bool) -> dict[str, list[float]]:
        """All prompts at once, for as many tokens as the cycles have steps, and two."""
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        self._turn("guarded")
        self._add(prompts, len(WAYS) * cycles + 2, watched)
        self._engine.step()
        for cycle in range(cycles):
            for way in order(cycle):
                self._turn(way)
                found[way].append(self._timed())
        self._turn("guarded")
        self._engine.step()
        self._expect_end()
        return found

    def _turn(self, way: str) -> None:
        (self._switch.on if way == "guarded" else self._switch.off)()

    def _add(self, prompts: list[list[int]], tokens: int, watched: bool) -> None:
        for prompt in prompts:
            params = parameters(self._keys, WATCHED if watched else None, tokens)
            self._engine.add_request(str(next(self._names)), {"prompt_token_ids": prompt}, params)

    def _timed(self) -> float:
        before = time.process_time()
        self._engine.step()
        return time.process_time() - before

    def _expect_end(self) -> None:
        """Steps that do not do what is timed here would leave something, or have ended before."""
        if self._engine.has_unfinished_requests():
            raise RuntimeError("requests took more steps than was expected of them")


if __name__ == "__main__":
    serve(prepare)
