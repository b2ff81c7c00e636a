"""The processes of the comparison: three engines, the gateway, and a proxy for each alternative."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from guard.sealed import Keyring
from loadtests.alternatives.client import Target
from loadtests.alternatives.processes import Group
from loadtests.alternatives.proxy import REFUSAL
from loadtests.first_token import ENVIRONMENT, FLAGS, PLAIN
from loadtests.gateway.__main__ import Server, _free_port, running

TENANTS = ("guard", "two-phase", "one-engine", "litellm")
"""Whoever asks the gateway has a key of its own, and with it blocks of its own in the prefix cache."""
CHUNK = 16
"""Tokens that the scanner of answers waits for. NeMo Guardrails' default is 200."""


def key_of(tenant: str) -> str:
    """The API key of a tenant."""
    return f"sk-bench-{tenant}"


def policies() -> dict[str, Any]:
    """The gateway's policy file."""
    default = {"prefix_cache": "tenant", "refusal": {"style": "message", "text": REFUSAL}}
    return {
        "policies": {"default": default},
        "keys": [
            {
                "sha256": hashlib.sha256(key_of(tenant).encode()).hexdigest(),
                "tenant": tenant,
                "rights": ["chat", "checks"],
            }
            for tenant in TENANTS
        ],
    }


class Fleet:
    """Everything that runs, and how to start more of it. A context manager; what it started ends with it."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.folder = folder
        self._logs = logs
        self.groups: dict[str, Group] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self, group: str, command: Callable[[int], list[str]], ready: str, **environment: str
    ) -> Server:
        """Start a server on a free port, wait for it, and enter its processes as a group."""
        port = _free_port()
        log = self._logs / f"{group.replace(' ', '-')}.log"
        environment |= {"NEURONGUARD_PORT": str(port)}
        server = self._stack.enter_context(running(command(port), port, ready, log, **environment))
        self.groups[group] = Group(server.pid)
        return server

    def vllm(self, group: str, model: Path, *flags: str) -> str:
        """A stock vLLM."""

        def command(port: int) -> list[str]:
            own = ["--model", str(model), *FLAGS, *flags, "--port", str(port)]
            return [sys.executable, "-c", PLAIN, *own]

        return self.start(group, command, "/health", **ENVIRONMENT).url

    def guarded(
        self, model: Path, bundle: Path, *flags: str, served: dict[str, Any] | None = None
    ) -> tuple[str, str]:
        """A guarded vLLM and a gateway in front of it; returns both URLs. ``served`` is a policy file."""
        keys, policy_file = self.folder / "keys", self.folder / "policies.yaml"
        Keyring.generate().save(keys)
        policy_file.write_text(yaml.safe_dump(served or policies()))

        def command(port: int) -> list[str]:
            own = ["--model", str(model), "--bundle", str(bundle), "--key-file", str(keys)]
            return [sys.executable, "-m", "guard.engine", *own, *FLAGS, *flags, "--port", str(port)]

        engine = self.start("guarded engine", command, "/guard/status", **ENVIRONMENT).url
        gateway = self.start(
            "gateway",
            lambda _: [sys.executable, "-m", "service"],
            "/readyz",
            NEURONGUARD_ENGINE_URL=engine,
            NEURONGUARD_KEY_FILE=str(keys),
            NEURONGUARD_POLICY_FILE=str(policy_file),
            NEURONGUARD_AUDIT_FILE=str(self.folder / "audit.jsonl"),
        ).url
        return engine, gateway

    def proxy(self, module: str, group: str, python: str = sys.executable, **options: Any) -> str:
        """One of the proxies of this package."""

        def command(port: int) -> list[str]:
            return [python, "-m", f"loadtests.alternatives.{module}", str(port), json.dumps(options)]

        return self.start(group, command, "/health").url


def own_alternatives(fleet: Fleet, urls: dict[str, str], labels: Path, patterns: Path) -> list[Target]:
    """Stock vLLM, the guard, and the proxies that are modelled here."""
    stock, gateway, guard = urls["stock"], urls["gateway"], urls["guard"]
    held = {"guard": guard, "generate": stock, "labels": str(labels)}
    bearer = {"authorization": f"Bearer {key_of('guard')}"}
    two = fleet.proxy(
        "two_phase", "two-phase proxy", check=gateway, generate=stock, check_key=key_of("two-phase")
    )
    one = fleet.proxy(
        "two_phase", "one-engine proxy", check=gateway, generate=gateway,
        check_key=key_of("one-engine"), generate_key=key_of("one-engine"),
    )  # fmt: skip
    first = fleet.proxy("guard_model", "guard-model proxy", **held, salt="first")
    race = fleet.proxy("guard_model", "racing proxy", **held, salt="race", race=True)
    scan = fleet.proxy("output_scan", "scanning proxy", generate=stock, patterns=str(patterns), chunk=CHUNK)
    ours = ("guarded engine", "gateway")
    return [
        Target("stock vLLM", stock, ("stock engine",), refuses=False),
        Target("this guard", gateway, ours, bearer),
        Target("two phases, two engines", two, (*ours, "stock engine", "two-phase proxy")),
        Target("two phases, one engine", one, (*ours, "one-engine proxy")),
        Target("guard model, then answer", first, ("guard model", "stock engine", "guard-model proxy")),
        Target("guard model beside answer", race, ("guard model", "stock engine", "racing proxy")),
        Target(f"answer scanned, {CHUNK} tokens", scan, ("stock engine", "scanning proxy")),
    ]
