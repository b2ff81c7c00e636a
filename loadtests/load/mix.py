"""The Locust mix (``loadtests.traffic.mix``) against one server: how to run it, and what its JSON says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).parent.parent / "traffic" / "mix.py"


class Wish(NamedTuple):
    """What to run."""

    host: str
    mode: str
    """``off``, ``observe`` or ``enforce``."""
    keys: list[str]
    prompts: dict[str, list[str]]
    users: int
    seconds: float
    pace: float
    """Seconds between the beginnings of two requests of one client; 0: the next when the last has ended."""
    model: str = "model"
    tokens: int = 24


def run(command: Path, wish: Wish, folder: Path, name: str) -> dict[str, Any]:
    """Run the mix; returns figures for each kind of client and for all of them."""
    settings = folder / f"{name}-mix.json"
    settings.write_text(json.dumps(wish._asdict()))
    arguments = [
        *(str(command), "--headless", "--locustfile", str(FILE), "--host", wish.host, "--only-summary"),
        *("--users", str(wish.users), "--spawn-rate", str(wish.users)),
        *("--run-time", f"{wish.seconds:.0f}s", "--json-file", str(folder / name)),
    ]
    with (folder / f"{name}.log").open("w") as log:
        # Locust's status says whether any request failed, which the figures say as well.
        subprocess.run(
            arguments,
            env=os.environ | {"MIX_FILE": str(settings)},
            stdout=log,
            stderr=log,
            check=False,
            timeout=120 + 2 * wish.seconds,
        )
    return figures(json.loads((folder / f"{name}.json").read_text()))


def figures(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures by kind of client, and ``all``; times in milliseconds, as whole milliseconds of Locust's."""
    found: dict[str, Any] = {}
    for name in (*sorted({entry["name"] for entry in entries}), "all"):
        own = [entry for entry in entries if name in (entry["name"], "all")]
        requests = [entry for entry in own if entry["method"] == "POST"]
        first = [entry for entry in own if entry["method"] == "FIRST"]
        count = sum(entry["num_requests"] for entry in requests)
        if not count:
            continue
        span = max(e["last_request_timestamp"] for e in requests) - min(e["start_time"] for e in requests)
        found[name] = {
            "requests": count,
            "failed": sum(entry["num_failures"] for entry in requests),
            "requests_per_second": count / span if span > 0 else 0.0,
            "first_p50_ms": quantile(first, 0.5),
            "first_p99_ms": quantile(first, 0.99),
        }
    return found


def quantile(entries: list[dict[str, Any]], q: float) -> float | None:
    """A quantile over the histograms of several entries: Locust keeps counts by (rounded) milliseconds."""
    counts: dict[float, int] = {}
    for entry in entries:
        for milliseconds, count in entry["response_times"].items():
            counts[float(milliseconds)] = counts.get(float(milliseconds), 0) + count
    left = q * sum(counts.values())
    for milliseconds in sorted(counts):
        left -= counts[milliseconds]
        if left <= 0:
            return milliseconds
    return None
