from __future__ import annotations

import shlex
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from guard.serve import checks, plan
from guard.serve.command import invitation, serve

LAB = plan.Served("lab-partial", Path("/m"), Path("/b"), lab=True)


def refused(*arguments: str) -> str:
    """The one sentence in which the command ends."""
    result = CliRunner().invoke(serve, arguments)
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == 1, result.output
    return result.output


def test_a_busy_port_ends_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is in use" in refused("--port", str(taken.getsockname()[1]))


def test_too_little_memory_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "available_memory", lambda: 1 << 30)
    assert "of free memory are needed" in refused("--port", str(plan.free_port()))


def test_an_open_host_without_keys_ends_in_one_sentence(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("policies: {default: {mode: enforce}}\nkeys: []\n")
    assert "without API keys" in refused("--host", "0.0.0.0")
    assert "without API keys" in refused("--host", "0.0.0.0", "--policy-file", str(policy))


def test_an_unreadable_policy_file_ends_in_one_sentence(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused("--policy-file", str(policy))


def test_a_missing_bundle_ends_in_one_sentence(tmp_path: Path) -> None:
    port = str(plan.free_port())
    assert "there is no bundle in" in refused("--port", port, "--lab-dir", str(tmp_path))
    assert "--model needs --bundle" in refused("--port", port, "--model", str(tmp_path))


def test_a_lab_directory_without_models_ends_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert "lab.json" in refused("--port", str(plan.free_port()), "--lab-dir", str(tmp_path))


def test_extra_flags_come_last_and_so_win() -> None:
    command = plan.engine(LAB, 9, Path("/k"), extra=["--max-model-len", "256"]).command
    assert list(command[-2:]) == ["--max-model-len", "256"]
    assert command.index("--max-model-len") < len(command) - 2


def test_a_model_of_ones_own_keeps_its_own_length() -> None:
    own = plan.Served("mine", Path("/m"), Path("/b"), lab=False)
    assert "--max-model-len" in plan.engine(LAB, 9, Path("/k")).command
    assert "--max-model-len" not in plan.engine(own, 9, Path("/k")).command


def test_the_engine_stays_offline_whatever_the_user_set() -> None:
    environment = plan.engine_environment({"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "3"})
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["OMP_NUM_THREADS"] == "3"


def test_the_gateway_is_told_where_everything_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    service = plan.gateway("0.0.0.0", 8080, 9, Path("/k"), Path("/p"))
    assert service.environment["NEURONGUARD_ENGINE_URL"] == "http://127.0.0.1:9"
    assert service.environment["NEURONGUARD_KEY_FILE"] == "/k"
    assert service.environment["NEURONGUARD_POLICY_FILE"] == "/p"
    assert service.environment["NO_PROXY"] == "example.org,127.0.0.1,localhost"
    assert service.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("10.1.2.3", "http://10.1.2.3:80"),
    ],
)
def test_the_invitation_is_one_url_and_one_command(host: str, url: str) -> None:
    first, second = invitation(host, 80, "lab-partial", has_keys=True).splitlines()
    assert first.split()[2] == url
    words = shlex.split(second.removeprefix("Try: "))
    assert words[0] == "curl"
    assert f"{url}/v1/chat/completions" in words
    assert "Authorization: Bearer YOUR-KEY" in words
