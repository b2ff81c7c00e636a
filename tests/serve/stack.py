"""Supervise fake services: what `make serve` runs, less vLLM. One JSON argument."""

import json
import os
import sys
from pathlib import Path

from guard.serve.children import Service
from guard.serve.keys import fresh_key_file
from guard.serve.supervise import supervise

FAKE = Path(__file__).parent / "fake_service.py"


def main(options):
    services = [
        Service(name, [sys.executable, str(FAKE), json.dumps(fake)], dict(os.environ), fake["port"], "/ready")
        for name, fake in options["services"].items()
    ]
    with fresh_key_file() as key_file:
        return supervise(
            services,
            f"endpoint is up {key_file}",
            logs=Path(options["logs"]),
            remove=[key_file.parent],
            verbose=options.get("verbose", False),
            start_seconds=options.get("start_seconds", 30.0),
            grace=options.get("grace", 10.0),
        )


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
