"""The soak finds leaks, and finds none in the gateway."""

from __future__ import annotations

import hashlib
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from loadtests.soak.leaks import findings, growth
from loadtests.soak.run import Result, soak
from loadtests.soak.traffic import Traffic
from loadtests.soak.watch import Watch
from tests.e2e.servers import free_port, process, wait_until
from tests.service.fake_engine import HARMFUL, MODEL, FakeEngine
from tests.service.processes import gateway_process
from tests.service.world import serving

KEYS = ["sk-soak-a", "sk-soak-b"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[str]:
    fake = FakeEngine()
    fake.keys.save(tmp_path / "keys")
    keys = [
        {"sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": key[3:], "rights": ["chat", "checks"]}
        for key in KEYS
    ]
    (tmp_path / "policies.yaml").write_text(yaml.safe_dump({"policies": {"default": {}}, "keys": keys}))
    with serving(fake) as url:
        yield url


async def soaked(url: str, pid: int, seconds: float) -> Result:
    traffic = Traffic(url, MODEL, ["hello", "good morning"], [HARMFUL], KEYS, pause=0.02)
    watch = Watch({"gateway": pid}, {"gateway": f"{url}/metrics"})
    return await soak(traffic, watch, seconds, clients=4, interval=0.4, warm=2.0, megabytes=8.0)


async def test_the_gateway_keeps_nothing_of_its_requests(engine: str, tmp_path: Path) -> None:
    files = {"policy_file": str(tmp_path / "policies.yaml")}
    with gateway_process(tmp_path, engine, tmp_path / "keys", **files) as gateway:
        result = await soaked(gateway.url, gateway.child.pid, 12.0)
    assert result.problems == []
    kinds = {kind.split()[0] for kind in result.counts}
    assert kinds >= {"whole", "stream", "refused", "check", "left", "gone", "slow", "malformed", "stranger"}
    looked_at = {one.name for one in result.findings}
    assert looked_at >= {"gateway: MB", "gateway: files", "gateway: tasks", "gateway: requests held"}


async def test_a_gateway_that_leaks_is_found_out(engine: str, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "leaking.log"
    environment = {
        "NEURONGUARD_ENGINE_URL": engine,
        "NEURONGUARD_KEY_FILE": str(tmp_path / "keys"),
        "NEURONGUARD_POLICY_FILE": str(tmp_path / "policies.yaml"),
        "NEURONGUARD_AUDIT_FILE": str(tmp_path / "audit.jsonl"),
        "NEURONGUARD_PORT": str(port),
    }
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "tests.loadtests.leaking_gateway"]
    with process(command, environment, log) as child:
        wait_until(f"{url}/readyz", child, log, 120.0)
        result = await soaked(url, child.pid, 6.0)
    leaks = {problem.partition(": ")[2].partition(":")[0] for problem in result.problems}
    assert leaks == {"MB", "files", "tasks"}


class TestFindings:
    def samples(self, slope: float, spread: float = 1.0) -> tuple[list[float], list[dict[str, float]]]:
        rng = random.Random(0)
        times = [float(second) for second in range(60)]
        return times, [{"it: MB": 300 + slope * at + rng.gauss(0, spread)} for at in times]

    def leaks(self, times, samples, before=None, after=None) -> list[str]:
        before, after = before or samples[0], after or samples[0]
        return [one.leak for one in findings(times, samples, before, after, 10.0, 4) if one.leak]

    def test_steady_growth_is_a_leak_and_its_size_is_said(self):
        times, samples = self.samples(slope=0.5)
        (leak,) = self.leaks(times, samples)
        assert "grew by at least 2" in leak
        middle, low, high = growth(times, [sample["it: MB"] for sample in samples])
        assert low < middle < high
        assert middle == pytest.approx(0.5 * 44, abs=1.5)

    def test_fluctuation_is_none(self):
        assert self.leaks(*self.samples(slope=0.0, spread=20.0)) == []

    def test_what_grows_while_it_warms_up_is_none(self):
        times, samples = self.samples(slope=0.0)
        for at, sample in itertools.islice(zip(times, samples, strict=True), 14):
            sample["it: MB"] -= 100 - 7 * at
        assert self.leaks(times, samples) == []

    def test_state_of_one_request_that_is_left_at_rest_is_a_leak(self):
        times = [float(second) for second in range(20)]
        samples = [{"engine: exchanges": float(np.sin(at) > 0)} for at in times]
        held, gone = {"engine: exchanges": 1.0}, {"engine: exchanges": 0.0}
        assert self.leaks(times, samples, gone, gone) == []
        (leak,) = self.leaks(times, samples, gone, held)
        assert "1 more are left at rest" in leak
