"""One target under Atheris: ``python -m tests.fuzz.run TARGET [libFuzzer's flags and folders]``."""

import sys

import atheris

with atheris.instrument_imports(include=["service", "guard"]):
    from tests.fuzz import bundle_targets, gateway_targets

TARGETS = gateway_targets.TARGETS | bundle_targets.TARGETS

if __name__ == "__main__":
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
