"""The compose file for real: images are built, the stack comes up, requests are refused, Prometheus knows.

Needs a Docker engine with BuildKit, and a registry or the stand-ins of ``local-images.sh``. Grafana takes
part if its image is there or can be pulled. Run it with ``pytest -m docker tests/deploy/test_docker.py -rs``.

The questions that must be refused are known to be refused by the shipped bundle: what is tested is that the
composition does what its engine decides, not how much the guard catches.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.servers import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
DOCKER = os.environ.get("NEURONGUARD_TEST_DOCKER", "docker")
BUILD_ARGS = os.environ.get("NEURONGUARD_TEST_BUILD_ARGS", "").split()
BUILD_FLAGS = os.environ.get("NEURONGUARD_TEST_BUILD_FLAGS", "").split()
TARGETS = ("gateway", "engine-cpu", "load")
PROMPTS = json.loads((ROOT / "loadtests/traffic/prompts.json").read_text("utf-8"))
REFUSED = 'sum(guard_requests_total{action="refuse",policy="default"})'


def run(*command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done


def have(image: str) -> bool:
    """Whether an image is here or can be pulled."""
    if run(DOCKER, "image", "inspect", image, check=False).returncode == 0:
        return True
    return run(DOCKER, "pull", "--quiet", image, check=False, timeout=600).returncode == 0


def default_image(variable: str) -> str:
    for file in ("Dockerfile", "docker-compose.yml"):
        found = re.search(rf"\b{variable}(?:=|:-)([^}}\s]+)", (ROOT / file).read_text("utf-8"))
        if found:
            return found[1]
    raise AssertionError(variable)


@pytest.fixture(scope="module")
def engine() -> None:
    if shutil.which(DOCKER) is None or run(DOCKER, "info", check=False).returncode != 0:
        pytest.skip("no Docker engine answers: install Debian's docker.io and start dockerd")
    arguments = dict(pair.split("=", 1) for pair in BUILD_ARGS)
    needed = {
        name: os.environ.get(name) or arguments.get(name) or default_image(name)
        for name in ("PYTHON_IMAGE", "PROMETHEUS_IMAGE", "ALERTMANAGER_IMAGE")
    }
    missing = [image for image in needed.values() if not have(image)]
    if missing:
        pytest.skip(f"{', '.join(missing)} cannot be pulled: see tests/deploy/local-images.sh")


@pytest.fixture(scope="module")
def images(engine: None) -> dict[str, str]:
    """The images of this tree by target, built now."""
    made = {}
    for target in TARGETS:
        made[target] = f"neuronguard-test/{target}:current"
        arguments = [part for pair in BUILD_ARGS for part in ("--build-arg", pair)]
        run(
            *(DOCKER, "build", "--target", target, "--tag", made[target], *arguments, *BUILD_FLAGS, "."),
            cwd=ROOT,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
    return made


class Stack:
    """A running composition."""

    def __init__(self, folder: Path, images: dict[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"ngtest{os.getpid()}",
            "COMPOSE_PROFILES": "cpu,load",
            "NEURONGUARD_PORT": str(self.port),
            "GRAFANA_PORT": str(free_port()),
            "NEURONGUARD_LOAD_TIME": "40s",
            "NEURONGUARD_GATEWAY_IMAGE": images["gateway"],
            "NEURONGUARD_ENGINE_CPU_IMAGE": images["engine-cpu"],
            "NEURONGUARD_LOAD_IMAGE": images["load"],
        }
        v2 = run(DOCKER, "compose", "version", check=False).returncode == 0
        self.command = (DOCKER, "compose") if v2 else ("docker-compose",)
        grafana = os.environ.get("GRAFANA_IMAGE") or default_image("GRAFANA_IMAGE")
        self.services = ["init", "gateway", "engine-cpu", "prometheus", "alertmanager", "load"]
        if have(grafana):
            self.services.append("grafana")

    def compose(self, *arguments: str, check: bool = True) -> str:
        done = run(*self.command, *arguments, cwd=self.folder, env=self.environment, check=check)
        return done.stdout

    def container(self, service: str) -> dict[str, Any]:
        name = self.compose("ps", "-q", service).strip()
        found: dict[str, Any] = json.loads(run(DOCKER, "inspect", name).stdout)[0]
        return found

    def inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        name = self.compose("ps", "-q", service).strip()
        return run(DOCKER, "exec", name, *command, check=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, name: str = "api-key") -> openai.OpenAI:
        key = (self.folder / "deploy/secrets/client" / name).read_text().strip()
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    def query(self, expression: str) -> float:
        """The one value of an expression in the stack's Prometheus; 0 when there is none."""
        done = self.inside("prometheus", "promtool", "query", "instant", "http://127.0.0.1:9090", expression)
        found = re.search(r"=> (\S+)", done.stdout)
        return float(found[1]) if found else 0.0


