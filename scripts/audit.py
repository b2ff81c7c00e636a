"""Ask for known vulnerabilities of what is installed in `.venv`: `make audit`, by pip-audit.

Exit status: 0, nothing is known; 1, something is; 2, nobody could be asked. What the index does not know
pip-audit calls "skipped", and goes on. Behind a mirror without the index's JSON interface it then finds no
vulnerability because it asked about no package: that is said here, and is no success.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

SERVICES = ("pypi", "osv")
"""Asked in turn until one answers: the index itself, and osv.dev."""
OWN = "neuronguard"
SECONDS = 600


class Outcome(NamedTuple):
    """What came of it."""

    status: int
    text: str


def outcome(packages: Sequence[dict[str, Any]]) -> Outcome:
    """Of the ``dependencies`` of pip-audit's JSON report."""
    others = [package for package in packages if package["name"] != OWN]
    asked = [package for package in others if "skip_reason" not in package]
    found = [package for package in asked if package["vulns"]]
    if not asked:
        return Outcome(
            2, f"not audited: none of {len(others)} packages is known to the service that was asked"
        )
    lines = [
        f"{package['name']} {package['version']}: {each['id']}"
        + (f", fixed in {', '.join(each['fix_versions'])}" if each["fix_versions"] else "")
        for package in found
        for each in package["vulns"]
    ]
    if unknown := sorted(package["name"] for package in others if "skip_reason" in package):
        lines.append(f"not audited, unknown to the service: {', '.join(unknown)}")
    lines.append(f"{len(found)} of {len(asked)} packages have known vulnerabilities")
    return Outcome(1 if found else 0, "\n".join(lines))


def audit(tool: Sequence[str], site_packages: Path) -> Outcome:
    """Run pip-audit, with one service after the other."""
    said = Outcome(2, "not audited: no service was asked")
    for service in SERVICES:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [*tool, "--service", service, "--progress-spinner", "off", "--path", str(site_packages)]
            done = subprocess.run(
                [*command, "--format", "json", "--output", str(report)],
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            try:
                said = outcome(json.loads(report.read_text("utf-8"))["dependencies"])
            except (OSError, ValueError, KeyError):
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                said = Outcome(2, f"not audited: {service} could not be asked ({last[:200]})")
        if said.status != 2:
            break
    return said


def main() -> int:
    """Audit this environment."""
    tool = Path(sys.executable).with_name("pip-audit")
    if not tool.is_file():
        print("not audited: pip-audit is not installed; .venv/bin/pip install 'pip-audit>=2.9'")
        return 2
    said = audit([str(tool)], Path(sysconfig.get_path("purelib")))
    print(said.text)
    return said.status


if __name__ == "__main__":
    sys.exit(main())
