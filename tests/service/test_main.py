"""The process itself: ``python -m service``."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from guard.healthcheck import main as healthcheck
from guard.sealed import Keyring
from service.errors import ConfigError
from service.settings import load_settings
from tests.e2e.servers import free_port, process, wait_until


def environment(folder: Path, **more: str) -> dict[str, str]:
    keys = folder / "keys"
    if not keys.exists():
        Keyring.generate().save(keys)
    return {"NEURONGUARD_KEY_FILE": str(keys), "NEURONGUARD_ENGINE_URL": "http://127.0.0.1:9", **more}


@contextmanager
def running(folder: Path, **more: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "service"]
    with process(command, environment(folder, NEURONGUARD_PORT=str(port), **more), folder / "log") as child:
        wait_until(f"http://127.0.0.1:{port}/healthz", child, folder / "log", 120.0)
        yield f"http://127.0.0.1:{port}"


def test_metrics_on_a_port_of_their_own_are_not_public(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, NEURONGUARD_METRICS_PORT=str(port)) as public:
        assert httpx.get(f"{public}/metrics").status_code == 404
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert "guard_upstream_up" in text
        assert "process_open_fds" in text


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway without an engine."""
    with running(tmp_path_factory.mktemp("public")) as url:
        yield url


def test_metrics_are_on_the_only_port_otherwise(public: str) -> None:
    assert "guard_upstream_up" in httpx.get(f"{public}/metrics").text


def test_the_container_health_check(public: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert healthcheck([f"{public}/healthz"]) == 0
    assert healthcheck([f"{public}/readyz"]) == 1
    assert capsys.readouterr().out.startswith("503: ")


def refused(folder: Path, **more: str) -> str:
    """Start a gateway that cannot run; returns the sentence that it leaves."""
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={**os.environ, **environment(folder, **more)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_metrics_port_in_use_is_one_sentence(public: str, tmp_path: Path) -> None:
    taken = public.rpartition(":")[2]
    said = refused(tmp_path, NEURONGUARD_METRICS_PORT=taken)
    assert said.startswith(f"neuronguard: The metrics cannot be served on 127.0.0.1:{taken}")


@pytest.mark.parametrize("value", ["0", "70000", "x"])
def test_a_wrong_metrics_port_is_named(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in environment(tmp_path, NEURONGUARD_METRICS_PORT=value).items():
        monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match="NEURONGUARD_METRICS_PORT"):
        load_settings()


GOOD = """
policies:
  default: {rules: [{above: {fpr: 0.01}, action: refuse}]}
  trial: {mode: observe}
"""


def check(folder: Path, policy: str, *, command: list[str]) -> subprocess.CompletedProcess[str]:
    (folder / "policies.yaml").write_text(policy)
    keys = environment(folder)["NEURONGUARD_KEY_FILE"]
    (folder / "gateway.yaml").write_text(
        f"key_file: {keys}\npolicy_file: {folder / 'policies.yaml'}\nport: 1\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEURONGUARD_")}
    return subprocess.run(
        [sys.executable, *command, "--config", str(folder / "gateway.yaml"), "--check-config"],
        env=kept,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [["-m", "service"], ["-c", "from guard.cli import main; main()", "gateway"]],
    ids=["module", "command"],
)
def test_a_configuration_can_be_checked_without_serving(command: list[str], tmp_path: Path) -> None:
    done = check(tmp_path, GOOD, command=command)
    assert (done.returncode, done.stderr) == (0, "")
    assert "default (enforce), trial (observe)" in done.stdout
    assert "rules by fpr are checked once" in done.stdout


def test_a_wrong_configuration_is_one_sentence_and_exit_2(tmp_path: Path) -> None:
    wrong = check(tmp_path, GOOD + "  worse: {mood: bad}\n", command=["-m", "service"])
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "policies.yaml, line 5: policies.worse.mood is not a known key" in wrong.stderr
    assert "Traceback" not in wrong.stderr