def eventually(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(1.0)


@pytest.fixture(scope="module")
def stack(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("compose")
    for name in ("docker-compose.yml", ".env", "Dockerfile"):
        shutil.copy(ROOT / name, folder / name)
    # Not the operator's own secrets, if there are any.
    shutil.copytree(
        ROOT / "deploy",
        folder / "deploy",
        ignore=lambda place, names: names if Path(place).parent.name == "secrets" else [],
    )
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs/operations.md", folder / "docs/operations.md")
    made = Stack(folder, images)
    try:
        made.compose("up", "--detach", "--no-build", *made.services)
        eventually(made.ready, "the endpoint is ready", 300)
        yield made
    finally:
        sys.stdout.write(made.compose("logs", "--no-color", "--tail", "30", check=False))
        made.compose("down", "--volumes", check=False)


class TestImages:
    def test_the_gateway_is_small(self, images: dict[str, str]) -> None:
        size = int(run(DOCKER, "image", "inspect", "--format", "{{.Size}}", images["gateway"]).stdout)
        assert size <= 250e6

    @pytest.mark.parametrize("target", TARGETS)
    def test_user_health_and_no_build_tools(self, images: dict[str, str], target: str) -> None:
        config = json.loads(run(DOCKER, "image", "inspect", images[target]).stdout)[0]["Config"]
        assert config["User"] == "10001:10001"
        assert target == "load" or config["Healthcheck"]["Test"][0] == "CMD"
        listing = run(
            *(DOCKER, "run", "--rm", "--network", "none", "--entrypoint", "sh", images[target]),
            *("-c", "for tool in gcc cc g++ make ld; do command -v $tool; done; ls /opt/venv/bin"),
        ).stdout.split()
        assert not {tool for tool in listing if tool.startswith(("/usr/bin", "pip"))}

    def test_the_gateway_has_neither_torch_nor_vllm(self, images: dict[str, str]) -> None:
        code = "import importlib.util as u; print([n for n in ('torch', 'vllm', 'numpy') if u.find_spec(n)])"
        command = (DOCKER, "run", "--rm", "--entrypoint", "python3", images["gateway"], "-c", code)
        assert run(*command).stdout.strip() == "[]"


class TestStack:
    def test_benign_is_answered_and_unwelcome_refused(self, stack: Stack) -> None:
        with stack.client() as client:
            for kind, finished in (("everyday", 1), ("unwelcome", 0)):
                for prompt in PROMPTS[kind][:5]:
                    got = client.chat.completions.with_raw_response.create(
                        model="lab-partial", messages=[{"role": "user", "content": prompt}], max_tokens=8
                    )
                    assert got.headers["x-guard-action"] == ("pass" if finished else "refuse")
                    assert (got.parse().usage.completion_tokens > 0) == bool(finished)

    def test_the_observing_key_is_always_answered(self, stack: Stack) -> None:
        with stack.client("api-key-observe") as client:
            messages = [{"role": "user", "content": PROMPTS["unwelcome"][0]}]
            got = client.chat.completions.create(model="lab-partial", messages=messages, max_tokens=8)
            assert got.usage.completion_tokens > 0

    def test_no_key_no_answer(self, stack: Stack) -> None:
        assert httpx.post(f"{stack.url}/v1/chat/completions", json={}).status_code == 401
        assert httpx.get(f"{stack.url}/metrics").status_code == 404

    def test_prometheus_counts_the_refusals(self, stack: Stack) -> None:
        eventually(lambda: stack.query(REFUSED) >= 5, "Prometheus has the refusals", 60)
        assert stack.query("sum(up)") == stack.query("count(up)") == 4
        assert stack.query("sum(guard_bypass_total)") == 0
        assert stack.query("guard_engine_ready") == 1

    def test_the_load_service_fills_the_dashboard(self, stack: Stack) -> None:
        eventually(lambda: stack.container("load")["State"]["Status"] == "exited", "the load ends", 120)
        assert stack.container("load")["State"]["ExitCode"] == 0, stack.compose("logs", "load")
        observed = 'sum(guard_requests_total{mode="observe",verdict="refuse",action="pass"})'
        eventually(lambda: stack.query(observed) > 0, "observed refusals", 60)

    def test_only_the_gateway_is_published(self, stack: Stack) -> None:
        for service in stack.services:
            if service in ("init", "load"):
                continue
            ports = stack.container(service)["HostConfig"]["PortBindings"] or {}
            assert bool(ports) == (service in ("gateway", "grafana")), service

    def test_the_engine_is_on_an_internal_network_only(self, stack: Stack) -> None:
        networks = list(stack.container("engine-cpu")["NetworkSettings"]["Networks"])
        found = json.loads(run(DOCKER, "network", "inspect", *networks).stdout)
        assert [network["Internal"] for network in found] == [True]

    @pytest.mark.parametrize("service", ["gateway", "engine-cpu"])
    def test_unprivileged_and_read_only(self, stack: Stack, service: str) -> None:
        assert stack.inside(service, "id", "-u").stdout.strip() == "10001"
        assert "Read-only" in stack.inside(service, "touch", "/opt/neuronguard/x").stderr
        assert stack.container(service)["HostConfig"]["CapDrop"] == ["ALL"]

    def test_secrets_are_not_in_the_environment_or_the_logs(self, stack: Stack) -> None:
        secrets = [
            part
            for path in (stack.folder / "deploy/secrets").rglob("*")
            if path.is_file() and path.name in ("guard.keys", "api-key", "api-key-observe", "admin-password")
            for part in path.read_text().strip().split(":")[-1:]
        ]
        assert len(secrets) == 4
        seen = stack.compose("logs") + "".join(
            json.dumps(stack.container(service)["Config"]) for service in stack.services
        )
        assert not any(secret in seen for secret in secrets)

    def test_without_its_engine_the_endpoint_fails_closed_and_the_alert_reaches_alertmanager(
        self, stack: Stack
    ) -> None:
        stack.compose("stop", "engine-cpu")
        eventually(lambda: not stack.ready(), "not ready", 60)
        with stack.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(
                model="lab-partial", messages=[{"role": "user", "content": "Hello"}]
            )
        assert caught.value.status_code == 503

        def told() -> bool:
            command = ("amtool", "alert", "query", "GuardEngineDown", "--alertmanager.url")
            done = stack.inside("alertmanager", *command, "http://127.0.0.1:9093")
            return "GuardEngineDown" in done.stdout

        eventually(told, "Alertmanager knows", 360)
        stack.compose("start", "engine-cpu")
        eventually(stack.ready, "ready again", 300)
        with stack.client() as client:
            messages = [{"role": "user", "content": PROMPTS["everyday"][0]}]
            assert client.chat.completions.create(model="lab-partial", messages=messages, max_tokens=4)
