"""The mix of clients against a gateway in front of a fake engine.

Run where ``NEURONGUARD_LOCUST`` names the command ``locust`` of an installation of Locust, which is not among
the dependencies.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from loadtests.load import mix
from loadtests.load.__main__ import policies
from tests.service.fake_engine import HARMFUL, MODEL
from tests.service.world import live

COMMAND = os.environ.get("NEURONGUARD_LOCUST")
pytestmark = pytest.mark.skipif(COMMAND is None, reason="NEURONGUARD_LOCUST does not name a locust")
KINDS = {"Everyday", "Unwelcome", "Tenant", "Burst", "LongPrompt", "SlowReader", "Leaver"}


@pytest.mark.parametrize(("mode", "pace"), [("enforce", 0.0), ("observe", 0.5)])
def test_every_kind_of_client_gets_what_the_policy_says(tmp_path: Path, mode: str, pace: float) -> None:
    served, keys = policies(), [f"sk-load-{mode}-{number}" for number in range(4)]
    with live(tmp_path, yaml.safe_dump(served)) as gateway:
        prompts = {"benign": ["hello"], "harmful": [HARMFUL], "long": ["hello " * 50]}
        wish = mix.Wish(gateway.url, mode, keys, prompts, 14, 4.0, pace, model=MODEL, tokens=8)
        found = mix.run(Path(str(COMMAND)), wish, tmp_path, "mix")
        aborted = gateway.engine.aborted.is_set()
    assert found.keys() == KINDS | {"all"}
    assert found["all"]["failed"] == 0
    assert all(own["first_p50_ms"] is not None for own in found.values())
    assert aborted or found["Leaver"]["requests"] > 0


def test_an_answer_that_does_not_fit_the_mode_is_a_failure(tmp_path: Path) -> None:
    with live(tmp_path, yaml.safe_dump(policies())) as gateway:
        prompts = {"benign": [HARMFUL], "harmful": [HARMFUL], "long": ["hello"]}
        keys = ["sk-load-enforce-0"]
        wish = mix.Wish(gateway.url, "enforce", keys, prompts, 14, 2.0, 0.0, model=MODEL, tokens=8)
        found = mix.run(Path(str(COMMAND)), wish, tmp_path, "mix")
    assert found["Everyday"]["failed"] == found["Everyday"]["requests"] > 0
    assert found["Unwelcome"]["failed"] == 0
