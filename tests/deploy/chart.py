"""The Helm chart as Helm renders it, and who may talk to whom under its network policies."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
RELEASE, NAMESPACE = "guarded", "llm"

Manifest = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Helm; without it the test is skipped."""
    program = shutil.which("helm", path=str(Path(sys.executable).parent)) or shutil.which("helm")
    if program is None:
        pytest.skip("there is no helm here: .venv/bin/python scripts/helm.py .venv/bin")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def render(example: str, *options: str) -> tuple[Manifest, ...]:
    """The objects of a release. ``options`` are Helm's own, such as ``--set``, and come last."""
    done = helm("template", RELEASE, CHART, "-n", NAMESPACE, "-f", EXAMPLES[example], *options)
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each)


def refused(example: str, *options: str) -> str:
    """Why a release with these values cannot be rendered."""
    done = helm("template", RELEASE, CHART, "-f", EXAMPLES[example], *options)
    assert done.returncode != 0
    return done.stderr


def of_kind(objects: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    """Objects by name."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def workloads(objects: tuple[Manifest, ...]) -> dict[str, Manifest]:
    """Pod templates by component."""
    found = [each for each in objects if each["kind"] in ("Deployment", "StatefulSet")]
    templates = [each["spec"]["template"] for each in found]
    return {template["metadata"]["labels"]["app.kubernetes.io/component"]: template for template in templates}


def container(objects: tuple[Manifest, ...], component: str) -> Manifest:
    """The only container of a component's pods."""
    (found,) = workloads(objects)[component]["spec"]["containers"]
    return found


def chosen(selector: dict[str, str], objects: tuple[Manifest, ...]) -> set[str]:
    """Components whose pods a selector's labels choose."""
    assert selector, "an empty selector chooses everything"
    return {
        name
        for name, template in workloads(objects).items()
        if selector.items() <= template["metadata"]["labels"].items()
    }


def environment(objects: tuple[Manifest, ...], component: str) -> dict[str, str]:
    """The environment of a component's container."""
    return {each["name"]: each["value"] for each in container(objects, component).get("env", [])}


def reaches(
    objects: tuple[Manifest, ...],
    labels: dict[str, str],
    namespace: dict[str, str] | None,
    component: str,
    port: int,
) -> bool:
    """Whether a pod may connect to a component's port. ``namespace``: its namespace's labels; None: ours."""
    pod = workloads(objects)[component]["metadata"]["labels"]
    policies = [
        each["spec"]
        for each in of_kind(objects, "NetworkPolicy").values()
        if each["spec"]["podSelector"]["matchLabels"].items() <= pod.items()
    ]
    rules = [rule for policy in policies for rule in policy.get("ingress", [])]
    return not policies or any(
        any(each["port"] == port for each in rule["ports"])
        and ("from" not in rule or any(_is(peer, labels, namespace) for peer in rule["from"]))
        for rule in rules
    )


def _is(peer: Manifest, labels: dict[str, str], namespace: dict[str, str] | None) -> bool:
    wanted = peer.get("podSelector", {}).get("matchLabels", {}).items()
    if "namespaceSelector" not in peer:
        return namespace is None and wanted <= labels.items()
    place = peer["namespaceSelector"].get("matchLabels", {}).items()
    return namespace is not None and place <= namespace.items() and wanted <= labels.items()
