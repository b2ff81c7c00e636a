"""vLLM's own server, not started by the guard's launcher: guarded by a configuration file alone."""

from __future__ import annotations

import sys

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


def test_server_of_vllm_is_guarded_by_them(
    flags, tiny_model, tiny_bundle_dir, key_file, signing_key, reference, tmp_path, monkeypatch
):
    port, log = free_port(), tmp_path / "engine.log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--config", str(flags), *ENGINE_FLAGS),
    ]
    environment = {**ENVIRONMENT, KEY_FILE_ENV: str(key_file), AUDIENCE_ENV: "engine-of-this-test"}
    url, bundle = f"http://127.0.0.1:{port}", Bundle.load(tiny_bundle_dir)
    with process(command, environment, log) as child:
        wait_until(f"{url}/guard/status", child, log)
        status = EngineStatus.model_validate(httpx.get(f"{url}/guard/status").json())
        assert (status.bundle, status.audience) == (bundle.digest, "engine-of-this-test")
        assert (status.signed_by,) == read_public_keys(f"{signing_key}.pub")
        assert status.reference == bundle.card.reference
        monkeypatch.setenv(SIGNED_ENV, f"{signing_key}.pub")  # of the gateway: it becomes ready
        with gateway(url, key_file, tmp_path) as front:
            outcomes = set()
            for prompt in world.prompts(12, seed=95, longest=100):
                logit = float(bundle.logits(reference.features(prompt)[None])[0])
                if abs(logit) < 0.05:
                    continue
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 3}
                for base in (front, url):  # through the gateway, and past it
                    answer = raw(None, "/v1/completions", body, base=base, headers=KEY).json()
                    assert (answer["usage"]["completion_tokens"] == 0) == (logit > 0)
                outcomes.add(logit > 0)
            assert outcomes == {True, False}


KEY = {"authorization": "Bearer sk-test-message"}
