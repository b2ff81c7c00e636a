"""Tables and picture of the load tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODES = {"off": "stock vLLM", "observe": "guard, observing", "enforce": "guard, enforcing"}


def tables(document: dict[str, Any]) -> str:
    """Markdown: the sweep, the constant rate, and the mix."""
    lines = [
        "| GuideLLM | | requests/s | tokens/s | first token p50, ms | p99 | between tokens p50, ms "
        "| requests | failed |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for profile in ("sweep", "constant"):
        for mode, title in MODES.items():
            for run in document["guidellm"].get(mode, {}).get(profile, ()):
                what = run["strategy"] + (f", {run['rate']:.1f}/s" if run["rate"] else "")
                cells = [
                    f"{run['requests_per_second']:.1f}",
                    f"{run['tokens_per_second']:.0f}",
                    _cell(run["first_p50_ms"]),
                    _cell(run["first_p99_ms"]),
                    f"{run['between_p50_ms']:.1f}",
                    str(run["requests"]),
                    str(run["failed"]),
                ]
                lines.append(f"| {title} | {what} | {' | '.join(cells)} |")
    lines += [
        "",
        "| mix of clients | loop | kind | requests | failed | requests/s | first text p50, ms | p99 |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for loop in ("closed", "open"):
        for mode, title in MODES.items():
            for kind, own in document["mix"].get(mode, {}).get(loop, {}).items():
                first = [own["first_p50_ms"], own["first_p99_ms"]]
                cells = [str(own["requests"]), str(own["failed"]), f"{own['requests_per_second']:.1f}"]
                cells += ["–" if ms is None else f"{ms:.0f}" for ms in first]
                lines.append(f"| {title} | {loop} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float]) -> str:
    return f"{value['value']:.0f} [{value['low']:.0f}, {value['high']:.0f}]"


def picture(document: dict[str, Any], path: Path) -> None:
    """Time to first token by request rate of the sweep, and tokens a second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawn, (first, tokens) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for mode, title in MODES.items():
        runs = sorted(document["guidellm"][mode]["sweep"], key=lambda run: run["requests_per_second"])
        rate = [run["requests_per_second"] for run in runs]
        middle = [run["first_p50_ms"] for run in runs]
        spans = [[m["value"] - m["low"] for m in middle], [m["high"] - m["value"] for m in middle]]
        first.errorbar(
            rate, [m["value"] for m in middle], spans, marker="o", ms=3, lw=1, capsize=2, label=title
        )
        tokens.plot(rate, [run["tokens_per_second"] for run in runs], marker="o", ms=3, lw=1, label=title)
    first.set_yscale("log")
    first.set_ylabel("time to first token p50, ms")
    tokens.set_ylabel("output tokens per second")
    for axis in (first, tokens):
        axis.set_xlabel("requests per second, done")
        axis.legend(fontsize=7, frameon=False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
