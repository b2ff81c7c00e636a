"""Tables, picture and JSON of the comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loadtests.alternatives.figures import figures

BASE = "stock vLLM"


def count_tokens(rows: list[dict[str, Any]], model: Path) -> None:
    """Put the number of tokens of the busy answers into each row, and take the texts out."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in rows:
        texts = row["busy"]["text"]
        row["busy"]["tokens"] = sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in texts)
        for part in ("benign", "harmful", "busy"):
            del row[part]["text"]


def write(document: dict[str, Any], out: Path) -> None:
    """Work the figures out and write everything."""
    for subject in document["subjects"].values():
        subject["figures"] = figures(subject["rows"], BASE)
    (out / "alternatives.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "alternatives.md").write_text(tables(document["subjects"]))
    picture(document["subjects"], out / "alternatives.png")


def tables(subjects: dict[str, Any]) -> str:
    """Markdown: the figures, where the time goes, where the CPU time goes."""
    lines: list[str] = []
    for name, subject in subjects.items():
        lines += [f"### {name}", "", *_asked(subject), *_main(subject["figures"]), ""]
        lines += _stages(subject["figures"])
        lines += ["", *_cpu(subject["figures"]), ""]
        lines += [f"{product} did not run: {why}." for product, why in subject["stopped"].items()]
        lines += [""] if subject["stopped"] else []
    return "\n".join(lines)


def _asked(subject: dict[str, Any]) -> list[str]:
    asked = subject["shape"]
    said = f"{subject['rounds']} rounds of {asked['benign']} benign and {asked['harmful']} harmful prompts"
    return [f"{said}, and {asked['busy']} benign ones, {asked['at_once']} at a time.", ""]


def _main(found: dict[str, Any]) -> list[str]:
    lines = [
        "| | first token p50, ms | p99 | refusal p50, ms | p99 | tokens/s | CPU ms an answer | a refusal "
        "| MB | wrong |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, own in found.items():
        refuses = name != BASE
        cells = [
            _cell(own["first_p50_ms"]),
            _cell(own["first_p99_ms"]),
            _cell(own["refusal_p50_ms"]) if refuses else "–",
            _cell(own["refusal_p99_ms"]) if refuses else "–",
            _cell(own["tokens_per_second"]),
            _cell(own["cpu_ms_per_answer"]),
            _cell(own["cpu_ms_per_refusal"]) if refuses else "–",
            f"{own['megabytes']:.0f}",
            f"{own['wrong']} of {own['answers'] + own['refusals']}" if refuses else "–",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The same over {BASE} in the same rounds (refusals over its first token and its CPU an answer):",
        "",
        "| | first token p50 | refusal p50 | tokens/s | CPU an answer | CPU a refusal | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, own in found.items():
        if name == BASE:
            continue
        keys = (
            "first_p50_ms",
            "refusal_p50_ms",
            "tokens_per_second",
            "cpu_ms_per_answer",
            "cpu_ms_per_refusal",
        )
        cells = [_cell(own["ratio"][key], 2) for key in keys]
        cells.append(f"{own['megabytes'] / found[BASE]['megabytes']:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(value: dict[str, float], digits: int = 0) -> str:
    return f"{value['value']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def _stages(found: dict[str, Any]) -> list[str]:
    lines = [
        "Where the time to the first token goes, by the proxies' own clocks, medians in ms; what is left of "
        "the whole is HTTP and the proxy:",
        "",
        "| | whole | stages |",
        "|---|--:|---|",
    ]
    for name, own in found.items():
        stages = own["stages_ms"]["benign"]
        if stages:
            said = ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items())
            lines.append(f"| {name} | {own['first_p50_ms']['value']:.1f} | {said} |")
    return lines


def _cpu(found: dict[str, Any]) -> list[str]:
    lines = [
        "CPU milliseconds by process, an answered request among eight, and a refused one alone:",
        "",
        "| | an answer | a refusal |",
        "|---|---|---|",
    ]
    for name, own in found.items():
        cells = [
            ", ".join(f"{group} {ms:.0f}" for group, ms in own["cpu_ms"][part].items())
            for part in ("busy", "harmful")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1] if name != BASE else '–'} |")
    return lines


def picture(subjects: dict[str, Any], path: Path) -> None:
    """Time to first token, time to refusal and throughput over stock vLLM, with intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    keys = {
        "first_p50_ms": "time to first token",
        "refusal_p50_ms": "time to refusal",
        "tokens_per_second": "tokens per second",
        "cpu_ms_per_answer": "CPU time an answer",
    }
    drawn, axes = pyplot.subplots(
        len(subjects), len(keys), figsize=(12, 0.6 + 3.0 * len(subjects)), sharey="row", squeeze=False
    )
    for row, (subject, document) in enumerate(subjects.items()):
        found = {name: own["ratio"] for name, own in document["figures"].items() if name != BASE}
        names = list(found)[::-1]
        for column, (key, title) in enumerate(keys.items()):
            axis = axes[row][column]
            values = [found[name][key] for name in names]
            middle = [value["value"] for value in values]
            spans = [
                [value["value"] - value["low"] for value in values],
                [value["high"] - value["value"] for value in values],
            ]
            colours = ["tab:orange" if name == "this guard" else "tab:blue" for name in names]
            axis.barh(names, middle, xerr=spans, color=colours, height=0.6, error_kw={"lw": 0.8})
            axis.axvline(1.0, color="grey", lw=0.8, ls="--")
            axis.tick_params(labelsize=7)
            axis.set_title(f"{title}\n{subject}" if column == 0 else title, fontsize=8)
    drawn.supxlabel("over stock vLLM in the same rounds, 95 % intervals", fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)
