"""GuideLLM against one server: what to run, and what its JSON says.

GuideLLM comes from an installation of its own. ``sweep`` finds the least load (one request after another) and
the most the server takes, and runs constant rates between the two; ``constant`` is one rate, an open loop.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import bootstrap

AT_ONCE = 32
"""Requests at one time in a sweep, at most: twice as many as the engines run."""


class Server(NamedTuple):
    """Where GuideLLM sends its requests."""

    url: str
    key: str
    model: str
    tokenizer: Path


class Rates(NamedTuple):
    """What to run."""

    seconds: float
    """For each rate."""
    steps: int
    """Of the sweep, the least and the most included."""
    constant: float | None
    """Requests a second; None: half of the most that the sweep finds."""


def sweep(
    command: Path, server: Server, rates: Rates, data: Path, tokens: int, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """A sweep, and one constant rate. ``out`` is a folder for GuideLLM's own reports."""
    out.mkdir(parents=True, exist_ok=True)

    def ran(profile: str, name: str) -> list[dict[str, Any]]:
        return run(command, server, profile, rates.seconds, data, tokens, out / f"{name}.json")

    swept = ran(f"kind=sweep,sweep_size={rates.steps},max_concurrency={AT_ONCE}", "sweep")
    rate = rates.constant or max(figures["requests_per_second"] for figures in swept) / 2
    return {"sweep": swept, "constant": ran(f"kind=constant,rate={rate:.2f}", "constant")}


def run(
    command: Path, server: Server, profile: str, seconds: float, data: Path, tokens: int, out: Path
) -> list[dict[str, Any]]:
    """Run one profile, as ``kind=…,…``; returns what was measured at each of its rates.

    ``out`` is where GuideLLM writes its report. Raises subprocess.SubprocessError; the log is beside it.
    """
    backend = {
        "kind": "openai_http",
        "target": server.url,
        "model": server.model,
        "api_key": server.key,
        "max_tokens": tokens,
        "http2": False,
        "validate_backend": False,
        # It would ask for usage in every frame, an extension of vLLM's that the gateway does not take.
        "extras": {"body": {"stream_options": None}},
    }
    arguments = [
        *(str(command), "run", "--disable-console"),
        *("--backend", json.dumps(backend)),
        *("--profile", profile),
        *("--constraint", f"kind=max_duration,seconds={seconds}"),
        *("--tokenizer", f"kind=huggingface_auto,model={server.tokenizer}"),
        *("--data", f"kind=json_file,path={data}"),
        *("--output", f"kind=json,path={out}"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with out.with_suffix(".log").open("w") as log:
        subprocess.run(
            arguments, env=environment, stdout=log, stderr=log, check=True, timeout=120 + 20 * seconds
        )
    return read(out)


def read(file: Path) -> list[dict[str, Any]]:
    """The figures of each benchmark of a report; times in milliseconds."""
    return [_figures(benchmark) for benchmark in json.loads(file.read_text())["benchmarks"]]


def _figures(benchmark: dict[str, Any]) -> dict[str, Any]:
    requests = benchmark["requests"]
    done = requests["successful"]
    first = [request["time_to_first_token_ms"] for request in done if request["time_to_first_token_ms"]]
    strategy = benchmark["config"]["strategy"]
    metrics = benchmark["metrics"]
    return {
        "strategy": strategy["type_"],
        "rate": strategy.get("rate"),
        "requests": len(done),
        "failed": len(requests["errored"]),
        "requests_per_second": metrics["requests_per_second"]["successful"]["mean"],
        "tokens_per_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "first_p50_ms": percentile(first, 50),
        "first_p99_ms": percentile(first, 99),
        "between_p50_ms": metrics["inter_token_latency_ms"]["successful"]["percentiles"]["p50"],
    }


def percentile(values: list[float], q: float) -> dict[str, float]:
    """A percentile with its 95 % percentile bootstrap interval over requests, seeded."""
    if len(values) < 2:
        value = values[0] if values else float("nan")
        return {"value": value, "low": value, "high": value}
    sample = (np.asarray(values),)
    found = bootstrap(
        sample,
        lambda x, axis: np.percentile(x, q, axis=axis),
        n_resamples=1000,
        method="percentile",
        random_state=0,
    ).confidence_interval
    value = float(np.percentile(values, q))
    return {"value": value, "low": float(found.low), "high": float(found.high)}
