"""``python -m service``: run the gateway until it is told to stop."""

from __future__ import annotations

import logging
import sys

import uvicorn

from service.app import create_app
from service.errors import ConfigError
from service.settings import Settings, load_settings


def main() -> int:
    """Return the exit status: 2 when the configuration is at fault, which one sentence on stderr explains."""
    try:
        settings = load_settings()
        app = create_app(settings)
    except ConfigError as error:
        sys.stderr.write(f"neuronguard: {error}\n")
        return 2
    _log(settings)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # the audit log says more, and never a query string
        server_header=False,
        proxy_headers=False,
        lifespan="on",
        timeout_graceful_shutdown=settings.shutdown_timeout,
    )
    return 0


def _log(settings: Settings) -> None:
    """Logs of the process on stderr, the audit log as bare JSON lines on stdout."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for name in ("httpx", "httpcore"):  # they log headers, and so directives
        logging.getLogger(name).setLevel(logging.WARNING)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    audit = logging.getLogger("neuronguard.audit")
    audit.addHandler(handler)
    audit.setLevel(logging.INFO)
    audit.propagate = False


if __name__ == "__main__":
    sys.exit(main())
