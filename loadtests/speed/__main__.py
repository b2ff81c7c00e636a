"""``python -m loadtests.speed``: measure the guard beside its alternatives and under load, and write it down.

Runs ``loadtests.alternatives`` and ``loadtests.load`` one after the other and writes ``speed.md``,
``speed.json`` and pictures. What others make has to be installed apart, each in an environment of its own,
and named by an option or its variable; what is not named is left out. ``--from`` writes the page anew from
figures that are there.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from loadtests.alternatives import __main__ as alternatives
from loadtests.alternatives import report
from loadtests.alternatives.products import Installations
from loadtests.load import __main__ as load
from loadtests.load import report as load_report
from loadtests.speed.facts import facts

FINDINGS = Path(__file__).parent / "findings.md"


def page(document: dict[str, Any], images: str) -> str:
    """The whole page: findings, then every table."""
    where = document["facts"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    shape: dict[str, Any] = next(iter(document["alternatives"]["subjects"].values()), {})
    lines = [
        FINDINGS.read_text("utf-8").rstrip(),
        "",
        "## Figures",
        "",
        f"{where['cpu']}, {where['cores']} cores, {where['memory_gib']} GiB, load average before the run "
        f"{where['load_before'][0]}; commit {where['commit']}, Python {where['python']}; {versions}. Engines "
        "run in float32 with one thread each. Brackets are 95 % bootstrap intervals: over rounds beside the "
        "alternatives, over requests for GuideLLM's.",
        "",
    ]
    if shape:
        lines += [
            "## Beside the alternatives",
            "",
            "In each round, every alternative gets benign and harmful prompts one after another, then benign "
            "ones eight at a time, for tokens and CPU time; at most 20 tokens an answer. The order rotates.",
            "",
            f"![Ratios to stock vLLM]({images}/speed-alternatives.png)",
            "",
            report.tables(document["alternatives"]["subjects"]).rstrip(),
            "",
        ]
    if document["load"]:
        lines += ["## Under load", "", f"![Sweeps]({images}/speed-load.png)", ""]
        lines += [load_report.tables(document["load"]).rstrip(), ""]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True, help="beside the alternatives")
@click.option("--seconds", default=8.0, show_default=True, help="for each rate and each run of the mix")
@click.option("--litellm", type=click.Path(path_type=Path), envvar="NEURONGUARD_LITELLM")
@click.option("--nemo", type=click.Path(path_type=Path), envvar="NEURONGUARD_NEMO")
@click.option("--llm-guard", type=click.Path(path_type=Path), envvar="NEURONGUARD_LLM_GUARD")
@click.option("--guidellm", type=click.Path(path_type=Path), envvar="NEURONGUARD_GUIDELLM")
@click.option("--locust", type=click.Path(path_type=Path), envvar="NEURONGUARD_LOCUST")
@click.option(
    "--from", "source", type=click.Path(path_type=Path, exists=True), help="folder of an earlier run"
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/speed"), show_default=True)
@click.option("--docs", type=click.Path(path_type=Path), default=Path("docs"), show_default=True)
def main(
    rounds: int,
    seconds: float,
    litellm: Path | None,
    nemo: Path | None,
    llm_guard: Path | None,
    guidellm: Path | None,
    locust: Path | None,
    source: Path | None,
    out: Path,
    docs: Path,
) -> None:
    """Measure, unless told otherwise, and write the page."""
    if source is None:
        out.mkdir(parents=True, exist_ok=True)
        others = {"litellm": litellm, "nemo": nemo, "llm_guard": llm_guard}
        found = facts(others | {"guidellm": guidellm, "locust": locust})
        (out / "facts.json").write_text(json.dumps(found, indent=1) + "\n")
        alternatives.run(rounds, (), Installations(**others), out)
        load.run(guidellm, locust, seconds, out=out)
    write(source or out, docs)


def write(source: Path, docs: Path) -> None:
    """The page, its figures and pictures, from the files of a run."""
    parts = {
        "facts": "facts.json",
        "alternatives": "alternatives.json",
        "load": "load.json",
    }
    document = {
        name: json.loads((source / file).read_text()) if (source / file).exists() else {}
        for name, file in parts.items()
    }
    document["alternatives"].setdefault("subjects", {})
    results, images = docs / "results", docs / "images"
    results.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    (results / "speed.md").write_text(page(document, "../images"))
    for name in ("alternatives", "load"):
        if (source / f"{name}.png").exists():
            shutil.copy(source / f"{name}.png", images / f"speed-{name}.png")
    for subject in document["alternatives"]["subjects"].values():
        for row in subject["rows"]:
            for part in ("benign", "harmful", "busy"):
                row[part].pop("stages", None)
    (results / "speed.json").write_text(json.dumps(_rounded(document)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    return [_rounded(own) for own in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
