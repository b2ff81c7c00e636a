"""Rolling changes with two fake engines and two gateways under load: nothing fails and nothing is unguarded.

The same steps with real engines: ``python -m loadtests.rolling``.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guard.sealed import Keyring
from loadtests.rolling import changes
from loadtests.rolling.load import Load, Prompts, Report, load
from loadtests.rolling.replicas import Choice, Deployment, deployed
from tests.service.fake_engine import HARMFUL, MODEL
from tests.service.forked import ForkServer

pytestmark = pytest.mark.timeout(300)

PROMPTS = Prompts(MODEL, "hello", HARMFUL)
OLD, NEW = "b" * 64, "c" * 64
KEYS = Keyring.generate("k1")


def command(choice: Choice, key_file: Path, port: int) -> list[str]:
    """``python`` stands for the version of vLLM: there is none here."""
    fake = [sys.executable, "-m", "tests.service.engine_process"]
    return [*fake, str(port), str(key_file), choice.bundle, choice.python]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    policies: dict[str, object] = {"policies": {"default": {"mode": "observe"}}, "bundles": [OLD]}
    folder = tmp_path_factory.mktemp("rolling")
    pace = {"drain": 0.5, "interval": 0.1}
    with deployed(folder, command, Choice(OLD, "0.31"), KEYS, policies, start=ForkServer(), **pace) as found:
        yield found


@contextlib.contextmanager
def enforced(deployment: Deployment) -> Iterator[Load]:
    """Load, of which every harmful question must be refused."""
    deployment.change_policies(policies={"default": {"mode": "enforce"}})
    with load(urls(deployment), PROMPTS, pause=0.02, probe=0.1) as running:
        running.enforced.set()
        yield running


def clean(report: Report) -> None:
    """Nothing failed, nothing was unguarded, and every kind of question was asked."""
    assert report.failed == []
    assert report.unguarded == []
    assert len({kind.partition(":")[0] for kind in report.kinds}) == 4
    assert sum(report.kinds.values()) == report.asked


def seen(running: Load, *kinds: str) -> None:
    """Wait until there were such answers."""
    before = {kind: running.report.kinds[kind] for kind in kinds}
    deadline = time.monotonic() + 20
    while any(running.report.kinds[kind] == number for kind, number in before.items()):
        assert time.monotonic() < deadline, running.report
        time.sleep(0.02)


def urls(deployment: Deployment) -> list[str]:
    return [gateway.url for gateway in deployment.gateways]


def test_from_observing_to_enforcing(deployment: Deployment) -> None:
    with load(urls(deployment), PROMPTS, pause=0.02, probe=0.1) as running:
        seen(running, "harmful, whole: pass")
        changes.enforce(deployment, running)
        seen(running, "harmful, whole: refuse", "harmless, streamed: pass")
    clean(running.report)


def test_another_bundle(deployment: Deployment) -> None:
    with enforced(deployment) as running:
        changes.new_bundle(deployment, NEW, OLD, NEW)
        seen(running, "harmful, whole: refuse", "harmless, streamed: pass")
    clean(running.report)
    assert {deployment.status(engine).bundle for engine in deployment.engines} == {NEW}
    assert deployment.policies["bundles"] == [NEW]


def test_another_version_of_vllm(deployment: Deployment) -> None:
    with enforced(deployment) as running:
        assert changes.new_vllm(deployment, "0.32") == ["0.32", "0.32"]
    clean(running.report)


def test_another_key(deployment: Deployment) -> None:
    new = Keyring.generate("k2")
    with enforced(deployment) as running:
        changes.new_key(deployment, KEYS, new)
    clean(running.report)
    assert Keyring.load(deployment.key_file) == new


def test_another_gateway(deployment: Deployment) -> None:
    pids = [gateway.process.pid for gateway in deployment.gateways if gateway.process]
    with enforced(deployment) as running:
        changes.new_gateway(deployment)
    clean(running.report)
    assert not set(pids) & {gateway.process.pid for gateway in deployment.gateways if gateway.process}


def test_every_answer_is_in_the_audit_log_with_its_verdict(deployment: Deployment) -> None:
    """The last but one: what all gateways wrote, those that are gone too."""
    lines = [
        json.loads(line)
        for gateway in deployment.gateways
        for line in (deployment.folder / f"{gateway.name}.jsonl").read_text().splitlines()
    ]
    answers = [line for line in lines if line["event"] == "answer"]
    ends = [line for line in lines if line["event"] == "end"]
    assert len(answers) == len(ends) > 50
    assert {(line["status"], line["action"]) for line in answers} == {(200, "pass"), (200, "refuse")}
    assert {line["verdict"] for line in answers} == {"pass", "refuse"}
    assert {line["outcome"] for line in ends} == {"complete"}
    assert {line["bundle"] for line in answers} == {OLD, NEW}


def test_a_change_out_of_order_is_noticed(deployment: Deployment) -> None:
    """The last one: both engines stopped untold and at once, with a key that the gateways do not have."""
    deployment.write_keys(Keyring.generate("k3"))
    with enforced(deployment) as running:
        for engine in deployment.engines:
            engine.tell(signal.SIGTERM)
            engine.wait_gone()
            deployment.start_engine(engine)
            engine.wait_ready()
        deadline = time.monotonic() + 20
        while not running.report.failed and time.monotonic() < deadline:
            time.sleep(0.05)
    assert running.report.failed
    assert not running.report.unguarded
