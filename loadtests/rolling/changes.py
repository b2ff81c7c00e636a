"""The changes, in the order of `docs/operations.md#rolling-changes`. None leaves an unguarded moment.

At every moment one engine and one gateway are there for the requests that the others cannot take. A replica
is told that it will be stopped, is stopped when nobody sends it anything any more, and the next one follows
only when it is back.
"""

from __future__ import annotations

import signal

from guard.sealed import Keyring
from loadtests.rolling.load import Load
from loadtests.rolling.replicas import Deployment, Replica, RollingError


def roll_engine(deployment: Deployment, engine: Replica) -> None:
    """Replace an engine by one with the present choice and keys."""
    engine.tell(signal.SIGUSR1)
    deployment.wait_seen(engine, up=False)
    engine.tell(signal.SIGTERM)  # what runs is finished: --shutdown-timeout
    engine.wait_gone()
    deployment.start_engine(engine)
    engine.wait_ready()
    deployment.wait_seen(engine, up=True)


def roll_gateway(deployment: Deployment, gateway: Replica) -> None:
    """Replace a gateway by one with the present settings and keys."""
    gateway.tell(signal.SIGTERM)  # the load balancer hears it: NEURONGUARD_DRAIN_DELAY
    gateway.wait_gone()
    deployment.start_gateway(gateway)
    gateway.wait_ready()
    for engine in deployment.engines:
        deployment.wait_seen(engine, up=True)


def enforce(deployment: Deployment, load: Load) -> None:
    """From observing to enforcing: the policy file, which gateways read by themselves."""
    deployment.change_policies(policies={"default": {"mode": "enforce"}})
    load.enforced.set()


def new_bundle(deployment: Deployment, bundle: str, old: str, new: str) -> None:
    """Another bundle: accepted beside the old one, taken over by engine after engine, then alone accepted.

    ``old`` and ``new`` are the digests. Raises RollingError when an engine comes back with another one.
    """
    deployment.change_policies(bundles=[old, new])
    deployment.choose(bundle=bundle)
    for engine in deployment.engines:
        roll_engine(deployment, engine)
        if (found := deployment.status(engine).bundle) != new:
            raise RollingError(f"{engine.name} has the bundle {found}, expected {new}")
    deployment.change_policies(bundles=[new])


def new_vllm(deployment: Deployment, python: str) -> list[str]:
    """Another version of vLLM, one engine after another. Returns the versions that they say they run."""
    deployment.choose(python=python)
    for engine in deployment.engines:
        roll_engine(deployment, engine)
    return [deployment.status(engine).vllm_version for engine in deployment.engines]


def new_key(deployment: Deployment, old: Keyring, new: Keyring) -> None:
    """Another shared key in three steps, each taken over by every replica before the next one begins."""
    for rings in ((old, new), (new, old), (new,)):
        deployment.write_keys(*rings)
        for engine in deployment.engines:
            roll_engine(deployment, engine)
        for gateway in deployment.gateways:
            roll_gateway(deployment, gateway)


def new_gateway(deployment: Deployment) -> None:
    """Another release or other settings of the gateway, one after another."""
    for gateway in deployment.gateways:
        roll_gateway(deployment, gateway)
