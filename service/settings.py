"""Settings of one gateway: environment variables that begin with ``NEURONGUARD_``, and a file."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, HttpUrl, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from service.errors import ConfigError
from service.yaml_lines import FileError, Lines, read_file

PREFIX = "NEURONGUARD_"
_FILE = PREFIX + "CONFIG"


def _several(value: object) -> object:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        return (parts,)
    urls = tuple(part.strip() if isinstance(part, str) else part for part in parts)
    if len(set(map(str, urls))) != len(urls):
        raise ValueError("the same address is given twice")
    return urls


class Settings(BaseSettings):
    """All times are in seconds, all sizes in bytes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    engine_url: Annotated[tuple[HttpUrl, ...], NoDecode, BeforeValidator(_several), Field(min_length=1)] = (
        HttpUrl("http://127.0.0.1:8001"),
    )
    """Where the guarded vLLM listens, without a path; several with commas between."""
    key_file: Path
    """The key ring shared with the engine (``guard.sealed.Keyring``)."""
    require_signed_by: Path | None = None
    """File of public keys (PEM); an engine whose bundle none of them has signed gets no requests."""
    policy_file: Path | None = None
    """Policies and API keys. Without one: refuse at the engine's default decision, no API keys."""
    policy_interval: float = Field(default=5.0, ge=0)
    """Between two looks at whether the policy file has changed; 0: only on SIGHUP and when asked to."""
    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs API keys in the policy file."""
    port: int = Field(default=8000, ge=0, le=65535)
    metrics_port: int | None = Field(default=None, ge=1, le=65535)
    """Serve ``/metrics`` on this port and no longer on the public one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    audit_file: Path | None = None
    """Where the audit log goes; without one to stdout."""
    audit_max_bytes: int = Field(default=100 << 20, ge=0)
    """Size at which the audit file is rotated; 0: never."""
    audit_keep: int = Field(default=10, ge=1, le=10_000)
    """Rotated audit files that are kept: ``audit_file`` with ``.1`` (the newest) and so on."""
    audit_scores: bool = False
    """Write P(unsafe) into the audit log, and into traces."""
    audit_prompt_key_file: Path | None = None
    """File with a secret of at least 32 bytes: write the prompt's HMAC under it into the audit log."""
    test_string: bool = False
    """Refuse a request that consists of the documented test string (``service.drill``)."""
    otlp_endpoint: HttpUrl | None = None
    """Where spans are sent by OTLP over HTTP, path included; needs ``neuronguard[otlp]``."""

    connect_timeout: float = Field(default=5.0, gt=0)
    """To reach the engine, each of up to four times."""
    verdict_timeout: float = Field(default=60.0, gt=0)
    """From sending a streamed or check-only request to its verdict: queueing and prefill."""
    answer_timeout: float = Field(default=1800.0, gt=0)
    """For a whole answer. The verdict of an answer that is not streamed arrives with its end."""
    idle_timeout: float = Field(default=60.0, gt=0)
    """Between two chunks of an answer."""
    send_timeout: float = Field(default=60.0, gt=0)
    """For a client to take one chunk."""
    head_timeout: float = Field(default=10.0, gt=0)
    """For a client to send the headers of a request, on a new connection or on one that was kept."""
    body_timeout: float = Field(default=30.0, gt=0)
    """For a client to send its whole request body."""
    status_timeout: float = Field(default=2.0, gt=0)
    """For the engine to answer a status request."""
    status_interval: float = Field(default=2.0, gt=0)
    """Between two status requests while the engine is ready."""
    breaker_failures: int = Field(default=5, ge=1)
    """Failures in a row after which an engine gets no requests for a while."""
    breaker_pause: float = Field(default=2.0, gt=0)
    """How long at first; twice as long each time that a trial fails, up to a minute."""
    affinity: bool = False
    """Send requests of one conversation to one engine, for its prefix cache."""
    directive_lifetime: float = Field(default=30.0, gt=0, le=600)
    """How long a directive may travel before the engine's API server refuses it."""
    shutdown_timeout: int = Field(default=30, ge=0)
    """How long running answers may go on after a stop signal."""
    drain_delay: float = Field(default=0.0, ge=0)
    """How long to go on accepting requests after a stop signal, while ``/readyz`` says 503 already."""

    max_connections: int = Field(default=1024, ge=1)
    """Requests at the engine at one time; more get a 503 at once."""
    max_head_bytes: int = Field(default=64 << 10, ge=1024)
    """Of a request's headers."""
    max_body_bytes: int = Field(default=1 << 20, ge=1)
    max_json_depth: int = Field(default=64, ge=1, le=256)
    max_messages: int = Field(default=2048, ge=1)
    """Messages of one conversation."""
    max_prompt_chars: int = Field(default=1 << 20, ge=1)
    """Characters (or token ids) of all prompts of one request."""
    max_answer_bytes: int = Field(default=64 << 20, ge=1)
    """Of an answer that is not streamed, and of one frame of a stream."""
    max_siblings: int = Field(default=128, ge=1, le=1024)
    """Prompts times ``n`` of one request."""
    max_moderation_inputs: int = Field(default=32, ge=1, le=1024)

    @property
    def loopback(self) -> bool:
        """Whether ``host`` can be reached from this machine only."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines' URLs without a trailing slash."""
        return tuple(str(url).rstrip("/") for url in self.engine_url)


def load_settings(file: Path | None = None) -> Settings:
    """Read the environment and a file, whose values count where the environment says nothing.

    The file, also named by ``NEURONGUARD_CONFIG``, is YAML with the settings' names in small letters. Raises
    ConfigError with one sentence that names the variable, or file and line.
    """
    file = file or (Path(os.environ[_FILE]) if os.environ.get(_FILE) else None)
    values, lines = _read(file) if file is not None else ({}, Lines(None))
    environment = EnvSettingsSource(Settings)()
    try:
        return Settings(**(values | environment))
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        name = PREFIX + field.upper()
        if first["type"] == "missing":
            raise ConfigError(f"The environment variable {name} is not set.") from error
        if field in values and field not in environment:
            wrong = "it is not a known setting" if first["type"] == "extra_forbidden" else first["msg"]
            raise ConfigError(f"{file}, line {lines.of([field])}: {field}: {wrong}.") from error
        raise ConfigError(f"The environment variable {name} is wrong: {first['msg']}.") from error


def _read(file: Path) -> tuple[dict[str, Any], Lines]:
    try:
        values, lines = read_file(file, "settings file")
    except FileError as error:
        raise ConfigError(str(error)) from error
    if values is None:
        return {}, lines
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"The settings file {file} must be a mapping of settings to values.")
    return values, lines
