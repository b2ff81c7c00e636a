"""vLLM's own server, not started by the guard's launcher: guarded by a configuration file; and stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx
import pytest
import yaml
from click.testing import CliRunner

from guard.bundle import Bundle
from guard.cli import main
from guard.engine.config import AUDIENCE_ENV, KEY_FILE_ENV, SIGNED_ENV
from guard.public_keys import read_public_keys
from guard.verdict import EngineStatus
from tests.e2e.servers import ENGINE_FLAGS, ENVIRONMENT, free_port, gateway, process, wait_until
from tests.e2e.test_stack import raw
from tests.engine import world


@pytest.fixture(scope="module")
def flags(tiny_bundle_dir, signing_key, tmp_path_factory):
    command = ["bundle", "flags", str(tiny_bundle_dir), "--require-signed-by", f"{signing_key}.pub"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    path = tmp_path_factory.mktemp("flags") / "guard.yaml"
    path.write_text(result.stdout)
    return path


def test_flags_are_those_of_this_bundle(flags, tiny_bundle):
    said = yaml.safe_load(flags.read_text())
    assert set(said) == {"worker-cls", "scheduler-cls", "middleware", "additional-config"}
    assert tiny_bundle.digest in said["additional-config"]


@dataclass(frozen=True)
class Server:
    """vLLM's own server and a gateway in front of it."""

    url: str
    front: str
    child: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def server(flags, tiny_model, key_file, signing_key, tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("other"), free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--config", str(flags), *ENGINE_FLAGS, "--shutdown-timeout", "60"),
    ]
    environment = {**ENVIRONMENT, KEY_FILE_ENV: str(key_file), AUDIENCE_ENV: "engine-of-this-test"}
    url, log = f"http://127.0.0.1:{port}", folder / "engine.log"
    with pytest.MonkeyPatch.context() as patch, process(command, environment, log) as child:
        wait_until(f"{url}/guard/status", child, log)
        patch.setenv(SIGNED_ENV, f"{signing_key}.pub")  # of the gateway: it becomes ready
        with gateway(url, key_file, folder) as front:
            yield Server(url, front, child)


def test_server_of_vllm_is_guarded_by_them(server, tiny_bundle_dir, signing_key, reference):
    bundle = Bundle.load(tiny_bundle_dir)
    status = EngineStatus.model_validate(httpx.get(f"{server.url}/guard/status").json())
    assert (status.bundle, status.audience) == (bundle.digest, "engine-of-this-test")
    assert (status.signed_by,) == read_public_keys(f"{signing_key}.pub")
    assert status.reference == bundle.card.reference
    outcomes = set()
    for prompt in world.prompts(12, seed=95, longest=100):
        logit = float(bundle.logits(reference.features(prompt)[None])[0])
        if abs(logit) < 0.05:
            continue
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 3}
        for base in (server.front, server.url):  # through the gateway, and past it
            answer = raw(None, "/v1/completions", body, base=base, headers=KEY).json()
            assert (answer["usage"]["completion_tokens"] == 0) == (logit > 0)
        outcomes.add(logit > 0)
    assert outcomes == {True, False}


def test_an_engine_that_will_be_stopped_says_so_and_finishes_its_answers(server, prompts):
    """The last test here: it stops the server."""
    _, safe = prompts
    body = {"model": "tiny", "prompt": safe, "max_tokens": 380, "ignore_eos": True, "temperature": 0.0}
    whole = raw(None, "/v1/completions", body, base=server.front, headers=KEY).json()["choices"][0]["text"]
    asked = {"json": body | {"stream": True}, "headers": KEY, "timeout": 60}
    with httpx.stream("POST", f"{server.front}/v1/completions", **asked) as early:
        server.child.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.front}/readyz").status_code == 200:  # until the gateway has heard it
            assert time.monotonic() < deadline
            time.sleep(0.05)
        said = EngineStatus.model_validate(httpx.get(f"{server.url}/guard/status").json())
        assert (said.state, said.detail) == ("stopping", "it will be stopped")
        # One who has not heard it yet is answered, to the end.
        with httpx.stream("POST", f"{server.url}/v1/completions", **asked) as late:
            lines = late.iter_lines()
            first = next(lines)
            server.child.send_signal(signal.SIGTERM)
            assert text_of([first, *lines]) == whole
        assert text_of(list(early.iter_lines())) == whole
    assert server.child.wait(60) in (0, -signal.SIGTERM)


def text_of(lines: list[str]) -> str:
    """The text of a stream that ended as it should."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data[-1] == "[DONE]"
    return "".join(json.loads(part)["choices"][0]["text"] for part in data[:-1])


KEY = {"authorization": "Bearer sk-test-message"}
