"""What every process of a guarded engine knows about its guard, and how it gets there.

Configuration that is part of *what is computed* travels in vLLM's ``additional_config`` (which enters the
compile-cache key); what differs from start to start, and the path to the signing keys, travels in the
environment, because vLLM prints ``additional_config``. The keys themselves are only ever in their file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from guard.adapters import AdapterError, adapter_digest
from guard.bundle import Bundle, BundleError
from guard.digest import tokenizer_digest, weights_digest
from guard.engine.errors import GuardStartupError
from guard.public_keys import PublicKeyError, read_public_keys
from guard.sealed import KeyFileError, Keyring
from guard.signature import SignatureError, verify
from guard.sites import UnsupportedArchitectureError, shape_of
from guard.verdict import Decision

CONFIG_KEY = "neuronguard"
ENTRIES_KEY = "neuronguard_entries"
"""Beside a verdict on its way to the API server: how many requests the ledger holds."""
STOP_KEY = "neuronguard_stop"
"""What an output's ``kv_transfer_params`` say of an answer that was stopped, for the API server to count."""
WORKER = "guard.engine.worker.GuardWorker"
SCHEDULER = "guard.engine.scheduler.guard_scheduler"
MIDDLEWARE = "guard.engine.frontend.GuardMiddleware"
EXTRA_ARG = "neuronguard_directive"
"""Where the API server leaves a sealed directive for the scheduler in ``SamplingParams.extra_args``."""
KEY_FILE_ENV = "NEURONGUARD_KEY_FILE"
AUDIENCE_ENV = "NEURONGUARD_AUDIENCE"
SIGNED_ENV = "NEURONGUARD_REQUIRE_SIGNED_BY"
"""File of public keys, of which one must have signed the bundle, unless ``--require-signed-by`` names one."""
DEFAULT_AUDIENCE = "engine"


class GuardConfig(BaseModel):
    """The guard's entry in ``additional_config``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundle: str
    """Directory of the bundle."""
    bundle_sha256: str
    """Digest the bundle must have: no process can read another one than the launcher checked."""
    default: Decision
    """Applied to requests without a directive."""
    adapters: dict[str, str] = {}
    """LoRA adapters that are served, each one listed in the bundle: directory by name."""
    donor: str | None = None
    """Directory of the donor that dynamic patches take activations from, if it has weights of its own."""
    trusted_keys: tuple[str, ...] | None = None
    """Public keys of which one must have signed the bundle (``guard.public_keys``); None: the file that
    ``SIGNED_ENV`` names, and without one the bundle may be unsigned."""

    @classmethod
    def of(cls, vllm_config: Any) -> GuardConfig:
        """Read it back from a ``VllmConfig``. Raises GuardStartupError."""
        entry = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        if entry is None:
            raise GuardStartupError(
                f"the guard's worker or scheduler runs without additional_config[{CONFIG_KEY!r}]; "
                "start the engine with: python -m guard.engine"
            )
        try:
            return cls.model_validate(entry)
        except ValidationError as error:
            raise GuardStartupError(f"additional_config[{CONFIG_KEY!r}] is not valid: {error}") from error

    @classmethod
    def for_bundle(
        cls,
        directory: str,
        bundle: Bundle,
        default: Decision | None = None,
        adapters: Mapping[str, str] | None = None,
        donor: str | None = None,
        trusted_keys: tuple[str, ...] | None = None,
    ) -> GuardConfig:
        """The entry for a loaded bundle; ``default`` is the bundle's own default decision if None."""
        return cls(
            bundle=os.path.abspath(directory),
            bundle_sha256=bundle.digest,
            default=default or bundle.card.default_decision,
            adapters=dict(adapters or {}),
            donor=os.path.abspath(donor) if donor else None,
            trusted_keys=trusted_keys,
        )

    def entry(self) -> dict[str, Any]:
        """What goes into ``additional_config``."""
        return {CONFIG_KEY: self.model_dump(mode="json")}

    def flags(self) -> dict[str, str]:
        """What a launch of vLLM that is not the guard's own has to be given, by flag."""
        return {
            "worker-cls": WORKER,
            "scheduler-cls": SCHEDULER,
            "middleware": MIDDLEWARE,
            "additional-config": json.dumps(self.entry()),
        }

    def load_bundle(self) -> Bundle:
        """Load the bundle and check that it is the one meant. Raises GuardStartupError."""
        try:
            bundle = Bundle.load(self.bundle)
        except BundleError as error:
            raise GuardStartupError(str(error)) from error
        if bundle.digest != self.bundle_sha256:
            raise GuardStartupError(
                f"the bundle in {self.bundle} has changed: its digest is {bundle.digest}, "
                f"expected {self.bundle_sha256}"
            )
        self.signed_by(bundle)
        return bundle

    def signed_by(self, bundle: Bundle) -> str | None:
        """The key that signed the loaded bundle, None when it is unsigned and may be.

        A signature that is there must hold, whether one is required or not. Raises GuardStartupError.
        """
        trusted = self.trusted_keys
        if trusted is None:
            trusted = trusted_keys(os.environ.get(SIGNED_ENV))
        try:
            return verify(self.bundle, bundle.digest, trusted)
        except SignatureError as error:
            raise GuardStartupError(str(error)) from error


def verify_served_model(bundle: Bundle, directory: str, tokenizer: str, hf_config: Any) -> None:
    """Refuse a bundle that was not fitted on the checkpoint in ``directory``. Raises GuardStartupError."""
    try:
        bundle.verify_model(
            shape=shape_of(hf_config),
            weights_sha256=weights_digest(directory),
            tokenizer_sha256=tokenizer_digest(tokenizer),
        )
    except (BundleError, UnsupportedArchitectureError, FileNotFoundError) as error:
        raise GuardStartupError(str(error)) from error


def verify_adapters(bundle: Bundle, adapters: Mapping[str, str]) -> None:
    """Refuse LoRA adapters that the bundle does not list by these names and digests.

    ``adapters`` are directories by name. Raises GuardStartupError.
    """
    listed = {adapter.name: adapter for adapter in bundle.card.adapters}
    for name, directory in adapters.items():
        if name not in listed:
            raise GuardStartupError(
                f"the LoRA adapter {name!r} is not listed in the bundle (it lists: "
                f"{', '.join(sorted(listed)) or 'none'}); list it with: neuronguard bundle adapter"
            )
        try:
            digest = adapter_digest(directory)
        except AdapterError as error:
            raise GuardStartupError(str(error)) from error
        if digest != listed[name].sha256:
            raise GuardStartupError(
                f"the LoRA adapter {name!r} in {directory} is not the one that the bundle lists: its digest "
                f"is {digest}, expected {listed[name].sha256}"
            )


def keyring_from_env() -> Keyring | None:
    """The signing keys, or None when no key file is named: then every directive is refused."""
    path = os.environ.get(KEY_FILE_ENV)
    if not path:
        return None
    try:
        return Keyring.load(path)
    except KeyFileError as error:
        raise GuardStartupError(str(error)) from error


def trusted_keys(file: str | None) -> tuple[str, ...] | None:
    """The keys in a file, None when no file is named. Raises GuardStartupError."""
    if not file:
        return None
    try:
        return read_public_keys(file)
    except PublicKeyError as error:
        raise GuardStartupError(str(error)) from error


def audience_from_env() -> str:
    """This engine's name in directives; the launcher makes a fresh one for every start."""
    return os.environ.get(AUDIENCE_ENV, DEFAULT_AUDIENCE)
