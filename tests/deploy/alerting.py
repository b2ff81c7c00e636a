"""What the tests of Prometheus' and Alertmanager's files share: where they lie, the rules, the tools."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))


def load(path: Path) -> Any:
    """A YAML file's document."""
    return yaml.safe_load(path.read_text("utf-8"))


RULES: list[dict[str, Any]] = [
    rule for path in RULE_FILES for group in load(path)["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]


def rule_name(rule: dict[str, Any]) -> str:
    """The alert's or the recorded series' name."""
    return str(rule.get("alert") or rule["record"])


def tool(name: str, package: str) -> str:
    """Path of a program; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; Debian has it in the package {package}")
    return found


def succeeds(*command: str | Path) -> str:
    """What a command says on stdout. Fails the test, with everything it said, when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
