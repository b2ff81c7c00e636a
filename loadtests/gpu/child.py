"""One check in a process of its own: ``python -m loadtests.gpu.child JOB.json``.

The job names a function, ``module:function``, which is called with a Recorder and the job's options.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from loadtests.gpu.recorder import CannotError, Recorder

OWN = ("guard", "loadtests", "service", "tests")


def main() -> None:
    """Run the job; an exception ends the process, and its record stays as it was."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    recorder = Recorder(Path(job["record"]), device=job["device"], folder=Path(job["folder"]))
    module, _, function = job["call"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(recorder, **job["options"])
    except CannotError as error:
        recorder.give_up(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in OWN:
            raise
        recorder.give_up(f"the package {error.name} is not installed")
    recorder.end()


if __name__ == "__main__":
    main()
