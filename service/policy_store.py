"""The policies in force, and how a new file takes their place without a request noticing.

A request keeps the policies that it was admitted with. A new file is checked against everything that is
running before any of it counts; if something is wrong, the old one stays in force as a whole.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from service.metrics import Metrics
from service.policy import PolicyError
from service.policy_file import Policies, load_policies

logger = logging.getLogger("neuronguard.gateway")

Commit = Callable[[], None]
Prepare = Callable[[Policies], Commit]


class PolicyStore:
    """Holds the policies and reads their file again when told to, or when it has changed."""

    def __init__(self, path: Path | None, metrics: Metrics, *, needs_keys: bool) -> None:
        """Raises PolicyError. ``needs_keys``: a file without API keys would let everybody in."""
        self._path = path
        self._metrics = metrics
        self._needs_keys = needs_keys
        self._prepare: list[Prepare] = []
        self._stamp = self._look()
        self.current = self._load()

    def join(self, prepare: Prepare) -> None:
        """Have ``prepare`` asked about every new file, now about the current one.

        It raises PolicyError if the file cannot be used, else returns what makes it count.
        Raises PolicyError.
        """
        prepare(self.current)()
        self._prepare.append(prepare)

    def reload(self) -> Policies:
        """Read the file again. Raises PolicyError, after which everything is as before."""
        self._stamp = self._look()
        try:
            policies = self._load()
            commits = [prepare(policies) for prepare in self._prepare]
        except PolicyError as error:
            self._metrics.policy_reloads.labels("failed").inc()
            logger.error("the policies in force stay as they are: %s", error)
            raise
        self.current = policies
        for commit in commits:
            commit()
        self._metrics.policy_reloads.labels("done").inc()
        logger.info("policies reloaded: %s", ", ".join(policies.policies))
        return policies

    def reload_or_log(self) -> None:
        """``reload`` for a signal, which has nobody to tell."""
        with suppress(PolicyError):  # logged and counted
            self.reload()

    async def watch(self, interval: float) -> None:
        """Reload whenever the file changes, for ever. ``interval`` is in seconds."""
        while True:
            await asyncio.sleep(interval)
            if self._look() != self._stamp:
                try:
                    self.reload_or_log()
                except Exception:  # a dead watch would never notice another change
                    logger.exception("the policy file could not be looked at")

    def _load(self) -> Policies:
        policies = load_policies(self._path)
        if self._needs_keys and not policies.keys:
            raise PolicyError(
                "Without keys in the policy file the gateway serves loopback only, and its address is not a "
                "loopback address; add keys or set NEURONGUARD_HOST=127.0.0.1."
            )
        return policies

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat() if self._path is not None else None
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat is not None else None
