import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from guard.sealed import Keyring
from service.__main__ import main
from service.app import create_app
from service.errors import ConfigError
from tests.service.fake_engine import MODEL, FakeEngine
from tests.service.world import serving, settings_for, world

HEAVY = ("torch", "numpy", "vllm", "transformers", "scipy", "sklearn", "safetensors")


def run(code: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NEURONGUARD_")}
    command = [sys.executable, *code]
    return subprocess.run(
        command, env=kept | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_gateway_imports_nothing_heavy() -> None:
    code = f"import sys, service.app, service.__main__; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = run(["-c", code])
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "gateway.example"])
def test_without_keys_it_serves_loopback_only(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loopback only"):
        create_app(settings_for(FakeEngine(), tmp_path, host=host))
    keys = f"policies: {{default: {{}}}}\nkeys: [{{sha256: {'a' * 64}, tenant: t}}]"
    create_app(settings_for(FakeEngine(), tmp_path, keys, host=host))


def test_start_problems_are_one_sentence_and_exit_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key_file = tmp_path / "keys"
    Keyring.generate().save(key_file)
    policy = tmp_path / "p.yaml"
    policy.write_text("policies: {default: {mood: good}}")
    cases = [
        ({"KEY_FILE": str(tmp_path / "none")}, "key ring cannot be used"),
        ({"KEY_FILE": str(key_file), "HOST": "0.0.0.0"}, "serves loopback only"),
        ({"KEY_FILE": str(key_file), "POLICY_FILE": str(policy)}, "policies.default.mood is not a known key"),
        ({"KEY_FILE": str(key_file), "PORT": "x"}, "NEURONGUARD_PORT is wrong"),
    ]
    for environment, says in cases:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(f"NEURONGUARD_{name}", value)
            assert main() == 2
        out, err = capsys.readouterr()
        assert says in err
        assert (len(err.splitlines()), out) == (1, "")


def test_the_process_exits_2_too() -> None:
    done = run(["-m", "service"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "neuronguard: The environment variable NEURONGUARD_KEY_FILE is not set.\n"


def test_it_runs_and_stops_as_a_process(tmp_path: Path) -> None:
    engine = FakeEngine()
    settings = settings_for(engine, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with serving(engine) as engine_url:
        environment = os.environ | {
            "NEURONGUARD_ENGINE_URL": engine_url,
            "NEURONGUARD_KEY_FILE": str(settings.key_file),
            "NEURONGUARD_PORT": port,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            assert wait_for(f"{url}/readyz")
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert answer.status_code == 200
            assert "server" not in answer.headers
        finally:
            process.terminate()
            out, err = process.communicate(timeout=20)
    assert process.returncode in (0, -15)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == ["answer", "end"]
    assert lines[0]["action"] == "pass"
    assert "Traceback" not in err


def wait_for(url: str) -> bool:
    for _ in range(200):
        try:
            if httpx.get(url).status_code == 200:
                return True
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nope", 404, "route_not_found"),
        ("POST", "/v1/responses", 404, "unsupported_api"),
        ("GET", "/v1/responses/r", 404, "route_not_found"),
        ("POST", "/v1/embeddings", 404, "route_not_found"),
        ("POST", "/openai/deployments/x/embeddings", 404, "route_not_found"),
        ("POST", "/tokenize", 404, "route_not_found"),
        ("GET", "/guard/status", 404, "route_not_found"),
        ("GET", "/docs", 404, "route_not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions/", 404, "route_not_found"),
        ("DELETE", "/v1/models/x", 405, "method_not_allowed"),
    ],
)
async def test_unknown_routes_and_methods(
    method: str, path: str, status: int, code: str, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        response = await w.client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert len(response.headers["x-request-id"]) == 32
        if status == 405:
            assert "allow" in response.headers


async def test_models_are_what_the_engine_serves_and_no_more(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        listed = (await w.client.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == [MODEL]
        assert (await w.client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        assert "b" * 64 not in str(listed)
        assert "engine-a" not in str(listed)
        missing = await w.client.get("/v1/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_description_names_every_route_and_resolves(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        described = (await w.client.get("/openapi.json")).json()
    assert set(described["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/openai/deployments/{deployment}/chat/completions",
        "/openai/deployments/{deployment}/completions",
        "/v1/moderations",
        "/v1/responses",
        "/v1/guard/check",
        "/beta/litellm_basic_guardrail_api",
        "/api/v1/text/contents",
        "/v1/models",
        "/v1/models/{model_id}",
        "/admin/policies/reload",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    for reference in references(described):
        at: Any = described
        for part in reference.removeprefix("#/").split("/"):
            at = at[part]
    body = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatBody"}


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for child in value.values() for found in references(child)]
    return [found for child in value for found in references(child)] if isinstance(value, list) else []
