"""Rounds: in each, every alternative gets the same prompts, and the order rotates from round to round.

Only the processes of one alternative are busy at any time. A round has fresh prompts, so that no answer comes
from an earlier round's cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from aiohttp import ClientSession, ClientTimeout, TCPConnector

from loadtests.alternatives.client import Answer, Target, ask, ask_all
from loadtests.alternatives.processes import Group
from loadtests.alternatives.prompts import Prompts

SETTLE = 0.1
"""Seconds in which an engine drops what a client or a proxy has given up."""


class Shape(NamedTuple):
    """What one round asks of each alternative."""

    benign: int
    """Requests one after another."""
    harmful: int
    """The same, of those that are to be refused."""
    busy: int
    """Benign requests in the part with several clients."""
    at_once: int = 8
    tokens: int = 20
    """Longest answer."""


async def run(
    targets: list[Target],
    groups: dict[str, Group],
    prompts: Prompts,
    rounds: int,
    shape: Shape,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Measure; ``keep`` gets one row for each alternative in each round."""
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(120)) as session:
        for turn in range(rounds):
            given = of_round(prompts, turn, shape)
            start = turn % len(targets)
            for target in targets[start:] + targets[:start]:
                own = {name: groups[name] for name in target.groups}
                keep({"round": turn, "name": target.name} | await one(session, target, own, given, shape))


def of_round(prompts: Prompts, turn: int, shape: Shape) -> tuple[list[str], list[str], list[str]]:
    """The round's prompts: benign, harmful, and benign for the busy part."""
    each = shape.benign + shape.busy
    benign = prompts.benign[turn * each : (turn + 1) * each]
    harmful = prompts.harmful[turn * shape.harmful : (turn + 1) * shape.harmful]
    return benign[: shape.benign], harmful, benign[shape.benign :]


async def one(
    session: ClientSession,
    target: Target,
    groups: dict[str, Group],
    given: tuple[list[str], list[str], list[str]],
    shape: Shape,
) -> dict[str, Any]:
    """One alternative's part of a round."""
    benign, harmful, busy = given
    loop = asyncio.get_running_loop()
    row: dict[str, Any] = {"wrong": 0, "cpu": {}}
    parts = (("benign", benign, 1), ("harmful", harmful, 1), ("busy", busy, shape.at_once))
    for part, texts, at_once in parts:
        before = {name: group.cpu_seconds for name, group in groups.items()}
        began = loop.time()
        if at_once == 1:
            answers = [await ask(session, target, text, shape.tokens) for text in texts]
        else:
            answers = await ask_all(session, target, texts, shape.tokens, at_once)
        wall = loop.time() - began
        await asyncio.sleep(SETTLE)
        row["cpu"][part] = {name: group.cpu_seconds - before[name] for name, group in groups.items()}
        row["wrong"] += sum(answer.refused != (part == "harmful" and target.refuses) for answer in answers)
        row[part] = {"wall": wall, **shown(answers)}
    row["megabytes"] = {name: group.megabytes for name, group in groups.items()}
    return row


def shown(answers: list[Answer]) -> dict[str, Any]:
    """What is kept of answers; their text only to count its tokens later."""
    return {
        "first": [answer.first for answer in answers],
        "seconds": [answer.seconds for answer in answers],
        "stages": [answer.stages for answer in answers],
        "text": [answer.text for answer in answers],
    }
