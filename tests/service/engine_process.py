"""The fake engine as a process: ``python -m tests.service.engine_process PORT KEYS BUNDLE VERSION``.

Like a real one it has another audience at every start, reads the keys once, says ``stopping`` on SIGUSR1, and
after SIGTERM finishes what it has begun and takes nothing more.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys

import uvicorn

from guard.sealed import Keyring
from tests.service.fake_engine import FakeEngine, a_status


async def main(port: int, keys: Keyring, bundle: str, version: str) -> None:
    engine = FakeEngine(keys)
    audience = f"engine-{secrets.token_hex(4)}"
    engine.status = a_status(audience=audience, bundle=bundle, vllm_version=version)
    engine.before_headers = 0.02
    stopping = engine.status.model_copy(update={"state": "stopping"})
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, lambda: setattr(engine, "status", stopping))
    config = uvicorn.Config(engine, port=port, log_level="warning", lifespan="off")
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Keyring.load(sys.argv[2]), sys.argv[3], sys.argv[4]))
